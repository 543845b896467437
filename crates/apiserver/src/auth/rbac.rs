//! RBAC: who may do what, from Roles and bindings. The rules of each subject are gathered once per change of those kinds.

use super::Identity;
use crate::registry::Registry;
use api::{ObjectExt, kinds};
use serde_json::Value;
use std::collections::HashMap;
use std::sync::{Arc, RwLock};

/// What somebody wants to do.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Attributes {
    pub verb: String,
    pub group: String,
    pub plural: String,
    pub subresource: String,
    pub namespace: String,
    pub name: String,
    /// Set for requests that are for no resource.
    pub path: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    pub verbs: Vec<String>,
    pub groups: Vec<String>,
    pub resources: Vec<String>,
    pub names: Vec<String>,
    pub paths: Vec<String>,
}

fn holds(list: &[String], value: &str) -> bool {
    list.iter().any(|item| item == "*" || item == value)
}

impl Rule {
    fn parse(value: &Value) -> Rule {
        let list = |key: &str| {
            let items = value.get(key).and_then(Value::as_array);
            items.map(|l| l.iter().filter_map(Value::as_str).map(str::to_string).collect()).unwrap_or_default()
        };
        Rule {
            verbs: list("verbs"),
            groups: list("apiGroups"),
            resources: list("resources"),
            names: list("resourceNames"),
            paths: list("nonResourceURLs"),
        }
    }

    /// The rules of a role.
    pub fn list(role: &Value) -> Vec<Rule> {
        role.get("rules").and_then(Value::as_array).into_iter().flatten().map(Rule::parse).collect()
    }

    fn allows(&self, asked: &Attributes) -> bool {
        if !holds(&self.verbs, &asked.verb) {
            return false;
        }
        if let Some(path) = &asked.path {
            return self.paths.iter().any(|p| match p.strip_suffix('*') {
                Some(prefix) => path.starts_with(prefix),
                None => p == path,
            });
        }
        let resource = if asked.subresource.is_empty() {
            self.resources.iter().any(|r| r == "*" || *r == asked.plural)
        } else {
            let exact = format!("{}/{}", asked.plural, asked.subresource);
            let any_parent = format!("*/{}", asked.subresource);
            self.resources.iter().any(|r| r == "*" || *r == exact || *r == any_parent)
        };
        resource
            && holds(&self.groups, &asked.group)
            && (self.names.is_empty() || !asked.name.is_empty() && self.names.contains(&asked.name))
    }
}

/// One grant: rules, in one namespace or (`None`) in all.
struct Grant {
    namespace: Option<String>,
    rules: Arc<Vec<Rule>>,
}

#[derive(Default)]
struct Index {
    /// By `u:NAME`, `g:NAME`.
    grants: HashMap<String, Vec<Grant>>,
    /// By namespace (none for ClusterRoles) and name.
    roles: HashMap<(String, String), Arc<Vec<Rule>>>,
}

/// The authorizer.
#[derive(Default)]
pub struct Rbac {
    index: RwLock<Option<([u64; 4], Arc<Index>)>>,
}

impl Rbac {
    /// Whether RBAC allows it.
    pub fn allows(&self, registry: &Registry, who: &Identity, asked: &Attributes) -> bool {
        if who.is_master() {
            return true;
        }
        let index = self.index(registry);
        subjects(who).any(|subject| {
            index.grants.get(&subject).into_iter().flatten().any(|grant| {
                let in_scope = match &grant.namespace {
                    None => true,
                    Some(namespace) => asked.path.is_none() && *namespace == asked.namespace,
                };
                in_scope && grant.rules.iter().any(|rule| rule.allows(asked))
            })
        })
    }

