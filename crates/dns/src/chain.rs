//! Where answers come from, in order.

use std::sync::{Arc, Mutex, PoisonError, RwLock};

use hickory_proto::op::ResponseCode;
use services::ServiceTable;
use tokio::time::Instant;

use crate::answer::{Answer, Question};
use crate::cache::Cache;
use crate::forward::Forward;
use crate::reverse::ReverseZones;
use crate::zone::Zone;

/// Who may answer. The first that knows does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Source {
    /// Names of Services and endpoints.
    ClusterZone,
    /// Addresses of Services and endpoints.
    ReverseZones,
    /// What an upstream server said a moment ago.
    Cache,
    /// An upstream server.
    Forward,
}

/// The order of sources for every question.
pub const CHAIN: &[Source] = &[Source::ClusterZone, Source::ReverseZones, Source::Cache, Source::Forward];

/// Aliases that are followed for one question.
const MAX_ALIASES: usize = 8;

impl Source {
    /// The CoreDNS plugin that does the same, as metrics name it.
    pub fn plugin(self) -> &'static str {
        match self {
            Source::ClusterZone | Source::ReverseZones => "kubernetes",
            Source::Cache => "cache",
            Source::Forward => "forward",
        }
    }
}

/// How far a question came without waiting.
#[derive(Debug)]
pub enum Progress {
    Done(Answer, Source),
    /// An upstream server must be asked; `so_far` holds the aliases that led there.
    Waiting {
        so_far: Option<Answer>,
        question: Question,
    },
}

/// The chain over one table.
pub struct Resolver {
    zone: Zone,
    reverse: ReverseZones,
    table: Arc<RwLock<ServiceTable>>,
    cache: Mutex<Cache>,
    forward: Forward,
}

impl Resolver {
    pub(crate) fn new(zone: Zone, reverse: ReverseZones, table: Arc<RwLock<ServiceTable>>, forward: Forward) -> Self {
        Resolver { zone, reverse, table, cache: Mutex::new(Cache::default()), forward }
    }

    /// A resolver that has no upstream servers: it knows the cluster's names only.
    pub fn without_upstreams(zone: Zone, reverse: ReverseZones, table: Arc<RwLock<ServiceTable>>) -> Self {
        Resolver::new(zone, reverse, table, Forward::nowhere())
    }

    /// Whether the table is complete, so that answers mean something.
    pub fn is_ready(&self) -> bool {
        self.table.read().unwrap_or_else(PoisonError::into_inner).is_synced()
    }

    /// Answers from memory, following aliases, until an upstream server would have to be asked.
    pub fn begin(&self, question: &Question, now: Instant) -> Progress {
        if question.is_transfer() {
            return Progress::Done(Answer::code(ResponseCode::Refused), Source::ClusterZone);
        }
        let mut so_far: Option<Answer> = None;
        let mut question = question.clone();
        let mut last = Source::ClusterZone;
        for _ in 0..=MAX_ALIASES {
            let Some((mut answer, source)) = self.recall(&question, now) else {
                return Progress::Waiting { so_far, question };
            };
            last = source;
            let target = answer.follow.take();
            so_far = Some(match so_far {
                Some(alias) => alias.followed_by(answer),
                None => answer,
            });
            match target {
                Some(target) => question.name = target,
                None => break,
            }
        }
        Progress::Done(so_far.unwrap_or_else(|| Answer::code(ResponseCode::ServFail)), last)
    }

    /// Asks upstream for what [`Resolver::begin`] could not answer.
    pub async fn finish(&self, so_far: Option<Answer>, question: &Question) -> (Answer, Source) {
        let answer = self.forward.ask(question).await;
        self.cache.lock().unwrap_or_else(PoisonError::into_inner).put(question, &answer, Instant::now());
        let answer = match so_far {
            Some(alias) => alias.followed_by(answer),
            None => answer,
        };
        (answer, Source::Forward)
    }

    fn recall(&self, question: &Question, now: Instant) -> Option<(Answer, Source)> {
        CHAIN.iter().find_map(|source| {
            let answer = match source {
                Source::ClusterZone => {
                    let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
                    self.zone.answer(&table, question)
                }
                Source::ReverseZones => {
                    let table = self.table.read().unwrap_or_else(PoisonError::into_inner);
                    self.reverse.answer(&table, question)
                }
                Source::Cache => self.cache.lock().unwrap_or_else(PoisonError::into_inner).get(question, now),
                Source::Forward => None,
            };
            answer.map(|answer| (answer, *source))
        })
    }
}
