//! The same over relays of this process: they see themselves who does not answer.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError, RwLock};

use services::ServiceTable;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::evidence::{Evidence, Ledger, Step, Target};
use super::task::{CONNECT, Verdicts, Watcher};
use super::{Watching, tell};
use crate::Status;
use crate::dataplane::userspace::Place;

/// What relays have seen and nobody has looked at yet; more of it would be more of the same.
const WAITING: usize = 256;

/// What a relay has seen.
#[derive(Clone, Copy, Debug)]
pub enum Seen {
    Evidence(Target, Evidence),
    /// Another endpoint has answered in the first one's place.
    Retried,
}

/// Where relays tell what they see.
#[derive(Clone)]
pub struct Witness {
    seen: Option<mpsc::Sender<Seen>>,
    /// Whether the next endpoint is tried where one does not answer.
    pub retry: bool,
}

impl Witness {
    /// Sees nothing, and retries.
    pub fn blind() -> Self {
        Witness { seen: None, retry: true }
    }

    pub fn tell(&self, seen: Seen) {
        if let Some(sender) = &self.seen {
            sender.try_send(seen).ok();
        }
    }
}

/// Starts to judge endpoints by what relays see, until the token is cancelled.
pub(crate) fn start(
    watching: &Watching,
    place: Place,
    services: Arc<RwLock<ServiceTable>>,
    status: Arc<watch::Sender<Status>>,
    token: CancellationToken,
) -> (Witness, Watcher) {
    let (sender, seen) = mpsc::channel(WAITING);
    let (verdicts, receiver) = watch::channel(Arc::new(Verdicts::default()));
    let judge = Judge {
        watching: watching.clone(),
        place,
        services,
        status,
        ledger: Ledger::default(),
        verdicts,
        start: Instant::now(),
        probes: JoinSet::new(),
    };
    let task = tokio::spawn(judge.run(seen, token));
    let witness = Witness { seen: Some(sender), retry: watching.retry };
    (witness, Watcher { table: None, verdicts: receiver, task })
}

struct Judge {
    watching: Watching,
    place: Place,
    services: Arc<RwLock<ServiceTable>>,
    status: Arc<watch::Sender<Status>>,
    ledger: Ledger,
    verdicts: watch::Sender<Arc<Verdicts>>,
    start: Instant,
    probes: JoinSet<(Target, bool)>,
}

impl Judge {
    async fn run(mut self, mut seen: mpsc::Receiver<Seen>, token: CancellationToken) {
        loop {
            let due = self.ledger.due().map(|due| self.start + due);
            tokio::select! {
                () = token.cancelled() => return,
                Some(seen) = seen.recv() => match seen {
                    Seen::Retried => self.status.send_modify(|status| status.retries += 1),
                    Seen::Evidence(endpoint, evidence) => self.accuse(endpoint, evidence),
                },
                Some(probed) = self.probes.join_next() => {
                    if let Ok((target, connected)) = probed {
                        self.ledger.probed(target, connected, self.start.elapsed());
                    }
                }
                () = async { sleep_until(due.unwrap_or_else(Instant::now)).await }, if due.is_some() => {}
            }
            self.advance();
            let ejected = self.ledger.ejected();
            self.verdicts.send_if_modified(|verdicts| {
                let changed = verdicts.ejected != ejected;
                if changed {
                    *verdicts = Arc::new(Verdicts { ejected, frozen: BTreeSet::new() });
                }
                changed
            });
        }
    }

    fn accuse(&mut self, endpoint: Target, evidence: Evidence) {
        if self.watching.ejection && self.ledger.accuse(endpoint, evidence, self.start.elapsed()) {
            tracing::warn!("proxy: endpoint {} is out: {evidence}", endpoint.0);
            self.status.send_modify(|status| status.ejections += 1);
            self.tell(endpoint, Some(evidence));
        }
    }

    fn tell(&self, endpoint: Target, ejected: Option<Evidence>) {
        tell(&self.watching, &self.services.read().unwrap_or_else(PoisonError::into_inner), endpoint, ejected);
    }

    fn advance(&mut self) {
        let steps = self.ledger.advance(self.start.elapsed());
        if steps.is_empty() {
            return;
        }
        let known: BTreeSet<Target> = {
            let table = self.services.read().unwrap_or_else(PoisonError::into_inner);
            let targets = table.frontends().flat_map(|frontend| {
                let protocol = frontend.name.protocol;
                frontend.endpoints.iter().map(move |endpoint| (endpoint.address, protocol))
            });
            targets.collect()
        };
        self.ledger.retain(|endpoint| known.contains(endpoint));
        for step in steps {
            match step {
                Step::Connect(target) if known.contains(&target) => {
                    let place = self.place.clone();
                    self.probes.spawn(async move {
                        // Of UDP nobody can tell before somebody asks something.
                        let connected = match target.1 {
                            services::Protocol::Tcp => {
                                timeout(CONNECT, place.connect(target.0)).await.is_ok_and(|done| done.is_ok())
                            }
                            services::Protocol::Udp | services::Protocol::Sctp => true,
                        };
                        (target, connected)
                    });
                }
                Step::Connect(_) => {}
                Step::Returned(endpoint) => {
                    tracing::info!("proxy: endpoint {} answers again", endpoint.0);
                    self.tell(endpoint, None);
                }
            }
        }
    }
}
