//! Waits for what the kernel tells, looks at the connection table while there is something to see, and tells the commit
//! loop who is out.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use linux::conntrack::Translator;
use linux::netns::Netns;
use linux::nft::Socket;
use services::{Endpoint, Protocol, ServiceTable};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::backlog::Backlog;
use super::evidence::{Evidence, Ledger, Step, Target};
use super::maps::{Counts, Maps};
use super::source::{Bell, Flows, Found, Rung, Source};
use super::table::{Rules, WatchTable};
use super::{Watching, tell};
use crate::dataplane::ebpf::contacts::EVENTS;
use crate::run::pinned;
use crate::{Config, Error, NodeView, Status};

/// Between a first packet and the first look: nearly all are answered by then.
const FIRST_LOOK: Duration = Duration::from_millis(15);
/// Between looks while somebody waits for an answer, and while nobody does. Together they keep an endpoint that went
/// silent out of the pick within 300 ms of its first unanswered packet.
const NEXT_LOOK: Duration = Duration::from_millis(75);
const IDLE_LOOK: Duration = Duration::from_millis(110);
/// Between looks while a queue stands.
const QUEUE_LOOK: Duration = Duration::from_millis(200);
/// Looking may take this part of the time, on a machine that has time: where everything waits for a processor, a look lasts long
/// without costing much.
const SHARE: u32 = 20;
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Within a cluster a connection takes microseconds.
pub(crate) const CONNECT: Duration = Duration::from_millis(300);
/// How long an endpoint has to clear itself.
const CLEAR: Duration = Duration::from_millis(50);

/// What the commit loop is to render.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Verdicts {
    pub ejected: BTreeSet<Target>,
    /// Listeners of this node that take no connections: nobody is sent there.
    pub frozen: BTreeSet<SocketAddr>,
}

/// The watch, as the commit loop holds it.
pub(crate) struct Watcher {
    /// `None` only while a commit runs.
    pub table: Option<Box<WatchTable>>,
    pub verdicts: watch::Receiver<Arc<Verdicts>>,
    pub task: JoinHandle<()>,
}

/// Starts to watch the connections of a network namespace, until the token is cancelled.
pub(crate) fn start(
    config: &Config,
    namespace: Option<BorrowedFd<'_>>,
    services: Arc<RwLock<ServiceTable>>,
    status: Arc<watch::Sender<Status>>,
    token: CancellationToken,
) -> Result<Watcher, Error> {
    let watching = &config.watching;
    let path = match namespace {
        Some(namespace) => PathBuf::from(format!("/proc/self/fd/{}", namespace.as_raw_fd())),
        None => PathBuf::from("/proc/thread-self/ns/net"),
    };
    let (table, source, bell) = senses(config, namespace)?;
    let (sender, verdicts) = watch::channel(Arc::new(Verdicts::default()));
    let node = Netns::open(&path)?;
    let backlog = if watching.ejection { Some(Backlog::new(&node)?) } else { None };
    let task = Task {
        watching: watching.clone(),
        bell,
        eyes: Some(Eyes {
            source,
            backlog,
            next_backlog: Duration::ZERO,
            queues_are_due: false,
            stuck: BTreeSet::new(),
        }),
        node,
        view: config.node.clone(),
        services,
        status,
        ledger: Ledger::default(),
        frozen: BTreeSet::new(),
        lost: BTreeSet::new(),
        verdicts: sender,
        start: Instant::now(),
        next_look: None,
        woken: false,
        probes: JoinSet::new(),
        doubted: BTreeSet::new(),
    };
    Ok(Watcher { table: Some(table), verdicts, task: tokio::spawn(task.run(token)) })
}

type Senses = (Box<WatchTable>, Box<dyn Source>, Bell);

/// What the mode's connections are watched with.
fn senses(config: &Config, namespace: Option<BorrowedFd<'_>>) -> Result<Senses, Error> {
    let watching = &config.watching;
    if let Some(by) = config.mode.translator() {
        // IPVS counts by itself.
        let count = watching.traffic && by == Translator::Nat;
        let table = WatchTable::new(Rules::new(Socket::open(namespace)?, by, watching.retry, count));
        let flows = Flows::open(namespace, by, table.destinations(), watching.retry)?;
        return Ok((Box::new(table), Box::new(flows), Bell::log(namespace, watching.retry)?));
    }
    let open = || pinned(namespace, config.hooks.as_ref());
    let table = WatchTable::new(Maps::new(open()?, watching.settings()));
    let destinations = table.destinations();
    let counts = Counts::new(open()?, destinations.clone())?;
    let ring = open()?.ring(EVENTS)?.register().map_err(Error::Namespace)?;
    Ok((Box::new(table), Box::new(counts), Bell::Ring { ring, destinations }))
}