    /// Every rule somebody has in a namespace.
    pub fn rules(&self, registry: &Registry, who: &Identity, namespace: &str) -> Vec<Rule> {
        let index = self.index(registry);
        let mut all = Vec::new();
        for subject in subjects(who) {
            for grant in index.grants.get(&subject).into_iter().flatten() {
                if grant.namespace.as_ref().is_none_or(|n| n == namespace) {
                    all.extend(grant.rules.iter().cloned());
                }
            }
        }
        all
    }

    /// The rules of a role; the namespace is empty for a ClusterRole.
    pub fn role(&self, registry: &Registry, namespace: &str, name: &str) -> Option<Arc<Vec<Rule>>> {
        self.index(registry).roles.get(&(namespace.to_string(), name.to_string())).cloned()
    }

    fn index(&self, registry: &Registry) -> Arc<Index> {
        let stamps = [&kinds::ROLES, &kinds::ROLE_BINDINGS, &kinds::CLUSTER_ROLES, &kinds::CLUSTER_ROLE_BINDINGS]
            .map(|r| registry.cache.last_change(registry.row(r)));
        if let Some((at, index)) = &*self.index.read().expect("no holder of the lock panics")
            && *at == stamps
        {
            return index.clone();
        }
        let fresh = Arc::new(build(registry));
        *self.index.write().expect("no holder of the lock panics") = Some((stamps, fresh.clone()));
        fresh
    }
}

fn subjects(who: &Identity) -> impl Iterator<Item = String> {
    std::iter::once(format!("u:{}", who.user)).chain(who.groups.iter().map(|g| format!("g:{g}")))
}

fn build(registry: &Registry) -> Index {
    let mut roles: HashMap<(String, String), Arc<Vec<Rule>>> = HashMap::new();
    for resource in [&kinds::ROLES, &kinds::CLUSTER_ROLES] {
        let (_, items) = registry.cache.list(registry.row(resource), "");
        let objects: Vec<Value> = items.iter().map(|s| s.parse()).collect();
        for role in &objects {
            let mut rules = Rule::list(role);
            rules.extend(aggregated(role, &objects));
            roles.insert((role.namespace().into(), role.name().into()), Arc::new(rules));
        }
    }
    let mut index = Index::default();
    for (resource, cluster) in [(&kinds::ROLE_BINDINGS, false), (&kinds::CLUSTER_ROLE_BINDINGS, true)] {
        let (_, items) = registry.cache.list(registry.row(resource), "");
        for stored in items {
            let binding = stored.parse();
            let namespace = (!cluster).then(|| binding.namespace().to_string());
            let role_namespace = match binding.text("/roleRef/kind") {
                "Role" => binding.namespace().to_string(),
                _ => String::new(),
            };
            let Some(rules) = roles.get(&(role_namespace, binding.text("/roleRef/name").to_string())) else { continue };
            for subject in binding.get("subjects").and_then(Value::as_array).into_iter().flatten() {
                let name = subject.text("/name");
                let key = match subject.text("/kind") {
                    "User" => format!("u:{name}"),
                    "Group" => format!("g:{name}"),
                    "ServiceAccount" => format!("u:system:serviceaccount:{}:{name}", subject.text("/namespace")),
                    _ => continue,
                };
                let grant = Grant { namespace: namespace.clone(), rules: rules.clone() };
                index.grants.entry(key).or_default().push(grant);
            }
        }
    }
    index.roles = roles;
    index
}

/// The rules of all roles that an aggregation rule selects.
fn aggregated(role: &Value, all: &[Value]) -> Vec<Rule> {
    let selectors = role.pointer("/aggregationRule/clusterRoleSelectors").and_then(Value::as_array);
    let mut rules = Vec::new();
    for selector in selectors.into_iter().flatten() {
        let Some(selector) =
            serde_json::from_value(selector.clone()).ok().and_then(|s| api::LabelSelector::from_spec(&s).ok())
        else {
            continue;
        };
        for other in all.iter().filter(|o| o.name() != role.name() && selector.matches_object(o)) {
            rules.extend(Rule::list(other));
        }
    }
    rules
}
