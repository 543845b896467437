//! Gateway API: Gateways, ListenerSets and the five kinds of routes become tables of ports, and what is to be said of each.
//!
//! Everything here is pure: objects in ([`GatewayCompiler::set`]), an [`Outcome`] out.

mod assemble;
mod attach;
mod attached;
mod backends;
mod compiler;
mod condition;
mod grants;
mod listeners;
mod objects;
mod ports;
mod rules;
mod status;
mod store;
mod trust;
mod verify;

pub use compiler::{GatewayCompiler, Outcome, WantedGateway};
pub use objects::{AnyRoute, BackendTlsPolicy, Gateway, GatewayClass, ListenerSet, Namespace, ReferenceGrant};
pub use ports::{Carries, PortKey, PortTable, StreamRoute, TlsTable, TlsWay, Transport};
pub use status::StatusOf;
pub use store::{GatewayObject, ObjectKind};
pub use verify::{BackendTls, CaState, Identity, Name};

/// What a GatewayClass of ours names as its controller.
pub const CONTROLLER: &str = "fairlead.io/gateway-controller";
/// The class that `fairlead` clusters have from the start.
pub const CLASS: &str = "fairlead";

/// The kinds of routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RouteType {
    Http,
    Grpc,
    Tls,
    Tcp,
    Udp,
}

impl RouteType {
    pub const ALL: [RouteType; 5] = [RouteType::Http, RouteType::Grpc, RouteType::Tls, RouteType::Tcp, RouteType::Udp];

    pub fn kind(self) -> &'static str {
        match self {
            RouteType::Http => "HTTPRoute",
            RouteType::Grpc => "GRPCRoute",
            RouteType::Tls => "TLSRoute",
            RouteType::Tcp => "TCPRoute",
            RouteType::Udp => "UDPRoute",
        }
    }
}
