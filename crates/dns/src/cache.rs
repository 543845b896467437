//! Keeps upstream answers for as long as they say, within bounds; and beyond, for when nobody answers any more.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::{RData, Record, RecordType};
use tokio::time::Instant;

use crate::answer::{Answer, Question};

const CAPACITY: usize = 10_000;
/// Nobody's word counts longer than this: clients notice changes of outside names within half a minute.
const MAX_SECONDS: u32 = 30;
/// That nobody could say anything is remembered too, or every client's every try would be passed on (RFC 9520).
const FAILURE_SECONDS: u32 = 1;
/// How long the last good answer may stand in for one that nobody gives (RFC 8767).
const STALE: Duration = Duration::from_secs(24 * 3600);
/// What such an answer says of its own time to live.
const STALE_SECONDS: u32 = 5;
/// Who was asked so often is asked again before its time is over.
const POPULAR: u32 = 3;

#[derive(PartialEq, Eq, Hash, Clone)]
struct Key {
    name: String,
    record_type: RecordType,
    dnssec_ok: bool,
}

impl Key {
    fn of(question: &Question) -> Self {
        Key {
            name: question.name.to_lowercase().to_ascii(),
            record_type: question.record_type,
            dnssec_ok: question.dnssec_ok,
        }
    }
}

struct Entry {
    answer: Answer,
    stored: Instant,
    seconds: u32,
    hits: u32,
    refreshing: bool,
    /// Until when nobody is to be asked again: the last try failed.
    failed_until: Option<Instant>,
}

/// What the cache has of a question.
#[derive(Debug)]
pub enum Cached {
    /// `refresh`: many want it and it ends soon, so that somebody should ask for it now. Said once.
    Fresh {
        answer: Answer,
        refresh: bool,
    },
    /// Its time is over; better than none.
    Stale {
        answer: Answer,
        failed: bool,
    },
    None,
}

/// Answers by question, oldest out first.
pub struct Cache {
    entries: HashMap<Key, Entry>,
    /// Every key of `entries` once, in the order of first arrival.
    arrivals: VecDeque<Key>,
    capacity: usize,
}

impl Default for Cache {
    fn default() -> Self {
        Cache { entries: HashMap::new(), arrivals: VecDeque::new(), capacity: CAPACITY }
    }
}

impl Cache {
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// The stored answer with what is left of its time to live.
    pub fn get(&mut self, question: &Question, now: Instant) -> Cached {
        let Some(entry) = self.entries.get_mut(&Key::of(question)) else { return Cached::None };
        let age = now.saturating_duration_since(entry.stored);
        let life = Duration::from_secs(entry.seconds.into());
        let mut answer = entry.answer.clone();
        let is_fresh = age < life;
        if !is_fresh && (answer.is_failure() || age > STALE) {
            return Cached::None;
        }
        let passed = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
        for record in records_of(&mut answer) {
            record.ttl = if is_fresh { record.ttl.saturating_sub(passed) } else { STALE_SECONDS };
            // Another client may have asked in another case.
            if record.name == question.name {
                record.name = question.name.clone();
            }
        }
        if !is_fresh {
            return Cached::Stale { answer, failed: entry.failed_until.is_some_and(|until| now < until) };
        }
        entry.hits += 1;
        let refresh = entry.hits >= POPULAR && !entry.refreshing && age * 5 >= life * 4;
        entry.refreshing |= refresh;
        Cached::Fresh { answer, refresh }
    }

    /// Stores an answer that may be kept; others pass by. A failure never replaces something good.
    pub fn put(&mut self, question: &Question, answer: &Answer, now: Instant) {
        let key = Key::of(question);
        if answer.is_failure()
            && let Some(good) = self.entries.get_mut(&key).filter(|entry| !entry.answer.is_failure())
        {
            good.refreshing = false;
            good.failed_until = Some(now + Duration::from_secs(FAILURE_SECONDS.into()));
            return;
        }
        let Some(seconds) = time_to_live(answer) else { return };
        let mut answer = answer.clone();
        for record in records_of(&mut answer) {
            record.ttl = record.ttl.min(MAX_SECONDS);
        }
        let entry = Entry { answer, stored: now, seconds, hits: 0, refreshing: false, failed_until: None };
        if self.entries.insert(key.clone(), entry).is_some() {
            return;
        }
        self.arrivals.push_back(key);
        if self.arrivals.len() > self.capacity
            && let Some(oldest) = self.arrivals.pop_front()
        {
            self.entries.remove(&oldest);
        }
    }
}

fn records_of(answer: &mut Answer) -> impl Iterator<Item = &mut Record> {
    answer.answers.iter_mut().chain(&mut answer.authorities).chain(&mut answer.additionals)
}

