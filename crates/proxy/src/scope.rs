//! The endpoints of a frontend that this node uses, for one address family.

use services::{Endpoint, Frontend, categorize_endpoints};

use crate::NodeView;

/// Endpoints of each scope in slot order.
pub(crate) struct Scopes<'a> {
    pub cluster: Vec<&'a Endpoint>,
    pub local: Vec<&'a Endpoint>,
    /// An endpoint of this family is usable somewhere: an empty scope drops instead of rejecting.
    pub any: bool,
}

pub(crate) fn scopes<'a>(frontend: &'a Frontend, node: &NodeView, v6: bool) -> Scopes<'a> {
    let categories = categorize_endpoints(frontend, &node.place, v6);
    let choose = |all: Vec<&'a Endpoint>| {
        let left = |endpoint: &&&Endpoint| !node.ejected.contains(&(endpoint.address, frontend.name.protocol));
        let answering: Vec<&Endpoint> = all.iter().filter(left).copied().collect();
        // Better one that may not answer than none.
        if answering.is_empty() { all } else { answering }
    };
    Scopes { cluster: choose(categories.cluster), local: choose(categories.local), any: categories.any }
}
