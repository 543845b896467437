//! Who manages which field: `metadata.managedFields`, kept by every write.

use crate::catalog::Row;
use crate::request::RequestInfo;
use jiff::Timestamp;
use serde_json::Value;

/// The manager of a write: `fieldManager`, or the first word of the user agent.
pub fn manager(info: &RequestInfo, user_agent: &str) -> String {
    let named = info.query.get("fieldManager");
    if !named.is_empty() {
        return named.to_string();
    }
    user_agent.split(['/', ' ']).next().filter(|s| !s.is_empty()).unwrap_or("unknown").to_string()
}

/// Records what an ordinary write changed.
pub fn track(row: &Row, before: Option<&Value>, after: &mut Value, manager: &str, subresource: &str, now: Timestamp) {
    let time = api::time::seconds(now);
    let updated = patch::update_managers(before, after, row.schema, manager, &row.api_version(), &time, subresource);
    *after = updated;
}
