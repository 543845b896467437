//! Request, decision, store, watch: the generic API engine.
//!
//! A request's URL becomes a [`RequestInfo`]; the caller is known and allowed; the verb runs over the kind's row of the
//! [`Catalog`]; the store commits; its one watch stream fills the caches that answer reads and watches.

pub mod auth;
pub mod body;
pub mod bootstrap;
pub mod cache;
pub mod catalog;
mod decode;
mod discovery;
mod json;
mod managed;
mod openapi;
mod openapi_v2;
mod registry;
mod request;
mod server;
mod strategy;
mod subresources;
mod table;
mod verbs;

pub use auth::Identity;
pub use catalog::{Catalog, Row};
pub use registry::Allocation;
pub use request::RequestInfo;
pub use server::{ApiServer, Config};
pub use subresources::{BoxedIo, Connector};
