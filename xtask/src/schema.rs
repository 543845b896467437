//! `cargo xtask schema --api DIR --apimachinery DIR` writes the schema table of the built-in kinds. With `--gateway-api DIR
//! --metallb DIR` beside them it writes that of the kinds which others bring to a cluster as custom resources, and which this
//! one serves like its own; these have no protobuf numbers, but defaults, words and bounds of their fields.
//!
//! The Go types of kubernetes/api and kubernetes/apimachinery hold every fact the API engine needs in their tags and
//! markers: JSON name, protobuf number, type, whether zero is a value, list semantics and patch strategy. The table keeps
//! those facts and no prose. One line per field:
//!
//! ```text
//! = core.v1.PodSpec
//! volumes 1 []@core.v1.Volume merge=name retain map=name
//! ```
//!
//! A field without a name is embedded: flattened in JSON, a message of its own on the wire.

use anyhow::{Context, Result, bail};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// The group versions that are served, as (folder, name in the table).
const PACKAGES: &[(&str, &str)] = &[
    ("core/v1", "core.v1"),
    ("apps/v1", "apps.v1"),
    ("batch/v1", "batch.v1"),
    ("autoscaling/v1", "autoscaling.v1"),
    ("autoscaling/v2", "autoscaling.v2"),
    ("policy/v1", "policy.v1"),
    ("networking/v1", "networking.v1"),
    ("discovery/v1", "discovery.v1"),
    ("rbac/v1", "rbac.v1"),
    ("storage/v1", "storage.v1"),
    ("scheduling/v1", "scheduling.v1"),
    ("coordination/v1", "coordination.v1"),
    ("events/v1", "events.v1"),
    ("authentication/v1", "authentication.v1"),
    ("authorization/v1", "authorization.v1"),
    ("certificates/v1", "certificates.v1"),
    ("admissionregistration/v1", "admissionregistration.v1"),
    ("node/v1", "node.v1"),
];

/// The same of kinds that others bring: (flag whose directory it is in, folder, name in the table).
const EXTENSIONS: &[(&str, &str, &str)] = &[
    ("--gateway-api", "apis/v1", "gateway.v1"),
    ("--metallb", "api/v1beta1", "metallb.v1beta1"),
    ("--metallb", "api/v1beta2", "metallb.v1beta2"),
];

struct GoField {
    json: String,
    number: u32,
    go_type: String,
    flags: Vec<String>,
    embedded: bool,
}

struct Package {
    name: String,
    imports: BTreeMap<String, String>,
    aliases: BTreeMap<String, String>,
    /// Markers of aliases: the words that a type of words has.
    marked: BTreeMap<String, Vec<String>>,
    structs: BTreeMap<String, Vec<GoField>>,
}

pub fn run(args: &[String]) -> Result<()> {
    let arg = |name: &str| {
        args.iter()
            .position(|a| a == name)
            .and_then(|i| args.get(i + 1))
            .with_context(|| format!("{name} DIR is missing"))
    };
    let (api, machinery) = (arg("--api")?, arg("--apimachinery")?);
    let of_others = args.iter().any(|arg| arg == EXTENSIONS[0].0);
    let mut packages = BTreeMap::new();
    // Kinds of others use little of these.
    for (folder, name) in PACKAGES.iter().filter(|(_, name)| !of_others || *name == "core.v1") {
        let mut package = Package::named(name);
        parse(&Path::new(api).join(folder).join("types.go"), &mut package)?;
        packages.insert(name.to_string(), package);
    }
    let mut meta = Package::named("meta.v1");
    parse(&Path::new(machinery).join("pkg/apis/meta/v1/types.go"), &mut meta)?;
    packages.insert("meta.v1".into(), meta);
    for (flag, folder, name) in EXTENSIONS.iter().filter(|_| of_others) {
        let mut package = Package::named(name);
        for file in type_files(&Path::new(arg(flag)?).join(folder))? {
            parse(&file, &mut package)?;
        }
        packages.insert(name.to_string(), package);
    }
    let is_wanted = |name: &str| !of_others || EXTENSIONS.iter().any(|(_, _, wanted)| *wanted == name);
    let out = render(&packages, is_wanted)?;
    let file = if of_others { "extensions.txt" } else { "table.txt" };
    std::fs::write(Path::new(env!("CARGO_MANIFEST_DIR")).join("../crates/api/src/schema").join(file), out)?;
    Ok(())
}

