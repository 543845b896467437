//! Conditions of statuses, as Gateway API names them.

use serde_json::{Value, json};

/// One condition, without the times that whoever writes it adds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Condition {
    pub kind: &'static str,
    pub status: bool,
    pub reason: &'static str,
    pub message: String,
}

impl Condition {
    pub fn yes(kind: &'static str, reason: &'static str) -> Self {
        Condition { kind, status: true, reason, message: String::new() }
    }

    pub fn no(kind: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Condition { kind, status: false, reason, message: message.into() }
    }

    pub fn json(&self, generation: i64) -> Value {
        json!({
            "type": self.kind, "status": if self.status { "True" } else { "False" }, "reason": self.reason,
            "message": self.message, "observedGeneration": generation,
        })
    }
}

/// A problem that makes a condition false.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    pub reason: &'static str,
    pub message: String,
}

impl Problem {
    pub fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Problem { reason, message: message.into() }
    }
}

/// True unless there is a problem; of several the first counts, and all are told of.
pub fn unless(kind: &'static str, good: &'static str, problems: &[Problem]) -> Condition {
    let Some(first) = problems.first() else { return Condition::yes(kind, good) };
    let messages: Vec<&str> = problems.iter().map(|problem| problem.message.as_str()).collect();
    Condition::no(kind, first.reason, messages.join("; "))
}
