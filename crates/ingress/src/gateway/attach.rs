//! Which listeners a route may come in at.

use api::object::Key;

use super::RouteType;
use super::attached::Spot;
use super::condition::Problem;
use super::listeners::{Held, World};
use super::objects::{AnyRoute, GROUP, Reference};
use crate::host::HostPattern;

/// Whether a parentRef of a route of `namespace` means this Gateway or ListenerSet.
pub fn means(reference: &Reference, namespace: &str, kind: &str, key: &Key) -> bool {
    reference.is(GROUP, kind, (GROUP, "Gateway")) && reference.key(namespace) == *key
}

/// The listeners (by their place in `listeners`) that the route attaches to, with the hosts that both have.
///
/// # Errors
/// Why there are none, as the condition Accepted says it.
pub fn attach(
    world: &World<'_>,
    kind: RouteType,
    route: &AnyRoute,
    parent: &Reference,
    listeners: &[Held],
) -> Result<Vec<Spot>, Problem> {
    let namespace = &route.metadata.namespace;
    let named: Vec<usize> = (0..listeners.len())
        .filter(|at| {
            let held = &listeners[*at];
            means(parent, namespace, held.owner.kind, &held.owner.key)
                && parent.section_name.as_ref().is_none_or(|name| *name == held.spec.name)
                && parent.port.is_none_or(|port| port == held.spec.port)
        })
        .collect();
    if named.is_empty() {
        let message = match (&parent.section_name, parent.port) {
            (Some(name), Some(port)) => format!("{} has no listener {name} with port {port}", parent.name),
            (Some(name), None) => format!("{} has no listener {name}", parent.name),
            (None, Some(port)) => format!("{} has no listener with port {port}", parent.name),
            (None, None) => format!("{} has no listeners", parent.name),
        };
        return Err(Problem::new("NoMatchingParent", message));
    }
    let allowed: Vec<usize> = named
        .into_iter()
        .filter(|at| {
            let held = &listeners[*at];
            let home = &held.owner.key.namespace;
            held.kinds.contains(&kind) && world.lets_in(&held.spec.allowed_routes.namespaces, "Same", home, namespace)
        })
        .collect();
    if allowed.is_empty() {
        let message = format!("no listener's allowedRoutes has {} of namespace {namespace} in it", kind.kind());
        return Err(Problem::new("NotAllowedByListeners", message));
    }
    let hosts = hosts(kind, route)?;
    let mut met: Vec<Spot> = allowed
        .into_iter()
        .flat_map(|at| hosts.iter().filter_map(move |host| Some((at, host.meet(&listeners[at].host)?))))
        .collect();
    met.sort();
    met.dedup();
    if met.is_empty() {
        let message = "none of spec.hostnames is one of a listener's".to_owned();
        return Err(Problem::new("NoMatchingListenerHostname", message));
    }
    Ok(met)
}

fn hosts(kind: RouteType, route: &AnyRoute) -> Result<Vec<HostPattern>, Problem> {
    if route.spec.hostnames.is_empty() || matches!(kind, RouteType::Tcp | RouteType::Udp) {
        return Ok(vec![HostPattern::Any]);
    }
    let read = route.spec.hostnames.iter().map(|text| HostPattern::of_gateway(text));
    read.collect::<Result<Vec<_>, _>>()
        .map_err(|problem| Problem::new("UnsupportedValue", format!("spec.hostnames {problem}")))
}
