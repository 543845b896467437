//! What comes in at one port of a Gateway, and where it goes.

use std::sync::Arc;

use api::object::Key;
use tokio_rustls::rustls::ServerConfig;

use super::verify::Identity;
use crate::counts::RouteCounts;
use crate::hosts::HostMap;
use crate::route::{Backends, Route, RouteName};
use crate::table::RouteTable;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Transport {
    Tcp,
    Udp,
}

/// A port of a Gateway, as its clients know it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PortKey {
    pub gateway: Key,
    pub port: u16,
    pub transport: Transport,
}

/// Everything that a port does. Replaced as a whole.
#[derive(Clone, Debug)]
pub struct PortTable {
    /// As clients know it.
    pub number: u16,
    /// What is shown to endpoints that ask over TLS who we are.
    pub identity: Option<Arc<Identity>>,
    pub carries: Carries,
}

#[derive(Clone, Debug)]
pub enum Carries {
    /// By the hosts of listeners: a request is for the most exact one, and for its routes only.
    Http(HostMap<Arc<RouteTable>>),
    Tls(TlsTable),
    /// `None`: no route yet.
    Tcp(Option<Arc<StreamRoute>>),
    Udp(Option<Arc<StreamRoute>>),
}

/// HTTPS and TLS listeners of one port.
#[derive(Clone, Debug)]
pub struct TlsTable {
    /// For HTTP that ends here; the handshake's name decides about the certificate.
    pub https_config: Arc<ServerConfig>,
    /// For what else ends here: it names no protocol of its own.
    pub stream_config: Arc<ServerConfig>,
    pub ways: HostMap<TlsWay>,
    /// As [`Carries::Http`].
    pub http: HostMap<Arc<RouteTable>>,
}

/// What becomes of a connection for a name.
#[derive(Clone, Debug)]
pub enum TlsWay {
    /// Ends here, and carries HTTP.
    Https,
    /// Ends here, and what is in it goes on as it is.
    Terminate(Arc<StreamRoute>),
    /// Goes on as it is.
    Passthrough(Arc<StreamRoute>),
}

/// Where connections or datagrams go that are not HTTP.
#[derive(Clone, Debug)]
pub struct StreamRoute {
    pub name: RouteName,
    pub backends: Backends,
    pub counts: Arc<RouteCounts>,
}

impl PortTable {
    /// Routes of HTTP, for metrics.
    pub fn routes(&self) -> impl Iterator<Item = &Arc<Route>> {
        let hosts = match &self.carries {
            Carries::Http(hosts) => Some(hosts),
            Carries::Tls(tls) => Some(&tls.http),
            Carries::Tcp(_) | Carries::Udp(_) => None,
        };
        hosts.into_iter().flat_map(|hosts| hosts.values()).flat_map(|table| table.routes())
    }

    /// Routes of everything else.
    pub fn streams(&self) -> Vec<Arc<StreamRoute>> {
        match &self.carries {
            Carries::Http(_) => Vec::new(),
            Carries::Tls(tls) => {
                let stream = |way: &TlsWay| match way {
                    TlsWay::Terminate(route) | TlsWay::Passthrough(route) => Some(route.clone()),
                    TlsWay::Https => None,
                };
                tls.ways.values().filter_map(stream).collect()
            }
            Carries::Tcp(route) | Carries::Udp(route) => route.iter().cloned().collect(),
        }
    }
}
