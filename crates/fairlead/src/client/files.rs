//! Objects in files: YAML of several documents, JSON, directories of both, and standard input.

use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use api::ObjectExt;
use serde_json::Value;

/// The objects in files, in order; a directory's files by name; lists taken apart.
pub fn read(sources: &[PathBuf]) -> anyhow::Result<Vec<Value>> {
    let mut objects = Vec::new();
    for source in sources {
        if source == Path::new("-") {
            let mut text = String::new();
            std::io::stdin().read_to_string(&mut text).context("read standard input")?;
            parse("standard input", &text, &mut objects)?;
            continue;
        }
        let name = source.display().to_string();
        if !source.is_dir() {
            let text = std::fs::read_to_string(source).with_context(|| format!("read {name}"))?;
            parse(&name, &text, &mut objects)?;
            continue;
        }
        let entries = std::fs::read_dir(source).with_context(|| format!("read the directory {name}"))?;
        let mut files = entries.map(|e| e.map(|e| e.path())).collect::<Result<Vec<_>, _>>()?;
        files.retain(|f| f.extension().and_then(|e| e.to_str()).is_some_and(|e| matches!(e, "yaml" | "yml" | "json")));
        files.sort();
        for file in files {
            let name = file.display().to_string();
            let text = std::fs::read_to_string(&file).with_context(|| format!("read {name}"))?;
            parse(&name, &text, &mut objects)?;
        }
    }
    if objects.is_empty() {
        bail!("no objects in the files given");
    }
    Ok(objects)
}

fn parse(name: &str, text: &str, objects: &mut Vec<Value>) -> anyhow::Result<()> {
    let documents: Vec<Value> = if text.trim_start().starts_with('{') {
        let stream = serde_json::Deserializer::from_str(text).into_iter::<Value>();
        stream.collect::<Result<Vec<_>, _>>().with_context(|| format!("{name} is not good JSON"))?
    } else {
        serde_saphyr::from_multiple::<Value>(text).with_context(|| format!("{name} is not good YAML"))?
    };
    for (number, document) in documents.into_iter().enumerate() {
        take(&format!("{name}, document {}", number + 1), document, objects)?;
    }
    Ok(())
}

fn take(name: &str, mut document: Value, objects: &mut Vec<Value>) -> anyhow::Result<()> {
    match &document {
        Value::Null => return Ok(()),
        Value::Object(_) => {}
        _ => bail!("{name} is not an object"),
    }
    if document.text("/kind").ends_with("List")
        && let Some(Value::Array(items)) = document.get_mut("items").map(Value::take)
    {
        return items.into_iter().try_for_each(|item| take(name, item, objects));
    }
    for field in ["apiVersion", "kind"] {
        if document.text(&format!("/{field}")).is_empty() {
            bail!("{name} has no {field}");
        }
    }
    if document.name().is_empty() {
        bail!("{name}: {} has no metadata.name", document.text("/kind"));
    }
    objects.push(document);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> anyhow::Result<Vec<String>> {
        let mut objects = Vec::new();
        parse("test", text, &mut objects)?;
        Ok(objects.iter().map(|o| format!("{}/{}", o.text("/kind"), o.name())).collect())
    }

    #[test]
    fn documents_lists_and_json_are_taken_apart() {
        let yaml = "apiVersion: v1\nkind: Pod\nmetadata: {name: a}\n---\n# nothing\n---\napiVersion: v1\nkind: List\nitems:\n- apiVersion: v1\n  kind: Secret\n  metadata:\n    name: b\n";
        assert_eq!(names(yaml).expect("good"), ["Pod/a", "Secret/b"]);
        let json = r#"{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}} {"apiVersion":"v1","kind":"Pod","metadata":{"name":"b"}}"#;
        assert_eq!(names(json).expect("good"), ["Pod/a", "Pod/b"]);
    }

    #[test]
    fn what_is_missing_is_said() {
        for (text, said) in [
            ("kind: Pod\nmetadata: {name: a}\n", "has no apiVersion"),
            ("apiVersion: v1\nkind: Pod\n", "has no metadata.name"),
            ("- a\n", "is not an object"),
            ("a: [", "is not good YAML"),
        ] {
            let error = names(text).expect_err(text).to_string();
            assert!(error.contains(said), "{text:?}: {error}");
        }
    }
}
