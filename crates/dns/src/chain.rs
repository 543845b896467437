//! Where answers come from, in order.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use hickory_proto::rr::{Name, RecordType};
use services::ServiceTable;
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::answer::{Answer, Question};
use crate::cache::{Cache, Cached};
use crate::compile::Held;
use crate::forward::Forward;
use crate::hosts::Hosts;
use crate::names::{Compiler, Names};
use crate::objects::Objects;
use crate::reverse::ReverseZones;
use crate::search::{self, SearchPath};
use crate::wire::{Ask, Incoming, code, decode};
use crate::zone::{Found, Zone};
use crate::{message, reply};

/// Who may answer. The first that knows does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// What the operator wrote down.
    Hosts,
    /// Names of Services and endpoints.
    ClusterZone,
    /// Addresses of Services and endpoints.
    ReverseZones,
    /// The end of the client's search path.
    SearchPath,
    /// What an upstream server said a moment ago.
    Cache,
    /// An upstream server.
    Forward,
}

/// The order of sources for every question.
pub const CHAIN: &[Source] =
    &[Source::Hosts, Source::ClusterZone, Source::ReverseZones, Source::SearchPath, Source::Cache, Source::Forward];

/// Aliases that are followed for one question.
const MAX_ALIASES: usize = 8;
/// How long upstream servers may think while the last good answer is at hand.
const STALE_PATIENCE: Duration = Duration::from_millis(500);

impl Source {
    /// The CoreDNS plugin that does the same, as metrics name it.
    pub fn plugin(self) -> &'static str {
        match self {
            Source::Hosts => "hosts",
            Source::ClusterZone | Source::ReverseZones => "kubernetes",
            Source::SearchPath => "autopath",
            Source::Cache => "cache",
            Source::Forward => "forward",
        }
    }
}

/// How far a question came without waiting.
pub enum Step {
    /// Nothing is to be sent.
    Silence,
    /// The reply is written. `source` is `None` for a question that was refused before anybody was asked.
    Replied {
        kind: Option<u16>,
        code: u16,
        source: Option<Source>,
    },
    Wait(Box<Waiting>),
}

/// A question for which an upstream server must be asked.
pub struct Waiting {
    pub ask: Box<Ask>,
    /// The aliases that led there.
    pub so_far: Option<Answer>,
    pub question: Question,
    /// The end of the client's search path; empty: the question itself is passed on.
    pub walk: Vec<Name>,
}

/// How often something besides an answer happened.
#[derive(Debug, Default)]
pub struct Happened {
    pub stale: std::sync::atomic::AtomicU64,
    pub prefetched: std::sync::atomic::AtomicU64,
    pub walked: std::sync::atomic::AtomicU64,
}

/// What a resolver is made of.
pub struct Parts {
    pub zone: Zone,
    pub reverse: ReverseZones,
    pub table: Arc<RwLock<ServiceTable>>,
    pub objects: Arc<Objects>,
    pub hosts: Hosts,
    pub search: SearchPath,
    pub forward: Forward,
}

/// The chain over one table.
pub struct Resolver {
    zone: Zone,
    reverse: ReverseZones,
    table: Arc<RwLock<ServiceTable>>,
    names: Arc<RwLock<Names>>,
    objects: Arc<Objects>,
    pub hosts: Hosts,
    search: SearchPath,
    cache: Mutex<Cache>,
    pub forward: Forward,
    pub happened: Happened,
    background: TaskTracker,
}

impl Resolver {
    /// The compiler is to follow the table, or names stay as they are now.
    pub fn new(parts: Parts) -> (Arc<Self>, Compiler) {
        let compiler = Compiler::new(parts.zone.origin().clone(), parts.zone.ttl(), parts.table.clone());
        let resolver = Resolver {
            names: compiler.names(),
            zone: parts.zone,
            reverse: parts.reverse,
            table: parts.table,
            objects: parts.objects,
            hosts: parts.hosts,
            search: parts.search,
            cache: Mutex::default(),
            forward: parts.forward,
            happened: Happened::default(),
            background: TaskTracker::new(),
        };
        (Arc::new(resolver), compiler)
    }

    /// Whether the table is complete, so that answers mean something.
    pub fn is_ready(&self) -> bool {
        self.names().synced
    }

