//! How a node's proxy is doing, for whoever wants to know.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{Display, Formatter};
use std::sync::Arc;

use services::{FrontendId, PortName};
use tokio::sync::watch;

use crate::Mode;
use crate::applied::AppliedSlices;
use crate::watch::Target;

/// How the proxy is doing.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Status {
    /// The kernel has held a whole plan since the start.
    pub synced: bool,
    /// The mode whose whole plan the kernel holds, without other modes' leftovers; `None` before the first.
    pub mode: Option<Mode>,
    pub commits: u64,
    /// Frontends whose last change is not in the kernel yet.
    pub pending: usize,
    /// Why the last commit failed; `None` after one that did not.
    pub error: Option<String>,
    /// What holds the rules, and how to look at them.
    pub about: String,
    /// The slice versions that the kernel follows; the same `Arc` as long as they do not change.
    pub applied: Arc<AppliedSlices>,
    /// How often an endpoint left the pick because it did not answer.
    pub ejections: u64,
    /// First packets that were sent to another endpoint, or will be when the client repeats them.
    pub retries: u64,
    /// Endpoints that are out now. Of each Service at most half are, whatever is held against them.
    pub ejected: BTreeSet<Target>,
    /// Why endpoints that do not answer go unnoticed; `None` if they do not.
    pub watch_error: Option<String>,
    /// Service ports that ask for what the mode cannot do, and what that is.
    pub unsupported: BTreeMap<FrontendId, Unsupported>,
    /// How often somebody else's change of the proxy's own table was made undone.
    pub repairs: u64,
}

pub type StatusHandle = watch::Receiver<Status>;

/// What a Service asks for in vain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unsupported {
    pub name: PortName,
    /// Sentences, each of which says what to do.
    pub what: Vec<&'static str>,
}

impl Display for Unsupported {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.name, self.what.join("; "))
    }
}
