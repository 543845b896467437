//! Label and field selectors: parsed once, matched often.

use serde::Deserialize;
use serde_json::Value;
use std::collections::BTreeMap;

/// One requirement on a label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Requirement {
    pub key: String,
    pub operator: Operator,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Operator {
    In(Vec<String>),
    NotIn(Vec<String>),
    Exists,
    DoesNotExist,
}

/// A parsed label selector; empty selects everything.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector {
    pub requirements: Vec<Requirement>,
}

/// The selector as objects carry it (meta/v1 LabelSelector).
#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct LabelSelectorSpec {
    pub match_labels: BTreeMap<String, String>,
    pub match_expressions: Vec<MatchExpression>,
}

#[derive(Debug, Clone, Default, PartialEq, Deserialize)]
#[serde(default)]
pub struct MatchExpression {
    pub key: String,
    pub operator: String,
    pub values: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unable to parse requirement: {0}")]
pub struct SelectorError(pub String);

impl LabelSelector {
    /// From a plain map, as Services and ReplicationControllers have it.
    pub fn from_map<'a>(labels: impl IntoIterator<Item = (&'a String, &'a String)>) -> Self {
        let requirements = labels
            .into_iter()
            .map(|(k, v)| Requirement { key: k.clone(), operator: Operator::In(vec![v.clone()]) })
            .collect();
        LabelSelector { requirements }
    }

    /// # Errors
    /// An operator that is none of In, NotIn, Exists, DoesNotExist.
    pub fn from_spec(spec: &LabelSelectorSpec) -> Result<Self, SelectorError> {
        let mut selector = Self::from_map(&spec.match_labels);
        for expression in &spec.match_expressions {
            let operator = match expression.operator.as_str() {
                "In" => Operator::In(expression.values.clone()),
                "NotIn" => Operator::NotIn(expression.values.clone()),
                "Exists" => Operator::Exists,
                "DoesNotExist" => Operator::DoesNotExist,
                other => return Err(SelectorError(format!("{other:?} is not a valid label selector operator"))),
            };
            selector.requirements.push(Requirement { key: expression.key.clone(), operator });
        }
        Ok(selector)
    }

    /// Parses the text of a `labelSelector` parameter: `app=web,tier in (a, b),!canary`.
    ///
    /// # Errors
    /// Says what stands where a key, operator or value was expected.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut requirements = Vec::new();
        for part in split_outside_parentheses(text) {
            let part = part.trim();
            if part.is_empty() {
                if text.trim().is_empty() {
                    continue;
                }
                return Err(SelectorError("found '', expected: !, identifier, or 'end of string'".into()));
            }
            requirements.push(requirement(part)?);
        }
        Ok(LabelSelector { requirements })
    }

    pub fn is_empty(&self) -> bool {
        self.requirements.is_empty()
    }

    pub fn matches<'a>(&self, label: impl Fn(&str) -> Option<&'a str>) -> bool {
        self.requirements.iter().all(|r| match (&r.operator, label(&r.key)) {
            (Operator::In(values), Some(value)) => values.iter().any(|v| v == value),
            (Operator::NotIn(values), Some(value)) => !values.iter().any(|v| v == value),
            (Operator::Exists, found) => found.is_some(),
            (Operator::In(_), None) => false,
            (Operator::NotIn(_), None) => true,
            (Operator::DoesNotExist, found) => found.is_none(),
        })
    }

    pub fn matches_map(&self, labels: &BTreeMap<String, String>) -> bool {
        self.matches(|key| labels.get(key).map(String::as_str))
    }

    /// Against an object's `metadata.labels`.
    pub fn matches_object(&self, object: &Value) -> bool {
        let labels = object.pointer("/metadata/labels");
        self.matches(|key| labels.and_then(|l| l.get(key)).and_then(Value::as_str))
    }
}

fn split_outside_parentheses(text: &str) -> Vec<&str> {
    let (mut depth, mut start, mut parts) = (0i32, 0, Vec::new());
    for (i, c) in text.char_indices() {
        match c {
            '(' => depth += 1,
            ')' => depth -= 1,
            ',' if depth == 0 => {
                parts.push(&text[start..i]);
                start = i + 1;
            }
            _ => {}
        }
    }
    parts.push(&text[start..]);
    parts
}