/// What looks at the kernel; it moves to a thread of its own for each look.
struct Eyes {
    source: Box<dyn Source>,
    backlog: Option<Backlog>,
    /// When queues are looked into next, if anything is looked at.
    next_backlog: Duration,
    /// There were new connections since the last look into queues.
    queues_are_due: bool,
    /// Listeners that took nobody at the last look into their queues.
    stuck: BTreeSet<SocketAddr>,
}

/// What one look found.
struct Look {
    found: Found,
    /// Listeners that take nobody from their queues, whether or not they are endpoints.
    stuck: BTreeSet<SocketAddr>,
    /// Somebody waits in a queue that may or may not move, or queues were not looked into yet.
    is_undecided: bool,
    took: Duration,
}

impl Eyes {
    /// `woken`: there were new connections since the last look.
    fn look(&mut self, now: Duration, woken: bool) -> Result<Look, Error> {
        self.queues_are_due |= woken && self.backlog.is_some();
        let begin = Instant::now();
        let found = self.source.look(now)?;
        let took = begin.elapsed();
        if let Some(backlog) = &mut self.backlog
            && now >= self.next_backlog
        {
            let begin = Instant::now();
            self.stuck = backlog.look(now)?;
            self.next_backlog = now + (begin.elapsed() * SHARE).clamp(NEXT_LOOK, LONGEST_PAUSE);
            self.queues_are_due = false;
        }
        let is_undecided = self.queues_are_due || self.backlog.as_ref().is_some_and(Backlog::is_undecided);
        Ok(Look { found, stuck: self.stuck.clone(), is_undecided, took })
    }

    /// Nothing is looked at for a while.
    fn rest(&mut self) {
        self.source.rest();
        if let Some(backlog) = &mut self.backlog {
            backlog.rest();
        }
    }
}

struct Task {
    watching: Watching,
    bell: Bell,
    /// `None` only while they look.
    eyes: Option<Eyes>,
    /// Where probes start.
    node: Netns,
    services: Arc<RwLock<ServiceTable>>,
    status: Arc<watch::Sender<Status>>,
    ledger: Ledger,
    /// What the other parts of the proxy know of this node.
    view: watch::Receiver<Arc<NodeView>>,
    /// Endpoints here that take no connections.
    frozen: BTreeSet<SocketAddr>,
    /// Endpoints on nodes without a heartbeat.
    lost: BTreeSet<Target>,
    verdicts: watch::Sender<Arc<Verdicts>>,
    start: Instant,
    /// `None`: at rest.
    next_look: Option<Instant>,
    /// What ended the rest was a new connection.
    woken: bool,
    probes: JoinSet<(Purpose, Target, bool)>,
    /// Endpoints whose silence is being looked into.
    doubted: BTreeSet<Target>,
}

/// Why this node connects to an endpoint.
#[derive(Clone, Copy)]
enum Purpose {
    /// To see whether a trial makes sense.
    Trial,
    /// To see whether the evidence holds for everybody.
    Doubt(Evidence),
}

impl Task {
    async fn run(mut self, token: CancellationToken) {
        loop {
            let due = self.ledger.due().map(|due| self.start + due);
            let deadline = [self.next_look, due].into_iter().flatten().min();
            tokio::select! {
                () = token.cancelled() => return,
                rung = self.bell.wait(self.next_look.is_none()) => self.hear(rung),
                () = nodes_change(&mut self.watching.lost_nodes) => self.judge_nodes(),
                Some(probed) = self.probes.join_next() => {
                    match probed {
                        Ok((Purpose::Trial, target, connected)) => {
                            self.ledger.probed(target, connected, self.now());
                        }
                        Ok((Purpose::Doubt(evidence), target, connected)) => {
                            self.doubted.remove(&target);
                            if !connected {
                                self.accuse(BTreeSet::from([target]), evidence);
                            }
                        }
                        Err(error) => self.report(Err(Error::Commit(error))),
                    }
                }
                () = async { sleep_until(deadline.unwrap_or_else(Instant::now)).await }, if deadline.is_some() => {}
            }
            if self.next_look.is_some_and(|at| at <= Instant::now()) {
                self.look().await;
            }
            self.advance();
            self.publish();
        }
    }

    fn now(&self) -> Duration {
        self.start.elapsed()
    }

