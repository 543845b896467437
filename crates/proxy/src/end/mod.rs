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
use services::{EndPolicy, Frontend};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use crate::{Config, Error, Metrics, Mode, NodeView};
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
    /// Removes what a proxy left that did not come to its end.
    pub fn new(namespace: Option<OwnedFd>, config: &Config) -> Result<Self, Error> {
        let (mode, is_on, metrics) = (config.mode, config.watching.end_policy, config.metrics.clone());
        if mode.translator().is_some() {
            kernel::clear(namespace.as_ref().map(OwnedFd::as_fd))?;
        }
        Ok(End { namespace, hooks: config.hooks.clone(), mode, is_on, metrics, worker: None })
    }

    /// Whoever knows the mode's connections; `None`: nobody does.
    fn open(&self) -> Result<Option<Box<dyn Ways>>, Error> {
        let namespace = self.namespace.as_ref();
        if let Some(translator) = self.mode.translator() {
            return Ok(Some(Box::new(Sockets::open(namespace, translator)?)));
        }
        Ok(match self.mode {
            Mode::Ebpf => Some(Box::new(Programs::open(namespace, self.hooks.as_ref())?)),
            _ => None,
        })
    }

    /// What of the Service's end policy is not done.
    pub fn unsupported(&self, frontend: &Frontend) -> Option<&'static str> {
        let is_able = self.mode != Mode::Userspace;
        let is_asked = self.is_on && !is_able && frontend.end_policy != EndPolicy::default();
        is_asked.then_some(
            "the end policy is not followed in this mode, connections are kept; use another one than userspace",
        )
    }

    /// One frontend as the kernel had it and has it now.
    pub fn notice(&mut self, before: Option<&Arc<Frontend>>, after: Option<&Arc<Frontend>>, node: &NodeView) {
        if !self.is_on {
            return;
        }
        let found = changes(before.map(|f| &**f), after.map(|f| &**f), node);
        if found.is_empty() {
            return;
        }
        if self.worker.is_none() {
            match self.open() {
                Ok(Some(ways)) => {
                    let (changes, received) = mpsc::unbounded_channel();
                    self.worker = Some(Worker {
                        changes,
                        task: tokio::spawn(work(Kernel::new(ways), received, self.metrics.clone())),
                    });
                }
                // `unsupported` has said so.
                Ok(None) => return,
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
