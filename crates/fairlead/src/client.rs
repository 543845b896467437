//! `fairlead apply|get|delete|logs`: thin clients of the API, for machines without kubectl.
//!
//! They know no kind: names are resolved by discovery, tables come from the server, changes are server-side apply.

mod apply;
mod delete;
mod discovery;
mod files;
mod get;
mod logs;
pub(crate) mod session;
mod table;

use std::io;
use std::process::ExitCode;

use anyhow::{Context, bail};
use api::ObjectExt;
use serde_json::{Value, json};

pub use apply::ApplyArgs;
pub use delete::DeleteArgs;
use discovery::{Kind, Kinds};
pub use get::GetArgs;
pub use logs::LogsArgs;
use session::Session;

/// A command's end. A reader that went away (`| head`) is no failure.
fn ended(result: anyhow::Result<bool>) -> anyhow::Result<ExitCode> {
    match result {
        Ok(true) => Ok(ExitCode::SUCCESS),
        Ok(false) => Ok(ExitCode::FAILURE),
        Err(error) => {
            let is_closed = |cause: &(dyn std::error::Error + 'static)| {
                cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
            };
            if error.chain().any(is_closed) { Ok(ExitCode::SUCCESS) } else { Err(error) }
        }
    }
}

/// The namespace of an object in a file.
fn place(session: &Session, kind: &Kind, object: &Value) -> anyhow::Result<String> {
    if !kind.namespaced {
        return Ok(String::new());
    }
    match object.namespace() {
        "" => Ok(session.namespace.clone()),
        own if session.is_given && own != session.namespace => bail!(
            "the namespace from the provided object {own:?} does not match the namespace {:?}: leave -n out, or give -n {own}",
            session.namespace
        ),
        own => Ok(own.to_string()),
    }
}

/// A kind, and the objects of it that are meant by name; all of them when there is none.
struct Target<'a> {
    kind: &'a Kind,
    names: Vec<String>,
}

/// Reads `RESOURCE NAME…` or `RESOURCE/NAME…`.
fn targets<'a>(kinds: &'a Kinds, what: &[String]) -> anyhow::Result<Vec<Target<'a>>> {
    let (first, rest) = what.split_first().context("say what is meant, such as pods or svc/NAME")?;
    if !first.contains('/') {
        let found = kinds.several(first)?;
        if found.len() > 1 && !rest.is_empty() {
            bail!("names go with one resource; say RESOURCE/NAME for objects of several");
        }
        if let Some(wrong) = rest.iter().find(|name| name.contains('/')) {
            bail!("{wrong:?} is not a name: give RESOURCE NAME… or RESOURCE/NAME…, not both");
        }
        return Ok(found.into_iter().map(|kind| Target { kind, names: rest.to_vec() }).collect());
    }
    let mut targets: Vec<Target<'a>> = Vec::new();
    for word in what {
        let split = word.split_once('/').filter(|(kind, name)| !kind.is_empty() && !name.is_empty());
        let (kind, name) = split.with_context(|| format!("{word:?} is not RESOURCE/NAME"))?;
        let kind = kinds.one(kind)?;
        match targets.last_mut().filter(|t| t.kind == kind) {
            Some(target) => target.names.push(name.to_string()),
            None => targets.push(Target { kind, names: vec![name.to_string()] }),
        }
    }
    Ok(targets)
}

/// The objects of an answer, each with its head: servers leave it out of lists.
fn items(kind: &Kind, answer: Value) -> Vec<Value> {
    let mut answer = answer;
    let mut objects = match answer.get_mut("items").map(Value::take) {
        Some(Value::Array(items)) => items,
        _ => vec![answer],
    };
    objects.retain(Value::is_object);
    for object in &mut objects {
        object["apiVersion"] = json!(kind.api_version());
        object["kind"] = json!(kind.kind);
        object.metadata_mut().remove("managedFields");
    }
    objects
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_readers_end_is_no_failure() {
        let closed = anyhow::Error::from(io::Error::from(io::ErrorKind::BrokenPipe)).context("write");
        assert!(ended(Err(closed)).is_ok());
        assert!(ended(Err(anyhow::anyhow!("else"))).is_err());
    }
}
