//! The end policy of Services: connections to an endpoint that goes away are kept, drained or reset.
//!
//! `plan` (pure) says which endpoint went from which addresses, and when its connections end; `kernel` ends them. Wherever
//! conntrack translates, it is done the same way, beside the mode's own rules; `programs` ends those of the ebpf mode.
//! Nothing runs, and no rule exists, before the first endpoint of a Service with such a policy goes.

mod kernel;
mod plan;
mod programs;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use linux::bpf::Hooks;
use services::Frontend;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::{Error, Mode, NodeView};
use kernel::{Kernel, Sockets, Ways};
use plan::{Change, Endings, changes};
use programs::Programs;

const RETRY: Duration = Duration::from_secs(1);

/// Hears of frontends from the loop, after their commit.
#[derive(Default)]
pub(crate) struct End {
    namespace: Option<OwnedFd>,
    hooks: Option<Hooks>,
    mode: Mode,
    said: bool,
    worker: Option<Worker>,
}

struct Worker {
    changes: mpsc::UnboundedSender<Vec<Change>>,
    task: JoinHandle<()>,
}

impl End {
    /// `namespace` as in the proxy's configuration. Removes what a proxy left that did not come to its end.
    pub fn new(namespace: Option<OwnedFd>, hooks: Option<Hooks>, mode: Mode) -> Result<Self, Error> {
        if matches!(mode, Mode::Nftables | Mode::Iptables) {
            kernel::clear(namespace.as_ref().map(OwnedFd::as_fd))?;
        }
        Ok(End { namespace, hooks, mode, ..End::default() })
    }

    /// Whoever knows the mode's connections; `None`: nobody does.
    fn open(&self) -> Result<Option<Box<dyn Ways>>, Error> {
        let namespace = self.namespace.as_ref();
        Ok(match self.mode {
            Mode::Nftables | Mode::Iptables => Some(Box::new(Sockets::open(namespace)?)),
            Mode::Ebpf => Some(Box::new(Programs::open(namespace, self.hooks.as_ref())?)),
            Mode::Ipvs | Mode::Userspace => None,
        })
    }

    /// One frontend as the kernel had it and has it now.
    pub fn notice(&mut self, before: Option<&Arc<Frontend>>, after: Option<&Arc<Frontend>>, node: &NodeView) {
        let found = changes(before.map(|f| &**f), after.map(|f| &**f), node);
        if found.is_empty() {
            return;
        }
        if self.worker.is_none() {
            match self.open() {
                Ok(Some(ways)) => {
                    let (changes, received) = mpsc::unbounded_channel();
                    self.worker = Some(Worker { changes, task: tokio::spawn(work(Kernel::new(ways), received)) });
                }
                Ok(None) if std::mem::replace(&mut self.said, true) => {}
                Ok(None) => tracing::warn!(
                    "proxy: this mode keeps connections, whatever end policies say; nftables, iptables and ebpf end them"
                ),
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

async fn work(mut kernel: Kernel, mut received: mpsc::UnboundedReceiver<Vec<Change>>) {
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
        if let Err(error) = kernel.act(&due).await {
            tracing::warn!("proxy: connections to endpoints that have gone are not ended yet: {error}");
            endings.retry(due, now + RETRY);
        }
    }
    if let Err(error) = kernel.close().await {
        tracing::warn!("proxy: {error}");
    }
}
