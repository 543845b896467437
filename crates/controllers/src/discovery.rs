//! Which kinds the API serves, built in or not.

use api::Resource;
use reconcile::api::request;
use reconcile::{ApiError, Client};
use serde::Deserialize;
use std::collections::BTreeSet;
use std::sync::Mutex;

/// Stands for all kinds that discovery names, where a list of kinds is asked for.
pub const EVERY_KIND: &[Resource] = &[Resource { group: "*", version: "*", plural: "*", kind: "*", namespaced: true }];

/// A kind, and what can be done with its objects.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    pub resource: Resource,
    pub verbs: Vec<String>,
}

impl Served {
    pub fn can(&self, verbs: &[&str]) -> bool {
        verbs.iter().all(|verb| self.verbs.iter().any(|v| v == verb))
    }
}

#[derive(Deserialize)]
struct ResourceList {
    #[serde(default)]
    resources: Vec<ListedResource>,
}

#[derive(Deserialize)]
struct ListedResource {
    name: String,
    kind: String,
    #[serde(default)]
    namespaced: bool,
    #[serde(default)]
    verbs: Vec<String>,
}

#[derive(Deserialize)]
struct GroupList {
    #[serde(default)]
    groups: Vec<Group>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Group {
    name: String,
    #[serde(default)]
    versions: Vec<Version>,
    preferred_version: Option<Version>,
}

#[derive(Deserialize)]
struct Version {
    version: String,
}

/// Every kind once, in its preferred version.
pub async fn served(client: &Client) -> Result<Vec<Served>, ApiError> {
    let core: ResourceList = request(client, "GET", "/api/v1", "", None).await?;
    let mut served = Vec::new();
    let mut seen = BTreeSet::new();
    collect("", "v1", core, &mut seen, &mut served);
    let groups: GroupList = request(client, "GET", "/apis", "", None).await?;
    for group in groups.groups {
        let versions = group.preferred_version.iter().chain(&group.versions);
        let mut asked = BTreeSet::new();
        for version in versions.filter(|v| asked.insert(v.version.clone())) {
            let path = format!("/apis/{}/{}", group.name, version.version);
            match request::<ResourceList>(client, "GET", &path, "", None).await {
                Ok(list) => collect(&group.name, &version.version, list, &mut seen, &mut served),
                // A group may go between the two requests.
                Err(error) if error.is_not_found() => {}
                Err(error) => return Err(error),
            }
        }
    }
    Ok(served)
}

fn collect(
    group: &str,
    version: &str,
    list: ResourceList,
    seen: &mut BTreeSet<(String, String)>,
    served: &mut Vec<Served>,
) {
    for listed in list.resources {
        let is_subresource = listed.name.contains('/');
        if !is_subresource && seen.insert((group.to_string(), listed.name.clone())) {
            let resource = Resource {
                group: interned(group),
                version: interned(version),
                plural: interned(&listed.name),
                kind: interned(&listed.kind),
                namespaced: listed.namespaced,
            };
            served.push(Served { resource, verbs: listed.verbs });
        }
    }
}

/// Words that live as long as the process. A `Resource` is made of such; kinds are few and rarely new.
static WORDS: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());

fn interned(word: &str) -> &'static str {
    let mut words = WORDS.lock().expect("no holder of this lock panics");
    if let Some(&known) = words.get(word) {
        return known;
    }
    let word: &'static str = Box::leak(word.to_string().into_boxed_str());
    words.insert(word);
    word
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn kinds_are_found_once_and_subresources_never() {
        let list: ResourceList = serde_json::from_value(json!({"resources": [
            {"name": "pods", "kind": "Pod", "namespaced": true, "verbs": ["list", "delete"]},
            {"name": "pods/log", "kind": "Pod", "namespaced": true, "verbs": ["get"]},
            {"name": "pods", "kind": "Pod", "namespaced": true},
        ]}))
        .expect("a list");
        let (mut seen, mut served) = (BTreeSet::new(), Vec::new());
        collect("", "v1", list, &mut seen, &mut served);
        assert_eq!(served.len(), 1);
        assert_eq!(served[0].resource, api::kinds::PODS);
        assert!(served[0].can(&["list", "delete"]) && !served[0].can(&["watch"]));
    }
}
