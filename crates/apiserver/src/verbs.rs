//! The verbs, each written once over rows.

mod delete;
mod read;
mod review;
mod watch;
mod write;

pub use delete::{delete, delete_collection};
pub use read::{get, list};
pub use review::review;
pub use watch::watch;
pub use write::{change, create, patch, update};

use crate::auth::Identity;
use crate::catalog::Row;
use crate::registry::Registry;
use crate::request::RequestInfo;
use bytes::Bytes;
use http::HeaderMap;
use std::sync::Arc;

/// One request to a resource, as verbs see it.
pub struct Call {
    pub registry: Arc<Registry>,
    pub row: Arc<Row>,
    pub info: RequestInfo,
    pub headers: HeaderMap,
    pub who: Identity,
    pub body: Bytes,
}

impl Call {
    pub fn user_agent(&self) -> &str {
        self.headers.get("user-agent").and_then(|v| v.to_str().ok()).unwrap_or("")
    }

    /// What the rows of a table are to carry of their objects.
    pub fn include(&self) -> Result<crate::table::Include, api::Status> {
        crate::table::Include::parse(self.info.query.get("includeObject"))
    }

    pub fn not_found(&self) -> api::Status {
        api::Status::not_found(&self.row.group, &self.row.plural, &self.info.name)
    }
}

/// Refuses a write whose `dryRun` is misspelled: it must not be done in earnest.
pub fn known_dry_run(call: &Call) -> Result<(), api::Status> {
    let options = match call.info.verb {
        "create" => "CreateOptions",
        "update" => "UpdateOptions",
        "patch" => "PatchOptions",
        "delete" | "deletecollection" => "DeleteOptions",
        _ => return Ok(()),
    };
    check_dry_run(options, call.info.query.all("dryRun").iter().map(String::as_str))
}

pub fn check_dry_run<'a>(options: &str, values: impl Iterator<Item = &'a str>) -> Result<(), api::Status> {
    let values: Vec<String> = values.filter(|v| !v.is_empty()).map(|v| format!("{v:?}")).collect();
    if values.iter().all(|v| v == "\"All\"") {
        return Ok(());
    }
    let cause = api::Cause {
        reason: "FieldValueNotSupported".into(),
        message: format!("Unsupported value: []string{{{}}}: supported values: \"All\"", values.join(", ")),
        field: "dryRun".into(),
    };
    Err(api::Status::invalid("meta.k8s.io", options, "", vec![cause]))
}

/// Five characters that spell no word, as `generateName` appends them.
pub fn random_suffix() -> String {
    const ALPHABET: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    random_bytes::<5>().iter().map(|b| char::from(ALPHABET[usize::from(*b) % ALPHABET.len()])).collect()
}

/// A random uid (RFC 9562 version 4).
pub fn random_uid() -> String {
    let mut b = random_bytes::<16>();
    b[6] = b[6] & 0x0f | 0x40;
    b[8] = b[8] & 0x3f | 0x80;
    let hex: String = b.iter().map(|b| format!("{b:02x}")).collect();
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

fn random_bytes<const N: usize>() -> [u8; N] {
    let mut bytes = [0u8; N];
    getrandom::fill(&mut bytes).expect("the kernel gives random bytes");
    bytes
}
