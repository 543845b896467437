//! Discovery in its three forms: aggregated v2 and v2beta1, and the legacy lists.

use crate::body::{self, Body};
use crate::catalog::{Catalog, Row};
use http::{HeaderMap, Response, StatusCode};
use serde_json::{Value, json};
use std::sync::Arc;

/// `/api` and `/apis`.
pub fn root(catalog: &Catalog, headers: &HeaderMap, core: bool) -> Response<Body> {
    let accept = headers.get("accept").and_then(|v| v.to_str().ok()).unwrap_or("");
    for part in accept.split(',') {
        if !part.contains("as=APIGroupDiscoveryList") {
            if part.trim().starts_with("application/json") || part.trim() == "*/*" {
                break;
            }
            continue;
        }
        for (version, content_type) in [
            ("v2beta1", "application/json;g=apidiscovery.k8s.io;v=v2beta1;as=APIGroupDiscoveryList"),
            ("v2", "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList"),
        ] {
            if part.split(';').any(|p| p.trim() == format!("v={version}")) {
                let bytes = aggregated(catalog, core, version).to_string();
                return body::typed(StatusCode::OK, content_type, bytes);
            }
        }
    }
    let value = if core {
        json!({"kind": "APIVersions", "versions": ["v1"], "serverAddressByClientCIDRs": []})
    } else {
        let groups: Vec<Value> =
            catalog.groups().iter().filter(|(g, _)| !g.is_empty()).map(|(g, v)| group(g, v)).collect();
        json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
    };
    body::value(StatusCode::OK, &value)
}

fn group(name: &str, versions: &[String]) -> Value {
    let list: Vec<Value> =
        versions.iter().map(|v| json!({"groupVersion": format!("{name}/{v}"), "version": v})).collect();
    json!({"name": name, "versions": list, "preferredVersion": list.first()})
}

/// `/apis/GROUP`
pub fn one_group(catalog: &Catalog, name: &str) -> Option<Response<Body>> {
    let groups = catalog.groups();
    let (name, versions) = groups.iter().find(|(g, _)| g == name && !g.is_empty())?;
    let mut value = group(name, versions);
    value["kind"] = json!("APIGroup");
    value["apiVersion"] = json!("v1");
    Some(body::value(StatusCode::OK, &value))
}

/// `/api/v1` and `/apis/GROUP/VERSION`
pub fn resources(catalog: &Catalog, group: &str, version: &str) -> Option<Response<Body>> {
    let rows: Vec<&Arc<Row>> = catalog.rows().iter().filter(|r| r.group == group && r.version == version).collect();
    if rows.is_empty() {
        return None;
    }
    let mut list = Vec::new();
    for row in &rows {
        let mut entry = json!({
            "name": row.plural, "singularName": row.singular, "namespaced": row.namespaced,
            "kind": row.kind, "verbs": row.verbs(),
        });
        if !row.short_names.is_empty() {
            entry["shortNames"] = json!(row.short_names);
        }
        if !row.categories.is_empty() {
            entry["categories"] = json!(row.categories);
        }
        list.push(entry);
        for (name, (group, version, kind), verbs) in subresources(row) {
            let mut entry = json!({
                "name": format!("{}/{name}", row.plural), "singularName": "", "namespaced": row.namespaced,
                "kind": kind, "verbs": verbs,
            });
            if group != *row.group {
                entry["group"] = json!(group);
                entry["version"] = json!(version);
            }
            list.push(entry);
        }
    }
    let group_version = rows[0].api_version();
    let value =
        json!({"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": group_version, "resources": list});
    Some(body::value(StatusCode::OK, &value))
}

type SubresourceEntry<'a> = (&'a str, (String, String, String), Vec<&'a str>);

fn subresources(row: &Row) -> Vec<SubresourceEntry<'_>> {
    let mut list: Vec<SubresourceEntry<'_>> = row
        .subresources
        .iter()
        .map(|s| (s.name, (s.kind.0.into(), s.kind.1.into(), s.kind.2.into()), s.verbs.to_vec()))
        .collect();
    if row.has_status {
        let own = (row.group.to_string(), row.version.to_string(), row.kind.to_string());
        list.push(("status", own, vec!["get", "patch", "update"]));
    }
    list
}

fn aggregated(catalog: &Catalog, core: bool, version: &str) -> Value {
    let mut items = Vec::new();
    for (group, versions) in catalog.groups().iter().filter(|(g, _)| g.is_empty() == core) {
        let versions: Vec<Value> = versions
            .iter()
            .map(|v| {
                let rows = catalog.rows().iter().filter(|r| r.group == *group && r.version == *v);
                let resources: Vec<Value> = rows.map(|r| aggregated_row(r)).collect();
                json!({"version": v, "resources": resources, "freshness": "Current"})
            })
            .collect();
        let metadata =
            if core { json!({"creationTimestamp": null}) } else { json!({"name": group, "creationTimestamp": null}) };
        items.push(json!({"metadata": metadata, "versions": versions}));
    }
    json!({
        "kind": "APIGroupDiscoveryList", "apiVersion": format!("apidiscovery.k8s.io/{version}"),
        "metadata": {}, "items": items,
    })
}

fn aggregated_row(row: &Row) -> Value {
    let mut entry = json!({
        "resource": row.plural, "singularResource": row.singular,
        "responseKind": {"group": row.group, "version": row.version, "kind": row.kind},
        "scope": if row.namespaced { "Namespaced" } else { "Cluster" }, "verbs": row.verbs(),
    });
    if !row.short_names.is_empty() {
        entry["shortNames"] = json!(row.short_names);
    }
    if !row.categories.is_empty() {
        entry["categories"] = json!(row.categories);
    }
    let subs: Vec<Value> = subresources(row)
        .into_iter()
        .map(|(name, (group, version, kind), verbs)| {
            json!({"subresource": name, "responseKind": {"group": group, "version": version, "kind": kind}, "verbs": verbs})
        })
        .collect();
    if !subs.is_empty() {
        entry["subresources"] = json!(subs);
    }
    entry
}
