//! What server-side apply needs to know of a value: is it owned whole, by field, by key or by element.

use std::collections::BTreeMap;

use api::schema::{Field, ListKind, Message, Type};
use serde_json::Value;

use crate::sets::Element;

/// How ownership divides one value.
#[derive(Debug, Clone, Copy)]
pub enum Shape {
    /// A scalar, or a struct, map or list that is owned as one value.
    Leaf,
    /// A struct: every field has an owner.
    Struct(&'static Message),
    /// A map of which every key has an owner; the values have this type.
    Map(&'static Type),
    /// A list of scalars of which every element has an owner.
    Set,
    /// A list of maps of which every element, found by these keys, has fields with owners.
    Keyed { keys: &'static [&'static str], element: &'static Type },
    /// No schema: maps divide by key, everything else is owned whole.
    Unknown,
}

/// Structs that Kubernetes marks as atomic where they are declared: one owner for all their fields.
const ATOMIC_STRUCTS: &[&str] = &[
    "ConfigMapKeySelector",
    "CrossVersionObjectReference",
    "EndpointAddress",
    "EndpointPort",
    "LabelSelector",
    "LocalObjectReference",
    "MatchResources",
    "NamedRuleWithOperations",
    "NodeSelector",
    "NodeSelectorTerm",
    "ObjectFieldSelector",
    "ObjectReference",
    "OwnerReference",
    "ParamKind",
    "ParamRef",
    "ResourceFieldSelector",
    "RoleRef",
    "ScopeSelector",
    "SecretKeySelector",
    "SecretReference",
    "ServiceBackendPort",
    "Subject",
    "TopologySelectorTerm",
    "TypedLocalObjectReference",
    "Variable",
];

impl Shape {
    /// The shape of a whole object of this type.
    pub fn root(schema: Option<&'static Message>) -> Shape {
        schema.map_or(Shape::Unknown, Shape::Struct)
    }

    fn of_type(ty: &'static Type) -> Shape {
        match ty {
            Type::Message(_) => match ty.message() {
                Some(message) if ATOMIC_STRUCTS.contains(&message.short_name()) => Shape::Leaf,
                Some(message) => Shape::Struct(message),
                None => Shape::Unknown,
            },
            Type::Map(value) => Shape::Map(value),
            _ => Shape::Leaf,
        }
    }

    fn of_field(field: &'static Field) -> Shape {
        match (&field.ty, field.list) {
            _ if field.atomic => Shape::Leaf,
            (Type::List(_), ListKind::Set) => Shape::Set,
            (Type::List(element), ListKind::Map) => Shape::Keyed { keys: &field.map_keys, element },
            (ty, _) => Shape::of_type(ty),
        }
    }

    /// The shape of the field or map key `name`. `None` when a struct has no such field.
    pub fn field(self, name: &str) -> Option<Shape> {
        match self {
            Shape::Struct(message) => message.field(name).map(Shape::of_field),
            Shape::Map(value) => Some(Shape::of_type(value)),
            _ => Some(Shape::Unknown),
        }
    }

    /// The shape of a list's elements.
    pub fn element(self) -> Shape {
        match self {
            Shape::Keyed { element, .. } => Shape::of_type(element),
            _ => Shape::Leaf,
        }
    }

    /// Whether the field `name` is declared by a struct: then its path is not a member only because it has children.
    pub fn declares(self, name: &str) -> bool {
        matches!(self, Shape::Struct(message) if message.field(name).is_some())
    }

    /// Whether a struct's field always exists in Go, so that its coming and going is never a change of its own.
    pub fn always_has(self, name: &str) -> bool {
        match self {
            Shape::Struct(message) => {
                message.field(name).is_some_and(|field| !field.pointer && matches!(field.ty, Type::Message(_)))
            }
            _ => false,
        }
    }

    /// The path element of a list's item; the error says what is wrong with the item.
    pub fn list_element(self, item: &Value) -> Result<Element, String> {
        let Shape::Keyed { keys, .. } = self else {
            return match item {
                Value::Array(_) | Value::Object(_) | Value::Null => {
                    Err("associative list without keys has an element that's a map, a list or null".to_owned())
                }
                scalar => Ok(Element::value(scalar)),
            };
        };
        let Value::Object(fields) = item else {
            return Err("associative list with keys may not have non-map elements".to_owned());
        };
        let mut found = BTreeMap::new();
        for key in keys {
            let value = fields.get(*key).or_else(|| default_key(key)).ok_or_else(|| {
                format!(
                    "associative list with keys has an element that omits key field \"{key}\" (and doesn't have default value)"
                )
            })?;
            found.insert(*key, value);
        }
        Ok(Element::key(&found))
    }
}

/// Ports are keyed by number and protocol, and most people leave the protocol out.
fn default_key(key: &str) -> Option<&'static Value> {
    static TCP: std::sync::LazyLock<Value> = std::sync::LazyLock::new(|| Value::from("TCP"));
    (key == "protocol").then_some(&*TCP)
}
