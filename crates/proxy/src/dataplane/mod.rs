//! What a proxy mode provides. A new one is a folder here and an arm in `run`; the case files, the packet tracer and the
//! namespace tests then run for it too.

use std::any::Any;
use std::collections::{HashMap, HashSet};
use std::fmt::Display;
use std::net::SocketAddr;

use services::{Frontend, FrontendId, Seed};

use crate::{Error, NodeView};

pub mod ebpf;
pub mod iptables;
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

/// A way to make the kernel send a Service's packets to its endpoints.
pub trait Dataplane: Send + 'static {
    /// What is there without any Service.
    type Base: Display + PartialEq + Send;
    /// What one frontend adds. A plan is the ordered collection of these; only tests and `explain` build one.
    type Entries: Display + PartialEq + Send;

    fn base(node: &NodeView) -> Self::Base;
    fn entries(frontend: &Frontend, node: &NodeView) -> Self::Entries;

    /// Whether this node can be served at all; asked before anything is committed.
    fn check(_node: &NodeView) -> Result<(), Error> {
        Ok(())
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

    /// Who answers UDP flows, as the kernel sees it, given the endpoints that may: others' flows are forgotten.
    fn answerers(&self, endpoints: Answerers) -> Answerers {
        endpoints
    }
}