fn requirement(part: &str) -> Result<Requirement, SelectorError> {
    let new = |key: &str, operator| {
        let key = key.trim();
        if let Some(problem) = crate::names::qualified_name(key).first() {
            return Err(SelectorError(format!("key: Invalid value: {key:?}: {problem}")));
        }
        Ok(Requirement { key: key.into(), operator })
    };
    if let Some(key) = part.strip_prefix('!') {
        return new(key, Operator::DoesNotExist);
    }
    for (symbol, positive) in [("!=", false), ("==", true), ("=", true)] {
        if let Some((key, value)) = part.split_once(symbol) {
            let value = value.trim();
            if let Some(problem) = crate::names::label_value(value).first() {
                return Err(SelectorError(format!("values[0][{}]: Invalid value: {value:?}: {problem}", key.trim())));
            }
            let values = vec![value.to_string()];
            return new(key, if positive { Operator::In(values) } else { Operator::NotIn(values) });
        }
    }
    if let Some((head, rest)) = part.split_once('(') {
        let values: Vec<String> = rest.trim_end().trim_end_matches(')').split(',').map(|v| v.trim().into()).collect();
        let mut words = head.split_whitespace();
        return match (words.next(), words.next(), words.next()) {
            (Some(key), Some("in"), None) => new(key, Operator::In(values)),
            (Some(key), Some("notin"), None) => new(key, Operator::NotIn(values)),
            _ => Err(SelectorError(format!("found '{part}', expected: in, notin, =, ==, !="))),
        };
    }
    if part.contains(char::is_whitespace) {
        return Err(SelectorError(format!("found '{part}', expected: ',' or 'end of string'")));
    }
    new(part, Operator::Exists)
}

/// A parsed `fieldSelector`: paths that equal, or do not equal, a value.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSelector {
    pub terms: Vec<FieldTerm>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldTerm {
    pub path: String,
    pub value: String,
    pub equal: bool,
}

impl FieldSelector {
    /// # Errors
    /// A term without `=`, `==` or `!=`.
    pub fn parse(text: &str) -> Result<Self, SelectorError> {
        let mut terms = Vec::new();
        for part in text.split(',').filter(|p| !p.is_empty()) {
            let (path, value, equal) = if let Some((p, v)) = part.split_once("!=") {
                (p, v, false)
            } else if let Some((p, v)) = part.split_once("==").or_else(|| part.split_once('=')) {
                (p, v, true)
            } else {
                return Err(SelectorError(format!(
                    "invalid field selector: {part:?} has no operator; use =, == or !="
                )));
            };
            terms.push(FieldTerm { path: path.into(), value: value.into(), equal });
        }
        Ok(FieldSelector { terms })
    }

    pub fn is_empty(&self) -> bool {
        self.terms.is_empty()
    }

    /// The value a path must equal, when the selector pins it.
    pub fn pinned(&self, path: &str) -> Option<&str> {
        self.terms.iter().find(|t| t.equal && t.path == path).map(|t| t.value.as_str())
    }

    pub fn matches<'a>(&self, field: impl Fn(&str) -> Option<&'a str>) -> bool {
        self.terms.iter().all(|t| (field(&t.path).unwrap_or("") == t.value) == t.equal)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_select() {
        let labels: BTreeMap<String, String> =
            [("app", "web"), ("tier", "a")].map(|(k, v)| (k.into(), v.into())).into();
        for (text, expected) in [
            ("", true),
            ("app=web", true),
            ("app==web,tier!=b", true),
            ("app in (x, web),tier", true),
            ("app notin (web)", false),
            ("!app", false),
            ("!canary", true),
            ("canary!=x", true),
            ("canary", false),
        ] {
            let selector = LabelSelector::parse(text).expect("the case parses");
            assert_eq!(selector.matches_map(&labels), expected, "{text}");
        }
        for text in ["a b", "=x", "a in b", "a,,b", "a=b=c d"] {
            assert!(LabelSelector::parse(text).is_err(), "{text}");
        }
    }
}
