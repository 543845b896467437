//! `Status`: what the API answers when it has no object to answer with.

use serde::{Deserialize, Serialize};
use std::fmt;

/// A failure or success of the API (meta/v1 Status).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub code: u16,
    #[serde(default)]
    pub reason: String,
    #[serde(default)]
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub details: Option<Details>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Details {
    #[serde(skip_serializing_if = "String::is_empty")]
    pub name: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub group: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub kind: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    pub uid: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<Cause>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retry_after_seconds: Option<u32>,
}

/// One field's complaint.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cause {
    /// `FieldValueInvalid`, `FieldValueRequired` …
    #[serde(default)]
    pub reason: String,
    #[serde(default)]
    pub message: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub field: String,
}

impl Cause {
    pub fn invalid(field: impl Into<String>, value: impl fmt::Display, detail: impl fmt::Display) -> Cause {
        Cause {
            reason: "FieldValueInvalid".into(),
            message: format!("Invalid value: {value}: {detail}"),
            field: field.into(),
        }
    }

    pub fn required(field: impl Into<String>, detail: &str) -> Cause {
        let message = if detail.is_empty() { "Required value".into() } else { format!("Required value: {detail}") };
        Cause { reason: "FieldValueRequired".into(), message, field: field.into() }
    }

    pub fn duplicate(field: impl Into<String>, value: impl fmt::Display) -> Cause {
        Cause {
            reason: "FieldValueDuplicate".into(),
            message: format!("Duplicate value: {value}"),
            field: field.into(),
        }
    }

    pub fn forbidden(field: impl Into<String>, detail: impl fmt::Display) -> Cause {
        Cause { reason: "FieldValueForbidden".into(), message: format!("Forbidden: {detail}"), field: field.into() }
    }

    pub fn not_found(field: impl Into<String>, value: impl fmt::Display) -> Cause {
        Cause { reason: "FieldValueNotFound".into(), message: format!("Not found: {value}"), field: field.into() }
    }

    pub fn too_long(field: impl Into<String>, max: usize) -> Cause {
        Cause {
            reason: "FieldValueTooLong".into(),
            message: format!("Too long: may not be more than {max} bytes"),
            field: field.into(),
        }
    }

    /// The value is none of `supported`, which is listed sorted and quoted.
    pub fn unsupported(field: impl Into<String>, value: &str, supported: &[&str]) -> Cause {
        let mut sorted: Vec<_> = supported.iter().map(|s| format!("{s:?}")).collect();
        sorted.sort();
        Cause {
            reason: "FieldValueNotSupported".into(),
            message: format!("Unsupported value: {value:?}: supported values: {}", sorted.join(", ")),
            field: field.into(),
        }
    }
}

impl Status {
    pub fn new(code: u16, reason: &str, message: impl Into<String>) -> Status {
        Status { code, reason: reason.into(), message: message.into(), details: None }
    }

    fn named(mut self, group: &str, kind: &str, name: &str) -> Status {
        self.details =
            Some(Details { name: name.into(), group: group.into(), kind: kind.into(), ..Details::default() });
        self
    }

    pub fn bad_request(message: impl Into<String>) -> Status {
        Status::new(400, "BadRequest", message)
    }

    pub fn unauthorized() -> Status {
        Status::new(401, "Unauthorized", "Unauthorized")
    }

    pub fn forbidden(message: impl Into<String>) -> Status {
        Status::new(403, "Forbidden", message)
    }

    /// A rule beyond the caller's rights says no: `namespaces "default" is forbidden: why`.
    pub fn refused(group: &str, plural: &str, name: &str, why: &str) -> Status {
        Status::forbidden(format!("{} {name:?} is forbidden: {why}", qualified(plural, group)))
            .named(group, plural, name)
    }

    /// `plural` as in the URL, with its group: `deployments.apps "web" not found`.
    pub fn not_found(group: &str, plural: &str, name: &str) -> Status {
        let resource = qualified(plural, group);
        Status::new(404, "NotFound", format!("{resource} {name:?} not found")).named(group, plural, name)
    }

    /// For a URL that names no resource.
    pub fn no_such_path() -> Status {
        Status::new(404, "NotFound", "the server could not find the requested resource").named("", "", "")
    }

    pub fn already_exists(group: &str, plural: &str, name: &str) -> Status {
        let resource = qualified(plural, group);
        Status::new(409, "AlreadyExists", format!("{resource} {name:?} already exists")).named(group, plural, name)
    }

    pub fn conflict(group: &str, plural: &str, name: &str, why: &str) -> Status {
        let resource = qualified(plural, group);
        Status::new(409, "Conflict", format!("Operation cannot be fulfilled on {resource} {name:?}: {why}"))
            .named(group, plural, name)
    }

    pub fn stale(group: &str, plural: &str, name: &str) -> Status {
        Status::conflict(
            group,
            plural,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    pub fn invalid(group: &str, kind: &str, name: &str, causes: Vec<Cause>) -> Status {
        let lines: Vec<_> = causes.iter().map(|c| format!("{}: {}", c.field, c.message)).collect();
        let body = match lines.as_slice() {
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        };
        let mut status = Status::new(422, "Invalid", format!("{} {name:?} is invalid: {body}", qualified(kind, group)))
            .named(group, kind, name);
        if let Some(details) = &mut status.details {
            details.causes = causes;
        }
        status
    }

    pub fn gone(message: impl Into<String>) -> Status {
        Status::new(410, "Expired", message)
    }

    pub fn too_large(message: impl Into<String>) -> Status {
        Status::new(413, "RequestEntityTooLarge", message)
    }

    pub fn unsupported_media_type(message: impl Into<String>) -> Status {
        Status::new(415, "UnsupportedMediaType", message)
    }

    pub fn method_not_allowed() -> Status {
        Status::new(405, "MethodNotAllowed", "the server does not allow this method on the requested resource")
    }

    pub fn internal(message: impl fmt::Display) -> Status {
        Status::new(500, "InternalError", format!("Internal error occurred: {message}"))
    }

    pub fn unavailable(message: impl Into<String>) -> Status {
        Status::new(503, "ServiceUnavailable", message)
    }

    pub fn timeout(message: impl Into<String>) -> Status {
        Status::new(504, "Timeout", message)
    }

    pub fn is_not_found(&self) -> bool {
        self.code == 404
    }

    pub fn is_conflict(&self) -> bool {
        self.code == 409
    }

    /// The JSON that goes over the wire.
    pub fn to_json(&self) -> serde_json::Value {
        let mut out = serde_json::json!({
            "kind": "Status", "apiVersion": "v1", "metadata": {},
            "status": if self.code < 400 { "Success" } else { "Failure" },
            "message": self.message, "reason": self.reason, "code": self.code,
        });
        if let (Some(details), Some(map)) = (&self.details, out.as_object_mut()) {
            map.insert("details".into(), serde_json::to_value(details).unwrap_or_default());
        }
        out
    }
}

fn qualified(plural: &str, group: &str) -> String {
    if group.is_empty() { plural.to_string() } else { format!("{plural}.{group}") }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Status {}