impl Package {
    fn named(name: &str) -> Package {
        let (imports, aliases, marked, structs) = Default::default();
        Package { name: name.into(), imports, aliases, marked, structs }
    }
}

fn type_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let listed = std::fs::read_dir(folder).with_context(|| folder.display().to_string())?;
    let mut files: Vec<PathBuf> = listed.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    files.retain(|file| file.to_string_lossy().ends_with("_types.go"));
    files.sort();
    Ok(files)
}

fn parse(path: &Path, package: &mut Package) -> Result<()> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut lines = text.lines();
    let mut markers: Vec<String> = Vec::new();
    while let Some(line) = lines.next() {
        let trimmed = line.trim();
        if let Some(marker) = marker(trimmed) {
            markers.push(marker.to_owned());
            continue;
        }
        if let Some(path) = trimmed.strip_suffix('"').and_then(|t| t.split('"').nth(1)) {
            let alias = trimmed.split('"').next().unwrap_or("").trim().trim_start_matches("import").trim();
            let last = path.rsplit('/').next().unwrap_or(path);
            package.imports.insert(if alias.is_empty() { last.into() } else { alias.into() }, path.into());
        }
        let Some(rest) = trimmed.strip_prefix("type ") else {
            // Markers stand among the comment of their type.
            if !trimmed.starts_with("//") {
                markers.clear();
            }
            continue;
        };
        let own = std::mem::take(&mut markers);
        let mut words = rest.split_whitespace();
        let (Some(type_name), Some(shape)) = (words.next(), words.next()) else { continue };
        if shape != "struct" {
            package.aliases.insert(type_name.into(), rest[type_name.len()..].trim().trim_start_matches("= ").into());
            package.marked.insert(type_name.into(), own);
            continue;
        }
        let mut fields = Vec::new();
        if !rest.ends_with('{') {
            package.structs.insert(type_name.into(), fields);
            continue;
        }
        let mut in_comment = false;
        for line in lines.by_ref() {
            let line = line.trim();
            in_comment |= line.starts_with("/*");
            if in_comment {
                in_comment = !line.ends_with("*/");
                continue;
            }
            if line == "}" {
                break;
            }
            if let Some(marker) = marker(line) {
                markers.push(marker.to_string());
            } else if line.is_empty() {
                // A blank line separates a field's markers from a free-standing comment.
            } else if !line.starts_with("//") {
                fields.extend(field(line, &markers)?);
                markers.clear();
            }
        }
        package.structs.insert(type_name.into(), fields);
    }
    Ok(())
}

fn marker(line: &str) -> Option<&str> {
    line.strip_prefix("// +").or_else(|| line.strip_prefix("//+"))
}