    /// Says once what goes wrong.
    fn report(&self, result: Result<(), Error>) {
        let error = result.err().map(|error| error.to_string());
        self.status.send_if_modified(|status| {
            let changed = status.watch_error != error;
            if let Some(error) = error.as_ref().filter(|_| changed) {
                tracing::warn!("proxy: {error}; endpoints that do not answer stay in the pick meanwhile");
            }
            status.watch_error = error;
            changed
        });
    }

    /// Takes in what the kernel has told.
    fn hear(&mut self, rung: Result<Rung, Error>) {
        let rung = match rung {
            Ok(rung) => rung,
            Err(error) => return self.report(Err(error)),
        };
        self.report(Ok(()));
        if rung.begun {
            self.woken = true;
            self.next_look.get_or_insert_with(|| Instant::now() + FIRST_LOOK);
        }
        if rung.held > 0 {
            self.status.send_modify(|status| status.retries += rung.held);
        }
        self.doubt(tcp(rung.refusers), Evidence::Refused);
    }

    async fn look(&mut self) {
        let rung = self.bell.take();
        self.hear(rung);
        let woken = std::mem::take(&mut self.woken);
        let now = self.now();
        let mut eyes = self.eyes.take().expect("a look gives them back");
        let looked = tokio::task::spawn_blocking(move || {
            let look = eyes.look(now, woken);
            (eyes, look)
        })
        .await;
        let (eyes, look) = match looked {
            Ok(looked) => looked,
            // Without eyes there is nothing left to do but to say so.
            Err(error) => return self.report(Err(Error::Commit(error))),
        };
        self.eyes = Some(eyes);
        let look = match look {
            Ok(look) => look,
            Err(error) => {
                self.next_look = Some(Instant::now() + IDLE_LOOK * 10);
                return self.report(Err(error));
            }
        };
        self.report(Ok(()));
        if look.found.retried > 0 {
            self.status.send_modify(|status| status.retries += look.found.retried);
        }
        self.doubt(tcp(look.found.silent), Evidence::Unanswered);
        self.judge_queues(&look.stuck);
        let pause = match (look.found.goes_on, woken, look.is_undecided || !self.frozen.is_empty()) {
            (true, ..) | (_, true, true) => Some(NEXT_LOOK),
            (false, true, _) => Some(IDLE_LOOK),
            // Nothing tells when a queue moves.
            (false, false, true) => Some(QUEUE_LOOK),
            (false, false, false) => None,
        };
        self.next_look = pause
            .map(|pause| Instant::now() + pause.max((look.took * SHARE).min(LONGEST_PAUSE)).saturating_sub(look.took));
        if self.next_look.is_none()
            && let Some(eyes) = &mut self.eyes
        {
            eyes.rest();
        }
    }

    /// Takes over which listeners take nobody. Endpoints of this node among them get no more packets, if others are left:
    /// never more than half of a Service's, and no endpoint that is the only one of a Service, which may just be slow.
    fn judge_queues(&mut self, stuck: &BTreeSet<SocketAddr>) {
        if stuck.is_empty() && self.frozen.is_empty() {
            return;
        }
        let place = self.view.borrow().place.node.clone();
        let mut frozen = BTreeSet::new();
        let mut spared: BTreeSet<SocketAddr> = BTreeSet::new();
        for frontend in self.table().frontends().filter(|frontend| frontend.name.protocol == Protocol::Tcp) {
            let here = |endpoint: &&Arc<Endpoint>| endpoint.node.as_ref().is_none_or(|node| *node == place);
            let hit = frontend.endpoints.iter().filter(|endpoint| stuck.contains(&endpoint.address)).filter(here);
            let hit: BTreeSet<SocketAddr> = hit.map(|endpoint| endpoint.address).collect();
            let Some(first) = hit.first() else { continue };
            let others = frontend.endpoints.iter().filter(|endpoint| endpoint.ready);
            let usable = others.filter(|endpoint| endpoint.address.is_ipv6() == first.is_ipv6()).count();
            frozen.extend(hit.iter().take(usable / 2));
            spared.extend(hit.iter().skip(usable / 2));
        }
        frozen.retain(|address| !spared.contains(address));
        let now = self.now();
        let before = std::mem::replace(&mut self.frozen, frozen.clone());
        for address in before.difference(&frozen) {
            self.ledger.withdraw((*address, Protocol::Tcp), Evidence::Frozen, now);
        }
        self.accuse(tcp(frozen.difference(&before).copied()), Evidence::Frozen);
    }

