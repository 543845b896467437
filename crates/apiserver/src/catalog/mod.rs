//! The catalog: one row per kind, and everything generic is derived from it.

pub mod builtin;

use crate::strategy::Strategy;
use crate::table::Column;
use api::schema::Message;
use serde_json::Value;
use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::Arc;

pub type Text = Cow<'static, str>;

/// A kind: where it lives, what it is called, and what is special about it.
pub struct Row {
    pub group: Text,
    pub version: Text,
    pub plural: Text,
    pub singular: Text,
    pub kind: Text,
    pub namespaced: bool,
    pub short_names: &'static [&'static str],
    pub categories: &'static [&'static str],
    /// Has a `status` subresource: main writes keep the status, status writes keep the rest.
    pub has_status: bool,
    /// Other subresources, by name.
    pub subresources: &'static [Subresource],
    /// Only answered, never stored: reviews.
    pub is_virtual: bool,
    pub strategy: &'static dyn Strategy,
    pub columns: &'static [Column],
    /// Paths that field selectors may name beside `metadata.name` and `metadata.namespace`, with their JSON pointers.
    pub fields: &'static [(&'static str, &'static str)],
    /// `None` for kinds without a schema table entry.
    pub schema: Option<&'static Message>,
}

/// A subresource as discovery lists it.
#[derive(Debug, Clone, Copy)]
pub struct Subresource {
    pub name: &'static str,
    /// Kind of its body, with its group and version.
    pub kind: (&'static str, &'static str, &'static str),
    pub verbs: &'static [&'static str],
}

pub const STORED_VERBS: [&str; 8] = ["create", "delete", "deletecollection", "get", "list", "patch", "update", "watch"];

impl Row {
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.to_string() } else { format!("{}/{}", self.group, self.version) }
    }

    /// Where objects of this kind are stored: `registry/GROUP/PLURAL/`.
    pub fn prefix(&self) -> String {
        let group = if self.group.is_empty() { "core" } else { &self.group };
        format!("registry/{group}/{}/", self.plural)
    }

    pub fn key(&self, namespace: &str, name: &str) -> String {
        format!("{}{}", self.prefix(), self.object_key(namespace, name))
    }

    /// The part of the key that tells objects of one kind apart.
    pub fn object_key(&self, namespace: &str, name: &str) -> String {
        if self.namespaced { format!("{namespace}/{name}") } else { name.to_string() }
    }

    pub fn verbs(&self) -> &'static [&'static str] {
        if self.is_virtual { &["create"] } else { &STORED_VERBS }
    }

    pub fn subresource(&self, name: &str) -> Option<&Subresource> {
        self.subresources.iter().find(|s| s.name == name)
    }

    /// The value of a selectable field; `None` if the kind has no such field.
    pub fn field<'a>(&self, object: &'a Value, path: &str) -> Option<&'a str> {
        let pointer = match path {
            "metadata.name" => "/metadata/name",
            "metadata.namespace" => "/metadata/namespace",
            _ => self.fields.iter().find(|(p, _)| *p == path)?.1,
        };
        Some(match object.pointer(pointer) {
            Some(Value::String(text)) => text,
            Some(Value::Bool(true)) => "true",
            Some(Value::Bool(false)) => "false",
            _ if path == "spec.unschedulable" => "false",
            _ => "",
        })
    }

    pub fn has_field(&self, path: &str) -> bool {
        matches!(path, "metadata.name" | "metadata.namespace") || self.fields.iter().any(|(p, _)| *p == path)
    }
}

/// All rows, in discovery order.
#[derive(Clone)]
pub struct Catalog {
    rows: Vec<Arc<Row>>,
    by_path: HashMap<(String, String, String), usize>,
    by_prefix: HashMap<String, usize>,
}

impl Catalog {
    pub fn new(rows: Vec<Row>) -> Catalog {
        let rows: Vec<Arc<Row>> = rows.into_iter().map(Arc::new).collect();
        let by_path = rows
            .iter()
            .enumerate()
            .map(|(i, r)| ((r.group.to_string(), r.version.to_string(), r.plural.to_string()), i))
            .collect();
        let by_prefix = rows.iter().enumerate().map(|(i, r)| (r.prefix(), i)).collect();
        Catalog { rows, by_path, by_prefix }
    }

    pub fn rows(&self) -> &[Arc<Row>] {
        &self.rows
    }

    pub fn find(&self, group: &str, version: &str, plural: &str) -> Option<&Arc<Row>> {
        self.by_path.get(&(group.into(), version.into(), plural.into())).map(|&i| &self.rows[i])
    }

    /// The row whose objects are stored under this prefix.
    pub fn stored_under(&self, prefix: &str) -> Option<&Arc<Row>> {
        self.by_prefix.get(prefix).map(|&i| &self.rows[i])
    }

    /// Groups with their versions, in discovery order.
    pub fn groups(&self) -> Vec<(String, Vec<String>)> {
        let mut groups: Vec<(String, Vec<String>)> = Vec::new();
        for row in &self.rows {
            match groups.iter_mut().find(|(g, _)| *g == row.group) {
                None => groups.push((row.group.to_string(), vec![row.version.to_string()])),
                Some((_, versions)) if !versions.iter().any(|v| *v == row.version) => {
                    versions.push(row.version.to_string());
                }
                Some(_) => {}
            }
        }
        groups
    }
}
