//! Acting as somebody else, for those who may: each part of the other identity is a right of its own.

use super::rbac::Attributes;
use super::{AUTHENTICATED, Identity, UNAUTHENTICATED, forbidden};
use crate::registry::Registry;
use api::Status;
use http::HeaderMap;
use percent_encoding::percent_decode_str;

const EXTRA: &str = "impersonate-extra-";

/// The identity that the `Impersonate-*` headers ask for, or the caller's own without them.
///
/// # Errors
/// 403 for who may not; 400 for a group, uid or extra field without a user.
pub fn impersonate(registry: &Registry, who: Identity, headers: &HeaderMap) -> Result<Identity, Status> {
    let all = |name: &str| -> Vec<String> {
        headers.get_all(name).iter().filter_map(|v| v.to_str().ok()).map(str::to_string).collect()
    };
    let user = all("impersonate-user").into_iter().next().unwrap_or_default();
    let groups = all("impersonate-group");
    let uid = all("impersonate-uid").into_iter().next().unwrap_or_default();
    let mut extra: Vec<(String, String)> = Vec::new();
    for (name, value) in headers {
        if let Some(key) = name.as_str().strip_prefix(EXTRA) {
            let key = percent_decode_str(key).decode_utf8_lossy().into_owned();
            extra.push((key, value.to_str().unwrap_or("").to_string()));
        }
    }
    if user.is_empty() {
        if groups.is_empty() && uid.is_empty() && extra.is_empty() {
            return Ok(who);
        }
        return Err(Status::bad_request("groups, uid and extra cannot be impersonated without Impersonate-User"));
    }
    let account = user.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    let ask = |group: &str, plural: &str, subresource: &str, namespace: &str, name: &str| {
        let asked = Attributes {
            verb: "impersonate".into(),
            group: group.into(),
            plural: plural.into(),
            subresource: subresource.into(),
            namespace: namespace.into(),
            name: name.into(),
            path: None,
        };
        if registry.rbac.allows(registry, &who, &asked) { Ok(()) } else { Err(forbidden(&who, &asked)) }
    };
    match account {
        Some((namespace, name)) => ask("", "serviceaccounts", "", namespace, name)?,
        None => ask("", "users", "", "", &user)?,
    }
    for group in &groups {
        ask("", "groups", "", "", group)?;
    }
    if !uid.is_empty() {
        ask("authentication.k8s.io", "uids", "", "", &uid)?;
    }
    for (key, value) in &extra {
        ask("authentication.k8s.io", "userextras", key, "", value)?;
    }
    let mut identity = Identity { user, groups, uid, extra };
    if let Some((namespace, _)) = identity.user.strip_prefix("system:serviceaccount:").and_then(|r| r.split_once(':'))
        && identity.groups.is_empty()
    {
        identity.groups = vec!["system:serviceaccounts".into(), format!("system:serviceaccounts:{namespace}")];
    }
    let everybody = if identity.user == "system:anonymous" { UNAUTHENTICATED } else { AUTHENTICATED };
    if !identity.groups.iter().any(|g| g == everybody) {
        identity.groups.push(everybody.into());
    }
    Ok(identity)
}