    /// A first packet may also be lost on the way, or by a listener that has too many at the moment, or be refused because a
    /// policy forbids it to this client: then the endpoint answers others, and sending its part to the rest would help
    /// nobody. It is out only if it does not answer this node either.
    fn doubt(&mut self, endpoints: BTreeSet<Target>, evidence: Evidence) {
        for endpoint in endpoints {
            if self.watching.ejection && self.doubted.insert(endpoint) {
                let node = self.node.clone();
                let purpose = Purpose::Doubt(evidence);
                self.probes.spawn(async move { (purpose, endpoint, connects(&node, endpoint, CLEAR).await) });
            }
        }
    }

    fn accuse(&mut self, endpoints: BTreeSet<Target>, evidence: Evidence) {
        if !self.watching.ejection {
            return;
        }
        let now = self.now();
        for endpoint in endpoints {
            if self.ledger.accuse(endpoint, evidence, now) {
                tracing::warn!("proxy: endpoint {} is out: {evidence}", endpoint.0);
                self.status.send_modify(|status| status.ejections += 1);
                self.notice(endpoint, Some(evidence));
            }
        }
    }

    fn notice(&self, endpoint: Target, ejected: Option<Evidence>) {
        tell(&self.watching, &self.table(), endpoint, ejected);
    }

    fn table(&self) -> RwLockReadGuard<'_, ServiceTable> {
        self.services.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes over which nodes have no heartbeat.
    fn judge_nodes(&mut self) {
        let Some(nodes) = &mut self.watching.lost_nodes else { return };
        let nodes = nodes.borrow_and_update().clone();
        let mut lost = BTreeSet::new();
        if !nodes.is_empty() {
            for frontend in self.table().frontends() {
                let on_them =
                    |endpoint: &&Arc<Endpoint>| endpoint.node.as_ref().is_some_and(|node| nodes.contains(node));
                let endpoints = frontend.endpoints.iter().filter(on_them);
                lost.extend(endpoints.map(|endpoint| (endpoint.address, frontend.name.protocol)));
            }
        }
        let now = self.now();
        let before = std::mem::replace(&mut self.lost, lost.clone());
        for endpoint in before.difference(&lost) {
            self.ledger.withdraw(*endpoint, Evidence::NodeLost, now);
        }
        self.accuse(lost.difference(&before).copied().collect(), Evidence::NodeLost);
    }

    /// Starts what has become due.
    fn advance(&mut self) {
        let steps = self.ledger.advance(self.now());
        if steps.is_empty() {
            return;
        }
        let known = self.known(&steps);
        for step in steps {
            match step {
                Step::Connect(target) if !known.contains(&target) => self.ledger.retain(|held| *held != target),
                Step::Connect(target) => {
                    let node = self.node.clone();
                    self.probes.spawn(async move { (Purpose::Trial, target, connects(&node, target, CONNECT).await) });
                }
                Step::Returned(endpoint) => {
                    tracing::info!("proxy: endpoint {} answers again", endpoint.0);
                    self.notice(endpoint, None);
                }
            }
        }
    }

    /// Those of the endpoints to try that some Service still has.
    fn known(&self, steps: &[Step]) -> BTreeSet<Target> {
        let asked: BTreeSet<Target> = steps
            .iter()
            .filter_map(|step| match step {
                Step::Connect(target) => Some(*target),
                Step::Returned(_) => None,
            })
            .collect();
        if asked.is_empty() {
            return asked;
        }
        let table = self.table();
        let targets = table.frontends().flat_map(|frontend| {
            let protocol = frontend.name.protocol;
            frontend.endpoints.iter().map(move |endpoint| (endpoint.address, protocol))
        });
        targets.filter(|target| asked.contains(target)).collect()
    }

    fn publish(&self) {
        let ejected = self.ledger.ejected();
        self.verdicts.send_if_modified(|verdicts| {
            let next = Verdicts { ejected, frozen: self.frozen.clone() };
            let changed = **verdicts != next;
            if changed {
                *verdicts = Arc::new(next);
            }
            changed
        });
    }
}

fn tcp(addresses: impl IntoIterator<Item = SocketAddr>) -> BTreeSet<Target> {
    addresses.into_iter().map(|address| (address, Protocol::Tcp)).collect()
}

/// Returns when other nodes are lost than before.
async fn nodes_change(nodes: &mut Option<watch::Receiver<BTreeSet<Arc<str>>>>) {
    if let Some(nodes) = nodes
        && nodes.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

/// Whether the endpoint accepts a connection from this node in time.
async fn connects(node: &Netns, (address, protocol): Target, patience: Duration) -> bool {
    // Of the other protocols nobody can tell.
    protocol != Protocol::Tcp || matches!(timeout(patience, node.tcp_connect(address)).await, Ok(Ok(_)))
}
