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
    let categories = categorize_endpoints(frontend, &node.place);
    let of_family = |endpoint: &&Endpoint| endpoint.address.is_ipv6() == v6;
    let choose = |endpoints: Vec<&'a Endpoint>| {
        let all: Vec<&Endpoint> = endpoints.into_iter().filter(of_family).collect();
        let left = |endpoint: &&&Endpoint| !node.ejected.contains(&(endpoint.address, frontend.name.protocol));
        let answering: Vec<&Endpoint> = all.iter().filter(left).copied().collect();
        // Better one that may not answer than none.
        if answering.is_empty() { all } else { answering }
    };
    let usable = |endpoint: &Endpoint| endpoint.ready || (endpoint.serving && endpoint.terminating);
    Scopes {
        cluster: choose(categories.cluster),
        local: choose(categories.local),
        any: frontend.endpoints.iter().any(|endpoint| of_family(&&**endpoint) && usable(endpoint)),
    }
}
