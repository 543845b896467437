//! `cargo xtask schema --api DIR --apimachinery DIR` writes the schema table of the built-in kinds.
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
use std::path::Path;

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
    let mut packages = BTreeMap::new();
    for (folder, name) in PACKAGES {
        packages.insert(name.to_string(), parse(&Path::new(api).join(folder).join("types.go"), name)?);
    }
    let meta = Path::new(machinery).join("pkg/apis/meta/v1/types.go");
    packages.insert("meta.v1".into(), parse(&meta, "meta.v1")?);
    let out = render(&packages)?;
    let target = concat!(env!("CARGO_MANIFEST_DIR"), "/../crates/api/src/schema/table.txt");
    std::fs::write(target, out)?;
    Ok(())
}

fn parse(path: &Path, name: &str) -> Result<Package> {
    let text = std::fs::read_to_string(path).with_context(|| path.display().to_string())?;
    let mut package =
        Package { name: name.into(), imports: BTreeMap::new(), aliases: BTreeMap::new(), structs: BTreeMap::new() };
    let mut lines = text.lines();
    let mut markers: Vec<String> = Vec::new();
    while let Some(line) = lines.next() {
        let trimmed = line.trim();
        if let Some(path) = trimmed.strip_suffix('"').and_then(|t| t.split('"').nth(1)) {
            let alias = trimmed.split('"').next().unwrap_or("").trim().trim_start_matches("import").trim();
            let last = path.rsplit('/').next().unwrap_or(path);
            package.imports.insert(if alias.is_empty() { last.into() } else { alias.into() }, path.into());
        }
        let Some(rest) = trimmed.strip_prefix("type ") else { continue };
        let mut words = rest.split_whitespace();
        let (Some(type_name), Some(shape)) = (words.next(), words.next()) else { continue };
        if shape != "struct" {
            package.aliases.insert(type_name.into(), rest[type_name.len()..].trim().trim_start_matches("= ").into());
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
            if let Some(marker) = line.strip_prefix("// +").or_else(|| line.strip_prefix("//+")) {
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
    Ok(package)
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

fn render(packages: &BTreeMap<String, Package>) -> Result<String> {
    let mut out = String::from("# Generated by `cargo xtask schema`; facts only.\n");
    for package in packages.values() {
        for (name, fields) in &package.structs {
            writeln!(out, "= {}.{name}", package.name)?;
            for field in fields {
                let ty = resolve(packages, package, field.go_type.trim_start_matches('*'))
                    .with_context(|| format!("{}.{name}.{}", package.name, field.json))?;
                let label = if field.embedded { "-" } else { &field.json };
                write!(out, "{label} {} {ty}", field.number)?;
                for flag in &field.flags {
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
        "int32" => "int32",
        "int64" | "int" => "int64",
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
