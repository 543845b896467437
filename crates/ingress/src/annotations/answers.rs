//! Reads what an Ingress says about its answers: error pages, headers, and how fast bodies go.

use std::num::NonZeroU64;

use super::read;
use crate::policy::{Rate, StatusSet};

/// The annotations before they are put together.
#[derive(Default)]
pub struct Draft {
    statuses: Option<StatusSet>,
    /// The Service of error pages.
    backend: Option<Box<str>>,
    headers: Option<Box<str>>,
    kilobytes: u32,
    after: u32,
}

/// What they come to.
#[derive(Clone, Debug, Default)]
pub struct Answers {
    /// The Service of error pages, and for which statuses.
    pub pages: Option<(Box<str>, StatusSet)>,
    /// The ConfigMap of headers of every answer.
    pub headers: Option<Box<str>>,
    pub rate: Option<Rate>,
}

impl Draft {
    pub fn read(&mut self, key: &str, namespace: &str, text: &str) -> Option<Result<(), String>> {
        Some(match key {
            "custom-http-errors" => statuses(text).map(|statuses| self.statuses = Some(statuses)),
            "default-backend" => read::own_name(text, namespace, "Service").map(|name| self.backend = Some(name)),
            "custom-headers" => read::own_name(text, namespace, "ConfigMap").map(|name| self.headers = Some(name)),
            "limit-rate" => read::number(text).map(|count| self.kilobytes = count),
            "limit-rate-after" => read::number(text).map(|count| self.after = count),
            _ => return None,
        })
    }

    /// Statuses are named, and nobody gives pages for them.
    pub fn lacks_backend(&self) -> bool {
        self.statuses.is_some() && self.backend.is_none()
    }

    pub fn finish(self) -> Answers {
        let bytes = NonZeroU64::new(u64::from(self.kilobytes) * 1024);
        Answers {
            pages: self.backend.map(|backend| (backend, self.statuses.unwrap_or_default())),
            headers: self.headers,
            rate: bytes.map(|bytes| Rate { bytes, after: u64::from(self.after) * 1024 }),
        }
    }
}

fn statuses(text: &str) -> Result<StatusSet, String> {
    let mut all = StatusSet::default();
    for one in text.split(',').map(str::trim).filter(|one| !one.is_empty()) {
        match one.parse::<u16>() {
            Ok(status @ 400..=599) => all.insert(status),
            _ => return Err(format!("holds {one:?}; write statuses from 400 to 599, by comma")),
        }
    }
    match all.is_empty() {
        true => Err("names no status".to_owned()),
        false => Ok(all),
    }
}