/// Seconds that an answer may be kept: the shortest of its records, or what the SOA of a negative one allows (RFC
/// 2308). `None` for what must not be kept.
fn time_to_live(answer: &Answer) -> Option<u32> {
    let seconds = match answer.code {
        ResponseCode::NoError if !answer.answers.is_empty() => answer.answers.iter().map(|record| record.ttl).min()?,
        ResponseCode::NoError | ResponseCode::NXDomain => {
            answer.authorities.iter().find_map(|record| match &record.data {
                RData::SOA(soa) => Some(record.ttl.min(soa.minimum)),
                _ => None,
            })?
        }
        ResponseCode::ServFail => FAILURE_SECONDS,
        _ => return None,
    };
    Some(seconds.min(MAX_SECONDS)).filter(|seconds| *seconds > 0)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hickory_proto::rr::Name;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn question(name: &str) -> Question {
        Question::new(Name::from_ascii(name).expect("a name"), RecordType::A)
    }

    fn answer(name: &str, ttl: u32) -> Answer {
        let owner = Name::from_ascii(name).expect("a name");
        let record = Record::from_rdata(owner, ttl, RData::from(Ipv4Addr::new(192, 0, 2, 1)));
        Answer { answers: vec![record], ..Answer::code(ResponseCode::NoError) }
    }

    fn fresh(cache: &mut Cache, name: &str, now: Instant) -> Option<(Answer, bool)> {
        match cache.get(&question(name), now) {
            Cached::Fresh { answer, refresh } => Some((answer, refresh)),
            _ => None,
        }
    }

    #[test]
    fn answers_age_and_then_only_stand_in() {
        let start = Instant::now();
        let mut cache = Cache::default();
        cache.put(&question("a.example."), &answer("a.example.", 10), start);
        let (found, _) = fresh(&mut cache, "A.example.", start + 4 * SECOND).expect("still fresh");
        assert_eq!(found.answers[0].ttl, 6);
        assert!(found.answers[0].name.eq_case(&question("A.example.").name), "the client's case is kept");
        let Cached::Stale { answer, failed: false } = cache.get(&question("a.example."), start + 10 * SECOND) else {
            panic!("its time is over");
        };
        assert_eq!(answer.answers[0].ttl, STALE_SECONDS);
        let late = start + STALE + SECOND;
        assert!(matches!(cache.get(&question("a.example."), late), Cached::None), "too old for anything");
    }

    #[test]
    fn nobody_is_believed_for_long_and_zero_not_at_all() {
        let start = Instant::now();
        let mut cache = Cache::default();
        cache.put(&question("a."), &answer("a.", 86_400), start);
        cache.put(&question("b."), &answer("b.", 0), start);
        cache.put(&question("c."), &Answer::code(ResponseCode::Refused), start);
        cache.put(&question("d."), &Answer::code(ResponseCode::NXDomain), start);
        assert_eq!(fresh(&mut cache, "a.", start).map(|(found, _)| found.answers[0].ttl), Some(30));
        for name in ["b.", "c.", "d."] {
            assert!(matches!(cache.get(&question(name), start), Cached::None), "{name} is not kept");
        }
    }

    #[test]
    fn a_failure_is_kept_for_a_moment_and_never_hides_a_good_answer() {
        let start = Instant::now();
        let mut cache = Cache::default();
        let failure = Answer::code(ResponseCode::ServFail);
        cache.put(&question("a."), &failure, start);
        assert!(fresh(&mut cache, "a.", start).is_some_and(|(found, _)| found.is_failure()));
        assert!(matches!(cache.get(&question("a."), start + SECOND), Cached::None));
        cache.put(&question("b."), &answer("b.", 2), start);
        cache.put(&question("b."), &failure, start + 2 * SECOND);
        let held = cache.get(&question("b."), start + 2 * SECOND);
        assert!(matches!(held, Cached::Stale { failed: true, .. }), "{held:?}");
        let held = cache.get(&question("b."), start + 4 * SECOND);
        assert!(matches!(held, Cached::Stale { failed: false, .. }), "{held:?}");
    }

    #[test]
    fn what_many_want_is_asked_for_again_once_before_it_ends() {
        let start = Instant::now();
        let mut cache = Cache::default();
        cache.put(&question("a."), &answer("a.", 10), start);
        let mut refreshes = |second: u32| fresh(&mut cache, "a.", start + second * SECOND).map(|(_, refresh)| refresh);
        assert_eq!([1, 2, 7].map(&mut refreshes), [Some(false); 3], "not yet");
        assert_eq!([8, 8, 9].map(&mut refreshes), [Some(true), Some(false), Some(false)]);
        cache.put(&question("a."), &answer("a.", 10), start + 9 * SECOND);
        assert_eq!(fresh(&mut cache, "a.", start + 18 * SECOND).map(|(_, refresh)| refresh), Some(false), "one asked");
    }

    #[test]
    fn the_oldest_makes_room() {
        let start = Instant::now();
        let mut cache = Cache { capacity: 2, ..Cache::default() };
        for name in ["a.", "b.", "a.", "c."] {
            cache.put(&question(name), &answer(name, 10), start);
        }
        assert!(matches!(cache.get(&question("a."), start), Cached::None));
        assert!(fresh(&mut cache, "b.", start).is_some());
        assert!(fresh(&mut cache, "c.", start).is_some());
        assert_eq!(cache.len(), 2);
    }
}
