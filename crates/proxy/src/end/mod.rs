//! The end policy of Services: connections to an endpoint that goes away are kept, drained or reset.
//!
//! `plan` (pure) says which endpoint went from which addresses, and when its connections end; `kernel` ends them. Wherever
//! conntrack translates, it is done the same way, beside the mode's own rules. Nothing runs, and no rule exists, before the
//! first endpoint of a Service with such a policy goes.

mod kernel;
mod plan;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use services::{EndPolicy, Frontend};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::{Error, Metrics, Mode, NodeView};
use kernel::Kernel;
use plan::{Change, Endings, changes};

const RETRY: Duration = Duration::from_secs(1);

/// Hears of frontends from the loop, after their commit.
#[derive(Default)]
pub(crate) struct End {
    namespace: Option<OwnedFd>,
    /// Whether conntrack knows the mode's connections.
    is_able: bool,
    /// The switch.
    is_on: bool,
    metrics: Arc<Metrics>,
    worker: Option<Worker>,
}

struct Worker {
    changes: mpsc::UnboundedSender<Vec<Change>>,
    task: JoinHandle<()>,
}

impl End {
    /// `namespace` as in the proxy's configuration. Removes what a proxy left that did not come to its end.
    pub fn new(namespace: Option<OwnedFd>, mode: Mode, is_on: bool, metrics: Arc<Metrics>) -> Result<Self, Error> {
        let is_able = mode.is_watched();
        if is_able {
            kernel::clear(namespace.as_ref().map(OwnedFd::as_fd))?;
        }
        Ok(End { namespace, is_able, is_on, metrics, worker: None })
    }

    /// What of the Service's end policy is not done.
    pub fn unsupported(&self, frontend: &Frontend) -> Option<&'static str> {
        let is_asked = self.is_on && !self.is_able && frontend.end_policy != EndPolicy::default();
        is_asked.then_some(
            "the end policy is not followed in this mode, connections are kept; nftables and iptables end them, use one of these",
        )
    }

    /// One frontend as the kernel had it and has it now.
    pub fn notice(&mut self, before: Option<&Arc<Frontend>>, after: Option<&Arc<Frontend>>, node: &NodeView) {
        if !self.is_on || !self.is_able {
            return;
        }
        let found = changes(before.map(|f| &**f), after.map(|f| &**f), node);
        if found.is_empty() {
            return;
        }
        if self.worker.is_none() {
            let namespace = self.namespace.as_ref().map(OwnedFd::try_clone).transpose();
            match namespace.map_err(Error::Namespace).and_then(Kernel::open) {
                Ok(kernel) => {
                    let (changes, received) = mpsc::unbounded_channel();
                    self.worker =
                        Some(Worker { changes, task: tokio::spawn(work(kernel, received, self.metrics.clone())) });
                }
                Err(error) => tracing::warn!("proxy: connections are kept, whatever end policies say: {error}"),
            }
        }
        if let Some(worker) = &self.worker {
            // A worker that has died is noticed at the end.
            worker.changes.send(found).ok();
        }
    }

    /// Leaves nothing behind.
    pub async fn finish(&mut self) {
        let Some(worker) = self.worker.take() else { return };
        drop(worker.changes);
        if let Err(error) = worker.task.await {
            tracing::warn!("proxy: the task that ends connections died: {error}");
        }
    }
}

async fn work(mut kernel: Kernel, mut received: mpsc::UnboundedReceiver<Vec<Change>>, metrics: Arc<Metrics>) {
    let mut endings = Endings::default();
    loop {
        let next = endings.next();
        tokio::select! {
            changes = received.recv() => match changes {
                Some(changes) => {
                    let now = Instant::now();
                    for change in changes {
                        match change {
                            Change::Started { called, used, after } => {
                                match kernel.strays(&called, &used).await {
                                    Ok(strays) => strays.into_iter().for_each(|way| endings.gone(way, after, now)),
                                    Err(error) => tracing::warn!("proxy: cannot look for connections to endpoints that have gone: {error}"),
                                }
                            }
                            Change::Gone { way, after } => endings.gone(way, after, now),
                            Change::Back { way } => endings.back(&way),
                        }
                    }
                }
                None => break,
            },
            () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now).into()), if next.is_some() => {}
        }
        let now = Instant::now();
        let due = endings.due(now);
        match kernel.act(&due).await {
            Ok(ended) => metrics.ended(ended),
            Err(error) => {
                tracing::warn!("proxy: connections to endpoints that have gone are not ended yet: {error}");
                endings.retry(due, now + RETRY);
            }
        }
    }
    if let Err(error) = kernel.close().await {
        tracing::warn!("proxy: {error}");
    }
}
