//! Sets of fields, as managedFields stores them: a tree whose nodes are fields, list elements and set values.
//!
//! A node is a *member* when its path belongs to the set. Parents of members are nodes too, but members only when
//! they say so: owning `.spec.replicas` does not own `.spec`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use serde_json::{Map, Value};

/// One step of a path. The order is the one in which managedFields lists them.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum Element {
    /// A field of a struct or a key of a map: `f:name`.
    Field(String),
    /// An element of a list of maps, by its keys as JSON text with sorted names: `k:{"name":"web"}`.
    Key(String),
    /// An element of a set of scalars, as JSON text: `v:"kubernetes"`.
    Value(String),
    /// An element of a list by position: `i:0`.
    Index(usize),
}

impl Element {
    pub fn field(name: &str) -> Self {
        Element::Field(name.to_owned())
    }

    /// The element of a list of maps that has these keys.
    pub fn key(keys: &BTreeMap<&str, &Value>) -> Self {
        let pairs: Vec<String> = keys.iter().map(|(name, value)| format!("{}:{value}", Value::from(*name))).collect();
        Element::Key(format!("{{{}}}", pairs.join(",")))
    }

    /// The element of a set that equals `value`.
    pub fn value(value: &Value) -> Self {
        Element::Value(value.to_string())
    }

    fn parse(text: &str) -> Option<Self> {
        let (kind, rest) = text.split_once(':')?;
        Some(match kind {
            "f" => Element::field(rest),
            "k" => {
                let keys: BTreeMap<String, Value> = serde_json::from_str(rest).ok()?;
                Element::key(&keys.iter().map(|(name, value)| (name.as_str(), value)).collect())
            }
            "v" => Element::value(&serde_json::from_str(rest).ok()?),
            "i" => Element::Index(rest.parse().ok()?),
            _ => return None,
        })
    }

    fn serialize(&self) -> String {
        match self {
            Element::Field(name) => format!("f:{name}"),
            Element::Key(keys) => format!("k:{keys}"),
            Element::Value(value) => format!("v:{value}"),
            Element::Index(index) => format!("i:{index}"),
        }
    }

    /// Appends the step as error messages print it: `.image`, `[name="web"]`, `[="kubernetes"]`, `[0]`.
    fn print(&self, path: &mut String) {
        // Writing to a String cannot fail.
        let _ = match self {
            Element::Field(name) => write!(path, ".{name}"),
            Element::Key(keys) => {
                let keys: BTreeMap<String, Value> = serde_json::from_str(keys).unwrap_or_default();
                let keys: Vec<String> = keys.iter().map(|(name, value)| format!("{name}={value}")).collect();
                write!(path, "[{}]", keys.join(","))
            }
            Element::Value(value) => write!(path, "[={value}]"),
            Element::Index(index) => write!(path, "[{index}]"),
        };
    }
}

/// A set of paths below one root.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSet {
    member: bool,
    children: BTreeMap<Element, FieldSet>,
}

impl FieldSet {
    pub fn insert(&mut self, path: &[Element]) {
        let mut node = self;
        for element in path {
            node = node.children.entry(element.clone()).or_default();
        }
        node.member = true;
    }

    /// Whether the root of this (sub)tree itself is in the set.
    pub fn is_member(&self) -> bool {
        self.member
    }

    pub fn child(&self, element: &Element) -> Option<&FieldSet> {
        self.children.get(element)
    }

    pub fn is_empty(&self) -> bool {
        !self.member && self.children.values().all(FieldSet::is_empty)
    }

    pub fn union(&self, other: &FieldSet) -> FieldSet {
        let mut union = self.clone();
        union.absorb(other);
        union
    }

    fn absorb(&mut self, other: &FieldSet) {
        self.member |= other.member;
        for (element, theirs) in &other.children {
            self.children.entry(element.clone()).or_default().absorb(theirs);
        }
    }

    pub fn intersection(&self, other: &FieldSet) -> FieldSet {
        let children = self.children.iter().filter_map(|(element, ours)| {
            let both = ours.intersection(other.children.get(element)?);
            (!both.is_empty()).then(|| (element.clone(), both))
        });
        FieldSet { member: self.member && other.member, children: children.collect() }
    }

    /// The paths of `self` that are not in `other`. A child stays when only its parent is in `other`.
    pub fn difference(&self, other: &FieldSet) -> FieldSet {
        let children = self.children.iter().filter_map(|(element, ours)| {
            let left = match other.children.get(element) {
                Some(theirs) => ours.difference(theirs),
                None => ours.clone(),
            };
            (!left.is_empty()).then(|| (element.clone(), left))
        });
        FieldSet { member: self.member && !other.member, children: children.collect() }
    }

    /// The set in which every struct field or map key with members below it is a member too.
    pub fn with_named_parents(&self) -> FieldSet {
        let children = self.children.iter().map(|(element, child)| {
            let mut child = child.with_named_parents();
            child.member |= matches!(element, Element::Field(_)) && !child.children.is_empty();
            (element.clone(), child)
        });
        FieldSet { member: self.member, children: children.collect() }
    }

    /// Every member's path as error messages print it, parents before children.
    pub fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        self.collect_paths(&mut String::new(), &mut paths);
        paths
    }

    fn collect_paths(&self, path: &mut String, paths: &mut Vec<String>) {
        if self.member {
            paths.push(path.clone());
        }
        for (element, child) in &self.children {
            let length = path.len();
            element.print(path);
            child.collect_paths(path, paths);
            path.truncate(length);
        }
    }

    /// Reads the `fieldsV1` of a managedFields entry. `None` when it is not one.
    pub fn from_fields_v1(fields: &Value) -> Option<FieldSet> {
        let mut set = FieldSet::default();
        for (name, below) in fields.as_object()? {
            if name == "." {
                set.member = true;
                continue;
            }
            let mut child = FieldSet::from_fields_v1(below)?;
            // An entry with nothing below it is the member itself.
            child.member |= child.children.is_empty();
            set.children.insert(Element::parse(name)?, child);
        }
        Some(set)
    }

    /// Writes the set as the `fieldsV1` of a managedFields entry.
    pub fn to_fields_v1(&self) -> Value {
        let mut fields = Map::new();
        if self.member && !self.children.is_empty() {
            fields.insert(".".to_owned(), Value::Object(Map::new()));
        }
        for (element, child) in &self.children {
            fields.insert(element.serialize(), child.to_fields_v1());
        }
        Value::Object(fields)
    }
}

/// The printed form of a path, such as `.spec.containers[name="web"].image`.
pub fn print_path(path: &[Element]) -> String {
    let mut text = String::new();
    for element in path {
        element.print(&mut text);
    }
    text
}