    pub fn cached(&self) -> usize {
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn names(&self) -> RwLockReadGuard<'_, Names> {
        self.names.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for what goes on besides the clients' questions.
    pub async fn drain(&self, token: &CancellationToken) {
        token.cancelled().await;
        self.background.close();
        self.background.wait().await;
    }

    /// Reads a packet and answers from memory; `limit` says what a reply may have over TCP, and is `None` over UDP.
    pub fn receive(
        self: &Arc<Self>,
        packet: &[u8],
        client: IpAddr,
        limit: Option<usize>,
        now: Instant,
        out: &mut Vec<u8>,
    ) -> Step {
        match decode(packet) {
            Incoming::Ignore => Step::Silence,
            Incoming::Refuse(refusal) => {
                refusal.write(out);
                Step::Replied { kind: None, code: refusal.code, source: None }
            }
            Incoming::Ask(ask) => {
                let limit = limit.unwrap_or_else(|| ask.udp_limit());
                self.begin(ask, client, limit, now, out)
            }
        }
    }

    fn begin(self: &Arc<Self>, ask: Box<Ask>, client: IpAddr, limit: usize, now: Instant, out: &mut Vec<u8>) -> Step {
        let kind = Some(ask.kind);
        let refuse = |code: u16, out: &mut Vec<u8>| {
            ask.refuse(out, code);
            Step::Replied { kind, code, source: None }
        };
        if is_transfer(ask.kind) {
            return refuse(code::REFUSED, out);
        }
        let mut walk = Vec::new();
        let is_written_down = self.hosts.holds(&ask.name);
        if !is_written_down && let Some(below) = ask.name.below(self.zone.origin()) {
            let names = self.names();
            let found = self.zone.find(&names, &self.objects, &ask.name, ask.kind, below);
            if found == Found::Held(Held::NoName) {
                walk = self.search.walk(&self.zone, &names, &self.objects, &ask, below, client);
            }
            if walk.is_empty() && !matches!(found, Found::Held(Held::Alias(_))) {
                let code = reply::write(out, &ask, &self.zone, below, false, &found, limit);
                return Step::Replied { kind, code, source: Some(Source::ClusterZone) };
            }
        }
        if !is_written_down {
            let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(found) = self.reverse.find(&table, &ask.name, ask.kind) {
                let below = ask.name.labels() - 2;
                let code = reply::write(out, &ask, &self.zone, below, true, &found, limit);
                return Step::Replied { kind, code, source: Some(Source::ReverseZones) };
            }
        }
        let Some(question) = message::question(&ask) else { return refuse(code::FORM_ERR, out) };
        if !walk.is_empty() {
            return Step::Wait(Box::new(Waiting { ask, so_far: None, question, walk }));
        }
        match self.chase(question, now) {
            Ok((answer, source)) => Self::write(&ask, answer, source, limit, out),
            Err((so_far, question)) => Step::Wait(Box::new(Waiting { ask, so_far, question, walk })),
        }
    }

    fn write(ask: &Ask, answer: Answer, source: Source, limit: usize, out: &mut Vec<u8>) -> Step {
        let code = message::number(answer.code);
        match message::encode(ask, answer, limit) {
            Some(bytes) => {
                *out = bytes;
                Step::Replied { kind: Some(ask.kind), code, source: Some(source) }
            }
            None => {
                ask.refuse(out, code::SERV_FAIL);
                Step::Replied { kind: Some(ask.kind), code: code::SERV_FAIL, source: Some(source) }
            }
        }
    }

    /// Answers from memory, following aliases, until an upstream server would have to be asked about what comes back.
    fn chase(
        self: &Arc<Self>,
        mut question: Question,
        now: Instant,
    ) -> Result<(Answer, Source), (Option<Answer>, Question)> {
        let mut so_far: Option<Answer> = None;
        for _ in 0..=MAX_ALIASES {
            let Some((answer, source, target)) = self.recall(&question, now) else {
                return Err((so_far, question));
            };
            let whole = match so_far.take() {
                Some(alias) => alias.followed_by(answer),
                None => answer,
            };
            let Some(target) = target else { return Ok((whole, source)) };
            so_far = Some(whole);
            question.name = target;
        }
        // Aliases in a circle: what they say themselves is all there is.
        let circle = so_far.expect("at least one alias was followed");
        Ok((circle, Source::ClusterZone))
    }

    /// What is known without asking, by whom, and the name whose records stand for this one's.
    fn recall(self: &Arc<Self>, question: &Question, now: Instant) -> Option<(Answer, Source, Option<Name>)> {
        let ask = message::ask(question)?;
        CHAIN.iter().find_map(|source| {
            let (answer, target) = match source {
                Source::Hosts => (self.hosts.find(&ask.name, question, self.zone.ttl())?, None),
                Source::ClusterZone => {
                    let below = ask.name.below(self.zone.origin())?;
                    let names = self.names();
                    let found = self.zone.find(&names, &self.objects, &ask.name, ask.kind, below);
                    self.local(&ask, question, below, false, &found)?
                }
                Source::ReverseZones => {
                    let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
                    let found = self.reverse.find(&table, &ask.name, ask.kind)?;
                    self.local(&ask, question, ask.name.labels() - 2, true, &found)?
                }
                Source::Cache => (self.fresh(question, now)?, None),
                Source::SearchPath | Source::Forward => return None,
            };
            Some((answer, *source, target))
        })
    }

    fn local(
        &self,
        ask: &Ask,
        question: &Question,
        below: usize,
        is_reverse: bool,
        found: &Found<'_>,
    ) -> Option<(Answer, Option<Name>)> {
        use hickory_proto::serialize::binary::BinDecodable;
        if let Found::Held(Held::Alias(target)) = found {
            let target = Name::from_bytes(target).ok()?;
            return Some((Answer::alias(&question.name, self.zone.ttl(), &target), Some(target)));
        }
        let mut bytes = Vec::new();
        reply::write(&mut bytes, ask, &self.zone, below, is_reverse, found, usize::from(u16::MAX));
        Some((message::answer(&bytes)?, None))
    }

    /// A cached answer that is still good.
    fn fresh(self: &Arc<Self>, question: &Question, now: Instant) -> Option<Answer> {
        let cached = self.cache.lock().unwrap_or_else(PoisonError::into_inner).get(question, now);
        match cached {
            Cached::Fresh { answer, refresh } => {
                if refresh {
                    count(&self.happened.prefetched);
                    self.refresh(question.clone());
                }
                Some(answer)
            }
            // Everybody has failed lately: no client is to wait until they have failed again.
            Cached::Stale { answer, failed } if failed || self.forward.group(&question.name).rests(now) => {
                count(&self.happened.stale);
                Some(answer)
            }
            Cached::Stale { .. } | Cached::None => None,
        }
    }

    /// Asks upstream servers without anybody waiting for it.
    fn refresh(self: &Arc<Self>, question: Question) {
        let resolver = self.clone();
        self.background.spawn(async move {
            resolver.forwarded(&question).await;
        });
    }

    async fn forwarded(&self, question: &Question) -> Answer {
        let answer = self.forward.group(&question.name).ask(question).await;
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).put(question, &answer, Instant::now());
        answer
    }

