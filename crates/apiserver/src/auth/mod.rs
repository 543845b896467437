//! Who asks, and what they may.

pub mod authenticate;
pub mod escalation;
pub mod impersonate;
pub mod named;
pub mod node;
pub mod rbac;
pub mod token;

use api::Status;
use rbac::Attributes;

/// A caller as RBAC sees it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    pub user: String,
    pub groups: Vec<String>,
    pub uid: String,
    /// The pod and node a service account token is bound to.
    pub extra: Vec<(String, String)>,
}

pub const AUTHENTICATED: &str = "system:authenticated";
pub const UNAUTHENTICATED: &str = "system:unauthenticated";
/// Members may do everything, whatever RBAC says.
pub const MASTERS: &str = "system:masters";

impl Identity {
    /// A known user.
    pub fn user(name: &str, groups: &[&str]) -> Identity {
        let mut groups: Vec<String> = groups.iter().map(|g| (*g).to_string()).collect();
        groups.push(AUTHENTICATED.into());
        Identity { user: name.into(), groups, ..Identity::default() }
    }

    /// A service account.
    pub fn service_account(namespace: &str, name: &str) -> Identity {
        Identity::user(
            &format!("system:serviceaccount:{namespace}:{name}"),
            &["system:serviceaccounts", &format!("system:serviceaccounts:{namespace}")],
        )
    }

    pub fn anonymous() -> Identity {
        Identity { user: "system:anonymous".into(), groups: vec![UNAUTHENTICATED.into()], ..Identity::default() }
    }

    pub fn is_master(&self) -> bool {
        self.groups.iter().any(|g| g == MASTERS)
    }

    /// The node whose kubelet this is.
    pub fn node(&self) -> Option<&str> {
        let is_node = self.groups.iter().any(|g| g == "system:nodes");
        self.user.strip_prefix("system:node:").filter(|_| is_node)
    }
}

/// The refusal of who lacks a right.
pub(crate) fn forbidden(who: &Identity, asked: &Attributes) -> Status {
    let message = match &asked.path {
        Some(path) => format!("forbidden: User {:?} cannot {} path {path:?}", who.user, asked.verb),
        None => {
            let resource = if asked.subresource.is_empty() {
                asked.plural.clone()
            } else {
                format!("{}/{}", asked.plural, asked.subresource)
            };
            let qualified =
                if asked.group.is_empty() { asked.plural.clone() } else { format!("{}.{}", asked.plural, asked.group) };
            let named = if asked.name.is_empty() { String::new() } else { format!(" {:?}", asked.name) };
            let scope = if asked.namespace.is_empty() {
                "at the cluster scope".to_string()
            } else {
                format!("in the namespace {:?}", asked.namespace)
            };
            format!(
                "{qualified}{named} is forbidden: User {:?} cannot {} resource {resource:?} in API group {:?} {scope}",
                who.user, asked.verb, asked.group
            )
        }
    };
    let mut status = Status::forbidden(message);
    if asked.path.is_none() {
        status.details = Some(api::status::Details {
            name: asked.name.clone(),
            group: asked.group.clone(),
            kind: asked.plural.clone(),
            ..Default::default()
        });
    }
    status
}
