//! Which fields differ between two versions of an object.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::sets::{Element, FieldSet};
use crate::shape::Shape;

/// The fields that came, went and changed from one object to the other.
#[derive(Debug, Default)]
pub struct Comparison {
    pub added: FieldSet,
    pub modified: FieldSet,
    pub removed: FieldSet,
}

impl Comparison {
    /// The fields whose values are now the writer's.
    pub fn written(&self) -> FieldSet {
        self.modified.union(&self.added)
    }
}

/// Compares two objects of one shape.
pub fn compare(before: &Value, after: &Value, shape: Shape) -> Comparison {
    let mut comparison = Comparison::default();
    walk(Some(before), Some(after), shape, &mut Vec::new(), &mut comparison);
    comparison
}

fn walk(before: Option<&Value>, after: Option<&Value>, shape: Shape, path: &mut Vec<Element>, out: &mut Comparison) {
    let before = before.filter(|value| !value.is_null());
    let after = after.filter(|value| !value.is_null());
    if before == after {
        return;
    }
    match shape {
        Shape::Struct(_) | Shape::Map(_) | Shape::Unknown => {
            if let (Some(left), Some(right)) = (children(before, as_fields), children(after, as_fields)) {
                if left.is_empty() && right.is_empty() {
                    return leaf(before, after, path, out);
                }
                let names: BTreeSet<&Element> = left.keys().chain(right.keys()).collect();
                for element in names {
                    let Element::Field(name) = element else { continue };
                    let below = shape.field(name).unwrap_or(Shape::Unknown);
                    let (left, right) = (left.get(element).copied(), right.get(element).copied());
                    step(element, left, right, below, !shape.always_has(name), path, out);
                }
                return;
            }
        }
        Shape::Set | Shape::Keyed { .. } => {
            let left = children(before, |value| as_elements(value, shape));
            let right = children(after, |value| as_elements(value, shape));
            if let (Some(left), Some(right)) = (left, right) {
                if left.is_empty() && right.is_empty() {
                    return leaf(before, after, path, out);
                }
                let elements: BTreeSet<&Element> = left.keys().chain(right.keys()).collect();
                for element in elements {
                    let (left, right) = (left.get(element).copied(), right.get(element).copied());
                    step(element, left, right, shape.element(), true, path, out);
                }
                return;
            }
        }
        Shape::Leaf => {}
    }
    leaf(before, after, path, out);
}

/// Compares below `element`, and notes the element itself when it came or went.
fn step(
    element: &Element,
    before: Option<&Value>,
    after: Option<&Value>,
    shape: Shape,
    counts: bool,
    path: &mut Vec<Element>,
    out: &mut Comparison,
) {
    path.push(element.clone());
    walk(before, after, shape, path, out);
    let exists = |value: Option<&Value>| value.is_some_and(|value| !value.is_null());
    match (exists(before), exists(after)) {
        (false, true) if counts => out.added.insert(path),
        (true, false) => out.removed.insert(path),
        _ => {}
    }
    path.pop();
}

fn leaf(before: Option<&Value>, after: Option<&Value>, path: &[Element], out: &mut Comparison) {
    match (before, after) {
        (None, Some(_)) => out.added.insert(path),
        (Some(_), None) => out.removed.insert(path),
        (Some(left), Some(right)) if left != right => out.modified.insert(path),
        _ => {}
    }
}

type Children<'a> = BTreeMap<Element, &'a Value>;

/// The children of a value, none of an absent one; `None` when the value cannot be divided.
fn children<'a>(value: Option<&'a Value>, divide: impl Fn(&'a Value) -> Option<Children<'a>>) -> Option<Children<'a>> {
    value.map_or_else(|| Some(Children::new()), divide)
}

fn as_fields(value: &Value) -> Option<Children<'_>> {
    Some(value.as_object()?.iter().map(|(name, item)| (Element::field(name), item)).collect())
}

fn as_elements(value: &Value, shape: Shape) -> Option<Children<'_>> {
    let mut elements = Children::new();
    for item in value.as_array()? {
        elements.entry(shape.list_element(item).ok()?).or_insert(item);
    }
    Some(elements)
}