    /// Asks upstream servers; while they fail, the last good answer stands in.
    async fn ask(self: &Arc<Self>, question: &Question) -> Answer {
        let cached = self.cache.lock().unwrap_or_else(PoisonError::into_inner).get(question, Instant::now());
        let stale = match cached {
            Cached::Fresh { answer, .. } => return answer,
            Cached::Stale { answer, .. } => answer,
            Cached::None => return self.forwarded(question).await,
        };
        match timeout(STALE_PATIENCE, self.forwarded(question)).await {
            Ok(answer) if !answer.is_failure() => answer,
            _ => {
                count(&self.happened.stale);
                stale
            }
        }
    }

    /// Asks upstream for what [`Resolver::receive`] could not answer, and writes the reply.
    pub async fn finish(self: &Arc<Self>, waiting: Waiting, limit: Option<usize>, out: &mut Vec<u8>) -> Step {
        let Waiting { ask, so_far, question, walk } = waiting;
        let limit = limit.unwrap_or_else(|| ask.udp_limit());
        if !walk.is_empty() {
            return self.finish_walk(&ask, &question, walk, limit, out).await;
        }
        let answer = self.ask(&question).await;
        let answer = match so_far {
            Some(alias) => alias.followed_by(answer),
            None => answer,
        };
        Self::write(&ask, answer, Source::Forward, limit, out)
    }

    async fn finish_walk(
        self: &Arc<Self>,
        ask: &Ask,
        question: &Question,
        walk: Vec<Name>,
        limit: usize,
        out: &mut Vec<u8>,
    ) -> Step {
        let resolver = self.clone();
        let asked = question.clone();
        // Goes on when this client has its answer: the next one, or this one's next question, finds it in the cache.
        let walked = self.background.spawn(async move { resolver.walk(&asked, walk).await });
        if let Ok(Ok(Some(answer))) = timeout(search::PATIENCE, walked).await {
            count(&self.happened.walked);
            return Self::write(ask, answer, Source::SearchPath, limit, out);
        }
        let below = ask.name.below(self.zone.origin()).unwrap_or_default();
        // The table may have changed meanwhile.
        let names = self.names();
        let found = self.zone.find(&names, &self.objects, &ask.name, ask.kind, below);
        let code = reply::write(out, ask, &self.zone, below, false, &found, limit);
        Step::Replied { kind: Some(ask.kind), code, source: Some(Source::ClusterZone) }
    }

    /// The end of the search path, if there is something.
    async fn walk(self: &Arc<Self>, question: &Question, walk: Vec<Name>) -> Option<Answer> {
        for name in walk {
            let target = Question { name: name.clone(), ..question.clone() };
            let answer = self.known_or_asked(&target).await;
            if answer.is_failure() {
                return None;
            }
            let has_other = !answer.is_positive() && answer.code == hickory_proto::op::ResponseCode::NoError && {
                // A name with addresses of the other family only: both questions must end at the same name.
                let is_v4 = question.record_type == RecordType::A;
                let other = if is_v4 { RecordType::AAAA } else { RecordType::A };
                self.known_or_asked(&Question { record_type: other, ..target }).await.is_positive()
            };
            if answer.is_positive() || has_other {
                let mut alias = Answer::alias(&question.name, self.zone.ttl(), &name);
                alias.authoritative = false;
                return Some(alias.followed_by(answer));
            }
        }
        None
    }

    async fn known_or_asked(self: &Arc<Self>, question: &Question) -> Answer {
        match self.chase(question.clone(), Instant::now()) {
            Ok((answer, _)) => answer,
            Err((Some(alias), question)) => alias.followed_by(self.ask(&question).await),
            Err((None, question)) => self.ask(&question).await,
        }
    }
}

fn is_transfer(kind: u16) -> bool {
    matches!(kind, crate::wire::kind::AXFR | crate::wire::kind::IXFR)
}

fn count(counter: &std::sync::atomic::AtomicU64) {
    counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
}
