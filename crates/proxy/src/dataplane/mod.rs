//! What a proxy mode provides. A new one is a folder here and an arm in `run`; the case files, the packet tracer and the
//! namespace tests then run for it too.

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::fmt::Display;
use std::net::SocketAddr;
use std::time::Duration;

use services::{Frontend, FrontendId, Seed};

use crate::{Error, NodeView, Pods};

pub mod ebpf;
pub(crate) mod frame;
pub mod iptables;
pub mod ipvs;
pub mod nftables;
pub mod userspace;

/// For each address that clients use: who may answer.
pub type Answerers = HashMap<SocketAddr, HashSet<SocketAddr>>;

/// What a mode leaves behind in this process; dropping it ends it.
pub type Kept = Option<Box<dyn Any + Send>>;

/// The entries of one frontend before and after.
#[derive(Clone, Debug, PartialEq)]
pub struct Change<E> {
    pub id: FrontendId,
    pub before: Option<E>,
    pub after: Option<E>,
}

/// A table that belongs to the proxy alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OwnTable {
    pub family: linux::nft::Family,
    pub name: &'static str,
    /// The netlink port of the socket that may change it.
    pub port: u32,
}

/// A way to make the kernel send a Service's packets to its endpoints.
pub trait Dataplane: Send + 'static {
    /// What is there without any Service.
    type Base: Display + PartialEq + Send;
    /// What one frontend adds. A plan is the ordered collection of these; only tests and `explain` build one.
    type Entries: Display + PartialEq + Send;

    fn base(node: &NodeView) -> Self::Base;
    fn entries(frontend: &Frontend, node: &NodeView) -> Self::Entries;

    /// Whether this node can be served at all; asked before anything is committed. A mode that can tell pods by the
    /// interface they are behind says so here.
    fn check(node: &NodeView) -> Result<(), Error> {
        match node.pods {
            Pods::Cidrs(_) => Ok(()),
            Pods::Bridge(_) | Pods::InterfacePrefix(_) => Err(Error::PodsByInterface),
        }
    }

    /// What holds the rules, and how a person looks at them.
    fn about(&self) -> String;

    /// Reads what the kernel holds, so that the next commit changes only what differs.
    fn read(&mut self) -> Result<Seed, Error>;

    /// Commits all or nothing. With a base, the changes are the whole plan: what none of them mentions goes.
    fn commit(&mut self, base: Option<&Self::Base>, changes: &[Change<Self::Entries>]) -> Result<(), Error>;

    /// The last of it that this process must hold on to for a while, when another mode takes over: connections that were
    /// sent to it may not have arrived. Its rules stay in the kernel until then anyway.
    fn retire(self) -> Kept
    where
        Self: Sized,
    {
        None
    }

    /// Does what only time brings, such as forgetting an endpoint whose last connection has closed. Called after each
    /// commit, and again after the time it returns.
    fn tend(&mut self) -> Result<Option<Duration>, Error> {
        Ok(None)
    }

    /// Who answers UDP flows, as the kernel sees it, given the endpoints that may: others' flows are forgotten.
    fn answerers(&self, endpoints: Answerers) -> Answerers {
        endpoints
    }

    /// What of the Service this mode cannot do.
    fn unsupported(_entries: &Self::Entries) -> Option<&'static str> {
        None
    }

    /// The nftables table that nobody else is to change.
    fn own_table(&self) -> Option<OwnTable> {
        None
    }

    /// Somebody has changed more of it than elements: the next whole plan writes all of it anew.
    fn distrust(&mut self) {}
}
