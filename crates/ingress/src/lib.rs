//! Ingress and Gateway objects become routes and upstreams, and the proxy that requests go through.
//!
//! [`Compiler`] takes objects in and gives tables out, without I/O: [`RouteTable`] from a request to its [`Route`],
//! [`Certificates`] by name. The proxy reads both through a [`Swap`].

mod annotations;
mod basic;
mod budget;
mod certificates;
mod class;
mod clients;
mod compile;
mod cors;
mod counts;
mod crypto;
mod error;
mod external;
pub mod gateway;
mod headers;
mod host;
mod hosts;
mod limits;
mod objects;
mod pages;
mod policy;
mod proxy;
mod registry;
mod rewrites;
mod route;
mod sticky;
mod swap;
mod table;
mod tls;
mod translate;
mod upstream;
mod url;
mod variables;

pub use basic::{Basic, Users};
pub use certificates::{Certificates, Resolver, fallback, read_tls};
pub use class::{CLASS, CONTROLLER, Classes};
pub use clients::{Asks, ClientAuth};
pub use compile::{Compiler, SecretState};
pub use cors::Cors;
pub use counts::RouteCounts;
pub use error::IngressError;
pub use external::External;
pub use headers::{HeadersState, SetHeaders};
pub use host::{HostPattern, host_of};
pub use hosts::HostMap;
pub use limits::{RateLimits, TooMany, UnderWay};
pub use objects::{Ingress, IngressClass, LoadBalancerIngress};
pub use pages::Pages;
pub use policy::{AnswerHeaders, BackendProtocol, Balance, Policy, ProxyProtocol, Rate, Retry, StatusSet};
pub use proxy::{Limits, LogFormat, OpenPorts, PortOpener, Proxy, ProxyConfig, Readiness};
pub use registry::Slot;
pub use rewrites::{CookieChanges, Replacement};
pub use route::{
    Action, Ask, Backends, Canary, Filter, HeaderChanges, Instead, Matches, MirrorTo, PathMatch, PathRewrite, Redirect,
    Route, RouteName, ValueMatch, WeightedBackend, cookie,
};
pub use sticky::{Affinity, Wish};
pub use swap::Swap;
pub use table::{PathTable, RouteTable};
pub use translate::{Fault, Register, Translated, WantedCertificate, translate};
pub use upstream::{Endpoint, PortRef, Problem, Targets, Upstream, UpstreamKey, Upstreams};
