//! Which kinds the server has, and which of them a word on the command line means.

use anyhow::{Context, bail};
use api::ObjectExt;
use serde_json::Value;

use super::session::{Session, encode, fail};

const AGGREGATED: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList,application/json";

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kind {
    pub group: String,
    pub version: String,
    pub plural: String,
    pub singular: String,
    pub kind: String,
    pub short_names: Vec<String>,
    pub categories: Vec<String>,
    pub namespaced: bool,
    pub verbs: Vec<String>,
}

impl Kind {
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.clone() } else { format!("{}/{}", self.group, self.version) }
    }

    /// The path of the collection; an empty namespace means all of them.
    pub fn path(&self, namespace: &str) -> String {
        let root = if self.group.is_empty() { "/api" } else { "/apis" };
        let place = match namespace {
            namespace if self.namespaced && !namespace.is_empty() => format!("/namespaces/{}", encode(namespace)),
            _ => String::new(),
        };
        format!("{root}/{}{place}/{}", self.api_version(), self.plural)
    }

    pub fn object_path(&self, namespace: &str, name: &str) -> String {
        format!("{}/{}", self.path(namespace), encode(name))
    }

    /// `pod`, `deployment.apps`: what stands before the slash when an object is named.
    pub fn label(&self) -> String {
        if self.group.is_empty() { self.singular.clone() } else { format!("{}.{}", self.singular, self.group) }
    }

    fn can(&self, verb: &str) -> bool {
        self.verbs.iter().any(|v| v == verb)
    }

    fn is_called(&self, word: &str) -> bool {
        self.plural == word || self.singular == word || self.kind.to_lowercase() == word
    }
}

/// All kinds of a server, in its order: the core group first, each group's preferred version first.
#[derive(Debug, Clone, Default)]
pub struct Kinds(Vec<Kind>);

impl Kinds {
    pub async fn discover(session: &Session) -> anyhow::Result<Kinds> {
        let mut kinds = Kinds::default();
        for path in ["/api", "/apis"] {
            let document = session.get(path, AGGREGATED).await.map_err(fail)?;
            kinds.read(&document)?;
        }
        Ok(kinds)
    }

    fn read(&mut self, document: &Value) -> anyhow::Result<()> {
        if document.text("/kind") != "APIGroupDiscoveryList" {
            bail!("the server does not know aggregated discovery (Kubernetes 1.27 and later do); use kubectl with it");
        }
        let list = |value: &Value, key: &str| value.get(key).and_then(Value::as_array).cloned().unwrap_or_default();
        let words = |value: &Value, key: &str| {
            list(value, key).iter().filter_map(Value::as_str).map(str::to_string).collect::<Vec<_>>()
        };
        for group in list(document, "items") {
            for version in list(&group, "versions") {
                for resource in list(&version, "resources") {
                    let kind = resource.text("/responseKind/kind");
                    let singular = match resource.text("/singularResource") {
                        "" => kind.to_lowercase(),
                        singular => singular.to_string(),
                    };
                    self.0.push(Kind {
                        group: group.name().to_string(),
                        version: version.text("/version").to_string(),
                        plural: resource.text("/resource").to_string(),
                        singular,
                        kind: kind.to_string(),
                        short_names: words(&resource, "shortNames"),
                        categories: words(&resource, "categories"),
                        namespaced: resource.text("/scope") == "Namespaced",
                        verbs: words(&resource, "verbs"),
                    });
                }
            }
        }
        Ok(())
    }

    /// The kind of an object in a file.
    pub fn of(&self, api_version: &str, kind: &str) -> Option<&Kind> {
        self.0.iter().find(|k| k.kind == kind && k.api_version() == api_version)
    }

