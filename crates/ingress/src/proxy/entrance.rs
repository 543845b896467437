//! Where clients come in, and whose routes their requests have then: those of all Ingresses, or those of one port of a Gateway.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;

use super::shared::Shared;
use crate::gateway::{Carries, Identity, PortTable, Transport};
use crate::hosts::HostMap;
use crate::route::{Ask, Route};
use crate::swap::Swap;
use crate::table::RouteTable;

/// Where Gateways' clients come in, and what the ports do. What a port does may change while it is open.
pub type OpenPorts = BTreeMap<(SocketAddr, Transport), Arc<Swap<PortTable>>>;

#[derive(Clone)]
pub enum Entrance {
    Ingress { is_tls: bool },
    Gateway(Arc<Swap<PortTable>>),
}

/// Why a request has no route.
pub enum NoRoute {
    Unknown,
    /// The connection's handshake was for another listener (RFC 9110 15.5.20).
    Misdirected,
}

impl Entrance {
    /// `name` is what the connection's handshake asked for.
    pub fn find(&self, shared: &Shared, ask: &Ask<'_>, name: Option<&str>) -> Result<Arc<Route>, NoRoute> {
        match self {
            Entrance::Ingress { .. } => shared.routes.load().find(ask).cloned().ok_or(NoRoute::Unknown),
            Entrance::Gateway(port) => {
                let table = port.load();
                let hosts = match &table.carries {
                    Carries::Http(hosts) => hosts,
                    Carries::Tls(tls) => &tls.http,
                    Carries::Tcp(_) | Carries::Udp(_) => return Err(NoRoute::Unknown),
                };
                find(hosts, ask, name)
            }
        }
    }

    /// What is shown to endpoints that ask over TLS who we are.
    pub fn identity(&self) -> Option<Arc<Identity>> {
        match self {
            Entrance::Ingress { .. } => None,
            Entrance::Gateway(port) => port.load().identity.clone(),
        }
    }
}

fn find(hosts: &HostMap<Arc<RouteTable>>, ask: &Ask<'_>, name: Option<&str>) -> Result<Arc<Route>, NoRoute> {
    let listener = hosts.find(ask.host).ok_or(NoRoute::Unknown)?;
    let of_name = name.and_then(|name| hosts.find(name));
    if of_name.is_some_and(|other| !Arc::ptr_eq(listener, other)) {
        return Err(NoRoute::Misdirected);
    }
    listener.find(ask).cloned().ok_or(NoRoute::Unknown)
}
