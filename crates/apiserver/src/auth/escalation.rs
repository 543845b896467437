//! Nobody gives away rights they do not have: what a role or binding would grant is compared with what its writer holds.

use super::Identity;
use super::rbac::{Attributes, Rule};
use crate::registry::Registry;
use api::{ObjectExt, Status};
use serde_json::Value;

const GROUP: &str = "rbac.authorization.k8s.io";

/// Whether `who` may write this Role, ClusterRole or binding.
///
/// # Errors
/// 403 when it would grant more than the writer holds, and neither `escalate` nor `bind` allows that; 404 for a binding
/// to a role that is not there.
pub fn check(registry: &Registry, who: &Identity, object: &Value, old: Option<&Value>) -> Result<(), Status> {
    if old.is_some_and(|old| same_but_for_collection(object, old)) {
        return Ok(());
    }
    let plural = format!("{}s", object.text("/kind").to_lowercase());
    let refused = |why: &str| Err(Status::refused(GROUP, &plural, object.name(), why));
    let may = |verb: &str, plural: &str, name: &str| {
        let asked = Attributes {
            verb: verb.into(),
            group: GROUP.into(),
            plural: plural.into(),
            namespace: object.namespace().into(),
            name: name.into(),
            ..Attributes::default()
        };
        registry.rbac.allows(registry, who, &asked)
    };
    let granted = if plural.ends_with("roles") {
        if may("escalate", &plural, object.name()) {
            return Ok(());
        }
        let aggregates = |o: &Value| o.get("aggregationRule").is_some_and(|r| !r.is_null());
        if aggregates(object) || old.is_some_and(aggregates) {
            let held = registry.rbac.rules(registry, who, object.namespace());
            if !missing(&held, &everything()).is_empty() {
                return refused("must have cluster-admin privileges to use the aggregationRule");
            }
        }
        Rule::list(object)
    } else {
        let (kind, name) = (object.text("/roleRef/kind"), object.text("/roleRef/name"));
        let (roles, namespace) = match kind {
            "Role" => ("roles", object.namespace()),
            "ClusterRole" => ("clusterroles", ""),
            // No right comes of it, and validation says what is wrong.
            _ => return Ok(()),
        };
        if may("bind", roles, name) {
            return Ok(());
        }
        match registry.rbac.role(registry, namespace, name) {
            Some(rules) => rules.to_vec(),
            None => return Err(Status::not_found(GROUP, roles, name)),
        }
    };
    let missing = missing(&registry.rbac.rules(registry, who, object.namespace()), &granted);
    if missing.is_empty() {
        return Ok(());
    }
    refused(&format!(
        "user {:?} (groups=[{}]) is attempting to grant RBAC permissions not currently held:\n{}",
        who.user,
        quoted(&who.groups),
        compact(&missing).join("\n")
    ))
}

/// Whether only what the garbage collector changes is changed.
fn same_but_for_collection(object: &Value, old: &Value) -> bool {
    let strip = |v: &Value| {
        let mut v = v.clone();
        for field in ["ownerReferences", "finalizers", "managedFields", "resourceVersion"] {
            v.metadata_mut().remove(field);
        }
        v
    };
    strip(object) == strip(old)
}

fn everything() -> Vec<Rule> {
    let any = || vec!["*".to_string()];
    vec![
        Rule { verbs: any(), groups: any(), resources: any(), ..Rule::default() },
        Rule { verbs: any(), paths: any(), ..Rule::default() },
    ]
}

/// The parts of `wanted`, each a single right, that no rule of `held` covers.
pub fn missing(held: &[Rule], wanted: &[Rule]) -> Vec<Rule> {
    wanted.iter().flat_map(parts).filter(|part| !held.iter().any(|rule| covers(rule, part))).collect()
}

/// A rule as rules of one verb on one thing each.
fn parts(rule: &Rule) -> Vec<Rule> {
    let mut parts = Vec::new();
    for verb in &rule.verbs {
        let verbs = || vec![verb.clone()];
        for path in &rule.paths {
            parts.push(Rule { verbs: verbs(), paths: vec![path.clone()], ..Rule::default() });
        }
        for (group, resource) in rule.groups.iter().flat_map(|g| rule.resources.iter().map(move |r| (g, r))) {
            let part = Rule {
                verbs: verbs(),
                groups: vec![group.clone()],
                resources: vec![resource.clone()],
                ..Rule::default()
            };
            if rule.names.is_empty() {
                parts.push(part);
            } else {
                parts.extend(rule.names.iter().map(|n| Rule { names: vec![n.clone()], ..part.clone() }));
            }
        }
    }
    parts
}

