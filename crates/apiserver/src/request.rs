//! What a request is about, read once from its method and URL.

use percent_encoding::percent_decode_str;
use std::collections::BTreeMap;

/// A request for a resource, or for a path that is none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RequestInfo {
    pub path: String,
    /// In RBAC's words: get, list, watch, create, update, patch, delete, deletecollection; for other paths the HTTP method.
    pub verb: &'static str,
    pub is_resource: bool,
    pub group: String,
    pub version: String,
    /// Empty for cluster-scoped requests and requests over all namespaces.
    pub namespace: String,
    pub plural: String,
    /// Empty for a collection.
    pub name: String,
    pub subresource: String,
    /// What follows `/proxy/`.
    pub rest: String,
    pub query: Query,
}

/// Decoded query parameters; a repeated one keeps all its values in order.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Query(BTreeMap<String, Vec<String>>);

impl Query {
    fn parse(text: &str) -> Query {
        let mut map: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for pair in text.split('&').filter(|p| !p.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            map.entry(decode(key)).or_default().push(decode(value));
        }
        Query(map)
    }

    pub fn get(&self, key: &str) -> &str {
        self.0.get(key).and_then(|v| v.first()).map_or("", String::as_str)
    }

    pub fn all(&self, key: &str) -> &[String] {
        self.0.get(key).map_or(&[], Vec::as_slice)
    }

    pub fn flag(&self, key: &str) -> bool {
        matches!(self.get(key), "true" | "1")
    }

    /// Asks for a dry run and nothing else.
    pub fn dry_run() -> Query {
        Query(BTreeMap::from([("dryRun".to_string(), vec!["All".to_string()])]))
    }

    pub fn is_dry_run(&self) -> bool {
        self.all("dryRun").iter().any(|v| v == "All")
    }
}

fn decode(text: &str) -> String {
    percent_decode_str(&text.replace('+', " ")).decode_utf8_lossy().into_owned()
}

impl RequestInfo {
    /// The one object that the request is about, for RBAC: a list or watch may be pinned to a name by its selector.
    pub fn one_name(&self) -> String {
        if !self.name.is_empty() || !matches!(self.verb, "list" | "watch") {
            return self.name.clone();
        }
        let selector = api::FieldSelector::parse(self.query.get("fieldSelector")).unwrap_or_default();
        selector.pinned("metadata.name").unwrap_or_default().to_string()
    }

    pub fn parse(method: &http::Method, uri: &http::Uri) -> RequestInfo {
        let query = Query::parse(uri.query().unwrap_or(""));
        let path = uri.path().to_string();
        let mut info = RequestInfo { verb: method_verb(method), path: path.clone(), query, ..RequestInfo::default() };
        let mut parts: Vec<String> = path
            .split('/')
            .filter(|p| !p.is_empty())
            .map(|p| percent_decode_str(p).decode_utf8_lossy().into_owned())
            .collect();
        let head = match parts.first().map(String::as_str) {
            Some("api") if parts.len() >= 3 => 2,
            Some("apis") if parts.len() >= 4 => 3,
            _ => return info,
        };
        info.is_resource = true;
        info.group = if head == 3 { parts[1].clone() } else { String::new() };
        info.version = parts[head - 1].clone();
        parts.drain(..head);
        if parts.first().is_some_and(|p| p == "watch") {
            info.verb = "watch";
            parts.remove(0);
        }
        // `namespaces/x` is the Namespace itself, as are its two subresources; `namespaces/x/pods` is in it.
        let in_namespace = parts.len() >= 3 && parts[0] == "namespaces" && {
            !(parts.len() == 3 && info.group.is_empty() && matches!(parts[2].as_str(), "status" | "finalize"))
        };
        if in_namespace {
            info.namespace = parts[1].clone();
            parts.drain(..2);
        }
        let mut parts = parts.into_iter();
        info.plural = parts.next().unwrap_or_default();
        info.name = parts.next().unwrap_or_default();
        info.subresource = parts.next().unwrap_or_default();
        info.rest = parts.collect::<Vec<_>>().join("/");
        if info.plural == "namespaces" && info.group.is_empty() && !info.name.is_empty() {
            info.namespace.clone_from(&info.name);
        }
        info.verb = match (info.verb, info.name.is_empty()) {
            ("get", true) if info.query.flag("watch") => "watch",
            ("get", true) => "list",
            ("delete", true) => "deletecollection",
            (verb, _) => verb,
        };
        if matches!(info.subresource.as_str(), "exec" | "attach" | "portforward") && info.verb == "get" {
            // Streams are opened with GET by WebSocket clients; RBAC asks for create in both cases.
            info.verb = "create";
        }
        info
    }
}

fn method_verb(method: &http::Method) -> &'static str {
    match method.as_str() {
        "GET" | "HEAD" => "get",
        "POST" => "create",
        "PUT" => "update",
        "PATCH" => "patch",
        "DELETE" => "delete",
        _ => "options",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read() {
        for (method, url, expected) in [
            ("GET", "/api/v1/pods?watch=true", "watch ''/v1 '' pods '' ''"),
            ("GET", "/api/v1/namespaces/a/pods", "list ''/v1 'a' pods '' ''"),
            ("POST", "/api/v1/namespaces/a/pods/p/binding", "create ''/v1 'a' pods 'p' 'binding'"),
            ("GET", "/api/v1/namespaces/a", "get ''/v1 'a' namespaces 'a' ''"),
            ("PUT", "/api/v1/namespaces/a/finalize", "update ''/v1 'a' namespaces 'a' 'finalize'"),
            ("GET", "/apis/apps/v1/namespaces/a/deployments/d/scale", "get 'apps'/v1 'a' deployments 'd' 'scale'"),
            ("DELETE", "/apis/apps/v1/namespaces/a/deployments", "deletecollection 'apps'/v1 'a' deployments '' ''"),
            ("GET", "/api/v1/namespaces/a/pods/p/exec", "create ''/v1 'a' pods 'p' 'exec'"),
        ] {
            let method = method.parse().expect("a method");
            let i = RequestInfo::parse(&method, &url.parse().expect("a URL"));
            let got = format!(
                "{} '{}'/{} '{}' {} '{}' '{}'",
                i.verb, i.group, i.version, i.namespace, i.plural, i.name, i.subresource
            );
            assert_eq!(got, expected, "{url}");
        }
    }
}