fn field(line: &str, markers: &[String]) -> Result<Option<GoField>> {
    let Some((declaration, tags)) = line.split_once('`') else { bail!("a field without tags: {line}") };
    let tags = tags.split('`').next().unwrap_or("");
    let tag = |key: &str| {
        let at = tags.find(&format!("{key}:\""))? + key.len() + 2;
        tags[at..].split('"').next()
    };
    let mut words = declaration.split_whitespace();
    let first = words.next().unwrap_or("").to_string();
    let second = words.collect::<Vec<_>>().join(" ");
    let embedded = second.is_empty();
    let go_type = if embedded { first } else { second };
    let json = tag("json").unwrap_or("");
    let mut json_parts = json.split(',');
    let name = json_parts.next().unwrap_or("");
    if name == "-" {
        return Ok(None);
    }
    let omit = json.contains("omitempty");
    let number = tag("protobuf").and_then(|t| t.split(',').nth(1)).and_then(|n| n.parse().ok()).unwrap_or(0);
    let mut flags = Vec::new();
    if let Some(strategy) = tag("patchStrategy") {
        if strategy.contains("merge") {
            flags.push(match tag("patchMergeKey") {
                Some(key) => format!("merge={key}"),
                None => "merge".into(),
            });
        }
        if strategy.contains("retainKeys") {
            flags.push("retain".into());
        }
    }
    flags.extend(markers.iter().filter_map(|marker| bound(marker)));
    let keys: Vec<&str> = markers.iter().filter_map(|m| m.strip_prefix("listMapKey=")).collect();
    for marker in markers {
        match marker.as_str() {
            "listType=map" => flags.push(format!("map={}", keys.join(","))),
            "listType=set" => flags.push("set".into()),
            "mapType=atomic" | "structType=atomic" => flags.push("atomic".into()),
            _ => {}
        }
    }
    let optional = markers.iter().any(|m| m == "optional" || m.starts_with("k8s:optional"));
    if !omit && !optional && !embedded {
        flags.push("required".into());
    }
    if go_type.starts_with('*') {
        flags.push("ptr".into());
    }
    Ok(Some(GoField { json: name.into(), number, go_type, flags, embedded: name.is_empty() }))
}

/// What a marker of a custom resource says of a value: its default as JSON without spaces, its words, its bounds.
fn bound(marker: &str) -> Option<String> {
    let (name, value) = marker.strip_prefix("kubebuilder:")?.split_once('=')?;
    Some(match name.trim_end_matches(':') {
        "default" => format!("default={}", loose(value).to_string().replace(' ', "\\u0020")),
        "validation:Enum" => format!("enum={}", value.replace('"', "")),
        "validation:Minimum" => format!("min={value}"),
        "validation:Maximum" => format!("max={value}"),
        "validation:MinItems" => format!("minitems={value}"),
        "validation:MaxItems" => format!("maxitems={value}"),
        _ => return None,
    })
}

/// Values as markers write them: names and words need no quotes, lists have braces.
fn loose(text: &str) -> serde_json::Value {
    let mut rest = text.trim();
    loose_value(&mut rest)
}

fn loose_value(rest: &mut &str) -> serde_json::Value {
    use serde_json::{Map, Value};
    *rest = rest.trim_start();
    if let Some(inner) = rest.strip_prefix('{') {
        *rest = inner.trim_start();
        let (mut list, mut map) = (Vec::new(), Map::new());
        while !rest.is_empty() && !rest.starts_with('}') {
            let value = loose_value(rest);
            *rest = rest.trim_start();
            match (rest.strip_prefix(':'), value) {
                (Some(after), Value::String(key)) => {
                    *rest = after;
                    map.insert(key, loose_value(rest));
                }
                (_, value) => list.push(value),
            }
            *rest = rest.trim_start().trim_start_matches(',').trim_start();
        }
        *rest = rest.strip_prefix('}').unwrap_or(rest);
        return if map.is_empty() { Value::Array(list) } else { Value::Object(map) };
    }
    if let Some(inner) = rest.strip_prefix('"') {
        let (word, after) = inner.split_once('"').unwrap_or((inner, ""));
        *rest = after;
        return Value::String(word.to_owned());
    }
    let end = rest.find([',', '}', ':']).unwrap_or(rest.len());
    let (word, after) = rest.split_at(end);
    *rest = after;
    serde_json::from_str(word.trim()).unwrap_or_else(|_| Value::String(word.trim().to_owned()))
}