fn covers(held: &Rule, part: &Rule) -> bool {
    let all = |held: &[String], part: &[String]| held.iter().any(|h| h == "*") || part.iter().all(|p| held.contains(p));
    if !all(&held.verbs, &part.verbs) {
        return false;
    }
    if !part.paths.is_empty() {
        return part.paths.iter().all(|path| {
            held.paths.iter().any(|h| h == path || h.strip_suffix('*').is_some_and(|prefix| path.starts_with(prefix)))
        });
    }
    let resource = |wanted: &String| {
        let below = wanted.split_once('/').map(|(_, sub)| format!("*/{sub}"));
        held.resources.iter().any(|h| h == "*" || h == wanted || below.as_ref() == Some(h))
    };
    let names = held.names.is_empty() || !part.names.is_empty() && part.names.iter().all(|n| held.names.contains(n));
    all(&held.groups, &part.groups) && part.resources.iter().all(resource) && names
}

/// Rights on the same thing as one line, as Kubernetes prints them.
fn compact(parts: &[Rule]) -> Vec<String> {
    let mut merged: Vec<Rule> = Vec::new();
    for part in parts {
        let same =
            |m: &&mut Rule| Rule { verbs: Vec::new(), ..(**m).clone() } == Rule { verbs: Vec::new(), ..part.clone() };
        match merged.iter_mut().find(same) {
            Some(rule) => rule.verbs.extend(part.verbs.iter().cloned()),
            None => merged.push(part.clone()),
        }
    }
    let mut lines: Vec<String> = merged.iter().map(line).collect();
    lines.sort();
    lines
}

fn line(rule: &Rule) -> String {
    let fields: Vec<String> = [
        ("APIGroups", &rule.groups),
        ("Resources", &rule.resources),
        ("NonResourceURLs", &rule.paths),
        ("ResourceNames", &rule.names),
        ("Verbs", &rule.verbs),
    ]
    .into_iter()
    .filter(|(_, list)| !list.is_empty())
    .map(|(name, list)| format!("{name}:[{}]", quoted(list)))
    .collect();
    format!("{{{}}}", fields.join(", "))
}

fn quoted(list: &[String]) -> String {
    list.iter().map(|t| format!("{t:?}")).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> Rule {
        let list = |t: &str| t.split(',').filter(|t| !t.is_empty()).map(|t| t.replace("core", "")).collect::<Vec<_>>();
        let fields: Vec<&str> = text.split_whitespace().collect();
        match fields.as_slice() {
            [verbs, path] => Rule { verbs: list(verbs), paths: list(path), ..Rule::default() },
            [verbs, groups, resources, names @ ..] => Rule {
                verbs: list(verbs),
                groups: list(groups),
                resources: list(resources),
                names: names.first().map(|n| list(n)).unwrap_or_default(),
                ..Rule::default()
            },
            _ => panic!("a rule is verbs and path, or verbs, groups, resources and names"),
        }
    }

    #[test]
    fn what_is_missing_is_said() {
        for (held, wanted, expected) in [
            ("* * *", "get core pods", ""),
            ("get core pods", "get core pods a", ""),
            ("get core pods a", "get core pods", r#"{APIGroups:[""], Resources:["pods"], Verbs:["get"]}"#),
            ("get core pods", "get core pods/log", r#"{APIGroups:[""], Resources:["pods/log"], Verbs:["get"]}"#),
            ("get core */log", "get core pods/log", ""),
            ("get,list core pods", "* core pods", r#"{APIGroups:[""], Resources:["pods"], Verbs:["*"]}"#),
            (
                "get core pods",
                "get,list,watch core pods",
                r#"{APIGroups:[""], Resources:["pods"], Verbs:["list" "watch"]}"#,
            ),
            ("get /api/*", "get /api/v1", ""),
            ("get /api", "get /api/*", r#"{NonResourceURLs:["/api/*"], Verbs:["get"]}"#),
        ] {
            let found = compact(&missing(&[rule(held)], &[rule(wanted)])).join("\n");
            assert_eq!(found, expected, "{held} does {wanted}");
        }
    }
}
