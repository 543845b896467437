//! Ejection and first-packet retry: an endpoint that does not answer leaves the pick, and the client whose first packet
//! found it is sent to another one.
//!
//! Nothing here is on a packet's path, and at rest nothing runs. The kernel tells when there are new connections at all,
//! and which ones are refused; whether somebody answers is then looked up in the connection table.
//!
//! - `evidence`: what is held against each endpoint, and when it is tried again; pure
//! - `queues`: which listeners take nobody from their queues; pure
//! - `backlog`: looks into the queues of this machine's pods
//! - `source`: what is looked at, and where the kernel tells
//! - `suspects`: which flows have gone unanswered for too long; pure
//! - `members`: from which addresses a connection could go elsewhere, and who listens here
//! - `table`, `layout`: the rules and sets by which the kernel tells, and holds refusals back
//! - `maps`: the same with what the ebpf mode's programs count
//! - `relayed`: the same for relays, which see by themselves who does not answer
//! - `task`: waits, looks, tells the commit loop who is out

mod backlog;
mod evidence;
mod layout;
mod maps;
mod members;
mod queues;
pub(crate) mod relayed;
mod source;
mod suspects;
mod table;
mod task;

pub use evidence::{Evidence, Target};
pub(crate) use layout::connections;
pub(crate) use members::Alternatives;
pub(crate) use table::{WatchTable, remove};
pub(crate) use task::Watcher;
use task::start;

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use services::{ServiceKey, ServiceTable};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::dataplane::ebpf::contacts::Settings;
use crate::run::pinned;
use crate::{Config, Error, Feature, Features, Feed, Mode, Status, leftovers};

/// What is done for requests whose endpoint does not answer. All of it is on by default.
#[derive(Clone)]
pub struct Watching {
    /// Endpoints that do not answer leave the pick until they do.
    pub ejection: bool,
    /// A first packet that nobody answers, or that is refused, is sent to another endpoint when the client repeats it.
    pub retry: bool,
    /// Connections are counted, for whoever asks ([`crate::traffic`]).
    pub traffic: bool,
    /// Connections to an endpoint that goes away end as their Service's end policy says; otherwise they are kept.
    pub end_policy: bool,
    /// How long sockets of this node that are sent to an endpoint wait for an answer to their first packet before they
    /// repeat it; `None`: as long as the kernel says, which is a second. Only the ebpf mode can set it.
    pub first_timeout: Option<Duration>,
    /// Nodes that have stopped sending their heartbeat: whatever is on them is out.
    pub lost_nodes: Option<watch::Receiver<BTreeSet<Arc<str>>>>,
    /// Called when an endpoint leaves the pick and when it is back for good. It must not block.
    pub notices: Option<Arc<dyn Fn(Notice) + Send + Sync>>,
}

impl Default for Watching {
    fn default() -> Self {
        Watching {
            ejection: true,
            retry: true,
            traffic: true,
            end_policy: true,
            first_timeout: None,
            lost_nodes: None,
            notices: None,
        }
    }
}

impl Watching {
    /// As the switches say.
    pub fn by(features: &Features) -> Self {
        Watching {
            ejection: features.is_on(Feature::Ejection),
            retry: features.is_on(Feature::Retry),
            traffic: features.is_on(Feature::Traffic),
            end_policy: features.is_on(Feature::EndPolicy),
            ..Watching::default()
        }
    }

    fn is_wanted(&self) -> bool {
        self.ejection || self.retry || self.traffic || self.first_timeout.is_some()
    }

    /// For the programs of the ebpf mode.
    fn settings(&self) -> Settings {
        Settings { counts: self.is_wanted(), passes_refusals: !self.retry, first_timeout: self.first_timeout }
    }
}

/// What became of an endpoint on this node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Notice {
    pub endpoint: Target,
    /// The Services that have it.
    pub services: Vec<ServiceKey>,
    /// Why it has left the pick; `None`: it is back.
    pub ejected: Option<Evidence>,
}

/// Says what became of an endpoint, and of which Services it is.
fn tell(watching: &Watching, table: &ServiceTable, endpoint: Target, ejected: Option<Evidence>) {
    let Some(notices) = &watching.notices else { return };
    let mut services: Vec<ServiceKey> = table
        .frontends()
        .filter(|frontend| frontend.name.protocol == endpoint.1)
        .filter(|frontend| frontend.endpoints.iter().any(|held| held.address == endpoint.0))
        .map(|frontend| (frontend.name.namespace.clone(), frontend.name.service.clone()))
        .collect();
    services.sort();
    services.dedup();
    notices(Notice { endpoint, services, ejected });
}

/// Starts the watch over endpoints that do not answer, where the mode's packets can be watched. Without it Services work
/// all the same: what fails is said, and the proxy goes on.
pub(crate) fn start_if_wanted(
    config: &Config,
    feed: &Feed,
    status: &Arc<watch::Sender<Status>>,
    token: &CancellationToken,
) -> Result<Option<Watcher>, Error> {
    let namespace = config.namespace.as_ref().map(|namespace| namespace.as_fd());
    let wanted = config.watching.is_wanted();
    if config.mode == Mode::Ebpf && !wanted {
        config.watching.settings().put(&mut pinned(namespace, config.hooks.as_ref())?)?;
    }
    if config.mode == Mode::Ebpf || !wanted || !config.mode.is_watched() {
        // Of the other modes' rules.
        match leftovers::clear_watch(namespace) {
            // A proxy without rights has left nothing.
            Err(Error::Nft(error)) if config.mode == Mode::Userspace && error.is_forbidden() => {}
            cleared => cleared?,
        }
    }
    if !wanted || !config.mode.is_watched() {
        return Ok(None);
    }
    match start(config, namespace, feed.table.clone(), status.clone(), token.clone()) {
        Ok(watcher) => Ok(Some(watcher)),
        Err(error) => {
            tracing::warn!("proxy: {error}; endpoints that do not answer stay in the pick");
            status.send_modify(|status| status.watch_error = Some(error.to_string()));
            Ok(None)
        }
    }
}