fn render(packages: &BTreeMap<String, Package>, is_wanted: impl Fn(&str) -> bool) -> Result<String> {
    let mut out = String::from("# Generated by `cargo xtask schema`; facts only.\n");
    for package in packages.values().filter(|package| is_wanted(&package.name)) {
        for (name, fields) in &package.structs {
            writeln!(out, "= {}.{name}", package.name)?;
            for field in fields {
                let ty = resolve(packages, package, field.go_type.trim_start_matches('*'))
                    .with_context(|| format!("{}.{name}.{}", package.name, field.json))?;
                let label = if field.embedded { "-" } else { &field.json };
                write!(out, "{label} {} {ty}", field.number)?;
                let of_type = package.marked.get(field.go_type.trim_start_matches('*')).into_iter().flatten();
                let of_type = of_type.filter_map(|marker| bound(marker));
                for flag in field.flags.iter().cloned().chain(of_type) {
                    write!(out, " {flag}")?;
                }
                out.push('\n');
            }
        }
    }
    Ok(out)
}

/// The table's word for a Go type, following aliases across packages.
fn resolve(packages: &BTreeMap<String, Package>, package: &Package, go: &str) -> Result<String> {
    let go = go.trim().trim_start_matches('*');
    if let Some(rest) = go.strip_prefix("[]") {
        return Ok(if rest == "byte" { "bytes".into() } else { format!("[]{}", resolve(packages, package, rest)?) });
    }
    if let Some(rest) = go.strip_prefix("map[") {
        let (_, value) = rest.split_once(']').context("map without value")?;
        return Ok(format!("{{}}{}", resolve(packages, package, value)?));
    }
    let word = match go {
        "string" => "string",
        "int32" | "uint16" | "uint8" => "int32",
        "int64" | "int" | "uint32" => "int64",
        "bool" => "bool",
        "float64" => "double",
        "Time" | "metav1.Time" | "v1.Time" => "time",
        "MicroTime" | "metav1.MicroTime" => "microtime",
        "Duration" | "metav1.Duration" => "string",
        "FieldsV1" => "fields",
        "resource.Quantity" => "quantity",
        "intstr.IntOrString" => "intorstring",
        "runtime.RawExtension" | "runtime.Object" | "interface{}" => "raw",
        _ => "",
    };
    let is_own_struct = package.structs.contains_key(go) && !matches!(go, "Time" | "MicroTime" | "FieldsV1");
    if !word.is_empty() && !is_own_struct {
        return Ok(word.into());
    }
    let (target, name) = match go.split_once('.') {
        None => (package, go),
        Some((alias, name)) => {
            let path = package.imports.get(alias).with_context(|| format!("unknown import {alias}"))?;
            if path.ends_with("apimachinery/pkg/types") {
                return Ok("string".into());
            }
            let wanted = match path.strip_prefix("k8s.io/api/") {
                Some(rest) => rest.replace('/', "."),
                None if path.ends_with("meta/v1") => "meta.v1".into(),
                None => bail!("unknown package {path}"),
            };
            (packages.get(&wanted).with_context(|| format!("package {wanted} is not served"))?, name)
        }
    };
    if target.structs.contains_key(name) {
        return Ok(format!("@{}.{name}", target.name));
    }
    let alias = target.aliases.get(name).with_context(|| format!("unknown type {}.{name}", target.name))?;
    resolve(packages, target, alias)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn markers_are_read_as_their_authors_mean_them() {
        assert_eq!(loose("Same"), json!("Same"));
        assert_eq!(loose("\"/\""), json!("/"));
        assert_eq!(loose("302"), json!(302));
        assert_eq!(loose("false"), json!(false));
        assert_eq!(loose("{namespaces:{from: Same}}"), json!({"namespaces": {"from": "Same"}}));
        assert_eq!(
            loose("{{path:{ type: \"PathPrefix\", value: \"/\"}}}"),
            json!([{"path": {"type": "PathPrefix", "value": "/"}}])
        );
        assert_eq!(
            bound("kubebuilder:default={{type: \"A\", message: \"Waiting for\"}}").as_deref(),
            Some(r#"default=[{"message":"Waiting\u0020for","type":"A"}]"#)
        );
        assert_eq!(bound("kubebuilder:validation:Enum=http;https").as_deref(), Some("enum=http;https"));
    }
}
