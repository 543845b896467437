//! Who asks, and what they may.

pub mod authenticate;
pub mod node;
pub mod rbac;
pub mod token;

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
