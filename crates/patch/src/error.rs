//! What can be wrong with a patch, in the words Kubernetes uses, so that clients which match on them keep working.

use std::fmt::Write as _;

use thiserror::Error;

/// Why a JSON, merge or strategic merge patch was refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum PatchError {
    /// The body is not a patch of the announced type: a 400.
    #[error("{0}")]
    Malformed(String),
    /// More operations, copied bytes or nesting than one request may cause: a 413.
    #[error("{0}")]
    TooLarge(String),
    /// The patch is well-formed but does not fit the object, or contradicts itself: a 422.
    #[error("{0}")]
    DoesNotApply(String),
}

/// One field that the applied configuration would take from another manager.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Conflict {
    /// The other manager as Kubernetes prints it, such as `"kubectl-client-side-apply" using apps/v1`.
    pub manager: String,
    /// The field, such as `.spec.template.spec.containers[name="nginx"].image`.
    pub field: String,
}

impl Conflict {
    /// The message of this conflict's cause in a `Status`, whose type is `FieldManagerConflict`.
    pub fn message(&self) -> String {
        format!("conflict with {}", self.manager)
    }
}

/// Why a server-side apply was refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum ApplyError {
    /// Others own fields that the configuration would change: a 409 with one cause per field. `force` takes them.
    #[error("{}", conflict_sentence(.0))]
    Conflicts(Vec<Conflict>),
    /// The request contradicts itself, such as another apiVersion than the URL's: a 400.
    #[error("{0}")]
    Malformed(String),
    /// The configuration does not fit the schema.
    #[error("failed to create typed patch object ({object}): {reason}")]
    Untyped {
        /// `namespace/name; apiVersion, Kind=kind` of the applied configuration.
        object: String,
        /// Path and problem, such as `.spec.replica: field not declared in schema`.
        reason: String,
    },
}

fn conflict_sentence(conflicts: &[Conflict]) -> String {
    if let [only] = conflicts {
        return format!("Apply failed with 1 conflict: {}: {}", only.message(), only.field);
    }
    let mut sorted: Vec<&Conflict> = conflicts.iter().collect();
    // Stable, so that fields of one manager keep the order of the field set.
    sorted.sort_by(|a, b| a.manager.cmp(&b.manager));
    let mut text = format!("Apply failed with {} conflicts: ", conflicts.len());
    let mut manager = None;
    for conflict in sorted {
        if manager != Some(&conflict.manager) {
            let separator = if manager.is_some() { "\n" } else { "" };
            let _ = write!(text, "{separator}conflicts with {}:", conflict.manager);
            manager = Some(&conflict.manager);
        }
        let _ = write!(text, "\n- {}", conflict.field);
    }
    text
}
