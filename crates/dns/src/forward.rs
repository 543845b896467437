//! Which upstream servers are asked about a name, in which order, and for how long.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::StreamExt;
use futures::stream::FuturesUnordered;
use hickory_proto::op::ResponseCode;
use hickory_proto::rr::Name;
use tokio::time::{Instant, sleep, timeout};
use tracing::debug;

use crate::answer::{Answer, Question};
use crate::upstream::Upstream;

/// When a server is silent for so long, the next is asked too; what the first says still counts.
const NEXT: Duration = Duration::from_millis(400);
/// Clients ask again after five seconds: until then they are to know.
const PATIENCE: Duration = Duration::from_millis(2500);
/// A single server is asked again, because UDP loses packets.
const MIN_ATTEMPTS: usize = 2;
const MAX_ATTEMPTS: usize = 4;

/// The servers that know the same names.
pub struct Group {
    servers: Vec<Upstream>,
    /// Questions for which every server was being left alone.
    broken: AtomicU64,
}

/// All servers, by the domain that each group is for.
pub struct Forward {
    /// The longest domain first.
    stubs: Vec<(Name, Group)>,
    others: Group,
}

impl Forward {
    pub fn new(mut stubs: Vec<(Name, Group)>, others: Group) -> Self {
        stubs.sort_by_key(|(name, _)| std::cmp::Reverse(name.num_labels()));
        Forward { stubs, others }
    }

    pub fn nowhere() -> Self {
        Forward::new(Vec::new(), Group::new(Vec::new()))
    }

    pub fn servers(&self) -> impl Iterator<Item = &Upstream> {
        self.groups().flat_map(|group| &group.servers)
    }

    /// Questions that came when all servers for them had failed lately.
    pub fn broken(&self) -> u64 {
        self.groups().map(|group| group.broken.load(Ordering::Relaxed)).sum()
    }

    fn groups(&self) -> impl Iterator<Item = &Group> {
        self.stubs.iter().map(|(_, group)| group).chain([&self.others])
    }

    pub fn group(&self, name: &Name) -> &Group {
        self.stubs.iter().find(|(zone, _)| zone.zone_of(name)).map_or(&self.others, |(_, group)| group)
    }
}

impl Group {
    pub fn new(servers: Vec<Upstream>) -> Self {
        Group { servers, broken: AtomicU64::new(0) }
    }

    /// Every server has failed lately: nothing good is to be expected soon.
    pub fn rests(&self, now: Instant) -> bool {
        self.servers.iter().all(|server| server.rests(now))
    }

    /// The first good answer; SERVFAIL when no server gives one, REFUSED when there is no server.
    pub async fn ask(&self, question: &Question) -> Answer {
        if self.servers.is_empty() {
            return Answer::code(ResponseCode::Refused);
        }
        if self.rests(Instant::now()) {
            self.broken.fetch_add(1, Ordering::Relaxed);
        }
        let mut last = Answer::code(ResponseCode::ServFail);
        let good = timeout(PATIENCE, self.race(question, &mut last)).await;
        good.ok().flatten().unwrap_or(last)
    }

    /// Asks one server after the other, without giving up those that were asked before.
    async fn race(&self, question: &Question, last: &mut Answer) -> Option<Answer> {
        let now = Instant::now();
        // As configured, but who failed lately comes last.
        let mut order: Vec<&Upstream> = self.servers.iter().collect();
        order.sort_by_key(|server| server.rests(now));
        let attempts = order.len().clamp(MIN_ATTEMPTS, MAX_ATTEMPTS);
        let mut turns = order.into_iter().cycle().take(attempts);
        let mut asked = FuturesUnordered::new();
        let mut latest = None;
        loop {
            if let Some(server) = turns.next() {
                latest = Some(server);
                asked.push(async move { (server, server.exchange(question).await) });
            }
            tokio::select! {
                Some((server, outcome)) = asked.next() => match outcome {
                    // It is there; it only knows nothing of this name.
                    Ok(answer) if answer.is_failure() => {
                        server.note(true, Instant::now());
                        *last = answer;
                    }
                    Ok(answer) => {
                        server.note(true, Instant::now());
                        return Some(answer);
                    }
                    Err(error) => {
                        debug!(server = %server.address(), %error, "an upstream DNS server did not answer");
                        server.note(false, Instant::now());
                    }
                },
                () = sleep(NEXT), if !asked.is_empty() => {
                    // If it answers after all it is well again; until then the others come first.
                    if let Some(silent) = latest.take() {
                        silent.note(false, Instant::now());
                    }
                }
                else => return None,
            }
        }
    }
}