    /// The kind that a word means: plural, singular, kind or short name, also as `NAME.GROUP` or `NAME.VERSION.GROUP`.
    pub fn one(&self, word: &str) -> anyhow::Result<&Kind> {
        let lower = word.to_lowercase();
        let whole = self.0.iter().find(|k| k.is_called(&lower));
        let short = || self.0.iter().find(|k| k.short_names.contains(&lower));
        let with_group = || {
            let (name, rest) = lower.split_once('.')?;
            let called = |k: &&Kind| k.is_called(name) || k.short_names.iter().any(|s| s == name);
            self.0
                .iter()
                .filter(called)
                .find(|k| rest == k.group || rest.split_once('.').is_some_and(|(v, g)| v == k.version && g == k.group))
        };
        whole
            .or_else(short)
            .or_else(with_group)
            .with_context(|| format!("the server doesn't have a resource type {word:?}"))
    }

    /// The kinds of a comma-separated list, in which a category such as `all` stands for its members.
    pub fn several(&self, words: &str) -> anyhow::Result<Vec<&Kind>> {
        let mut found: Vec<&Kind> = Vec::new();
        for word in words.split(',').filter(|w| !w.is_empty()) {
            let mut members: Vec<&Kind> = Vec::new();
            for kind in self.0.iter().filter(|k| k.can("list") && k.categories.iter().any(|c| c == word)) {
                // Of a kind in several versions, the preferred one.
                if !members.iter().any(|m| m.group == kind.group && m.plural == kind.plural) {
                    members.push(kind);
                }
            }
            match members.is_empty() {
                true => found.push(self.one(word)?),
                false => found.extend(members),
            }
        }
        if found.is_empty() {
            bail!("say what is meant, such as pods, deploy or svc/NAME");
        }
        Ok(found)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn kinds() -> Kinds {
        let resource = |plural: &str, singular: &str, kind: &str, short: &[&str], categories: &[&str]| {
            json!({"resource": plural, "singularResource": singular, "responseKind": {"kind": kind}, "scope": "Namespaced",
                "shortNames": short, "categories": categories, "verbs": ["get", "list"]})
        };
        let document = |group: &str, version: &str, resources: Vec<Value>| {
            json!({"kind": "APIGroupDiscoveryList", "items": [
                {"metadata": {"name": group}, "versions": [{"version": version, "resources": resources}]}]})
        };
        let mut kinds = Kinds::default();
        let core =
            vec![resource("pods", "pod", "Pod", &["po"], &["all"]), resource("events", "event", "Event", &["ev"], &[])];
        kinds.read(&document("", "v1", core)).expect("readable");
        kinds
            .read(&document(
                "apps",
                "v1",
                vec![resource("deployments", "deployment", "Deployment", &["deploy"], &["all"])],
            ))
            .expect("readable");
        kinds
            .read(&document("events.k8s.io", "v1", vec![resource("events", "event", "Event", &["ev"], &[])]))
            .expect("readable");
        kinds
    }

    #[test]
    fn a_word_means_one_kind_and_the_core_group_comes_first() {
        let kinds = kinds();
        let cases = [
            ("pods", "/api/v1/namespaces/a/pods"),
            ("Pod", "/api/v1/namespaces/a/pods"),
            ("po", "/api/v1/namespaces/a/pods"),
            ("deploy", "/apis/apps/v1/namespaces/a/deployments"),
            ("deployment.apps", "/apis/apps/v1/namespaces/a/deployments"),
            ("deployments.v1.apps", "/apis/apps/v1/namespaces/a/deployments"),
            ("ev", "/api/v1/namespaces/a/events"),
            ("events.events.k8s.io", "/apis/events.k8s.io/v1/namespaces/a/events"),
        ];
        for (word, path) in cases {
            assert_eq!(kinds.one(word).expect(word).path("a"), path, "{word}");
        }
        assert!(kinds.one("nothing").is_err());
        assert!(kinds.one("pods.apps").is_err());
    }

    #[test]
    fn a_category_stands_for_its_members() {
        let kinds = kinds();
        let labels = |words: &str| kinds.several(words).expect(words).iter().map(|k| k.label()).collect::<Vec<_>>();
        assert_eq!(labels("all"), ["pod", "deployment.apps"]);
        assert_eq!(labels("ev,po"), ["event", "pod"]);
        assert!(kinds.several("").is_err());
        assert_eq!(kinds.of("apps/v1", "Deployment").map(Kind::label).as_deref(), Some("deployment.apps"));
    }
}
