//! Keeps upstream answers for as long as they say, within bounds.

use std::collections::{HashMap, VecDeque};
use std::time::Duration;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::{RData, Record, RecordType};
use tokio::time::Instant;

use crate::answer::{Answer, Question};

const CAPACITY: usize = 10_000;
/// Nobody's word counts longer than this: clients notice changes of outside names within half a minute.
const MAX_SECONDS: u32 = 30;

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
    /// The stored answer with what is left of its time to live.
    pub fn get(&self, question: &Question, now: Instant) -> Option<Answer> {
        let entry = self.entries.get(&Key::of(question))?;
        let age = now.saturating_duration_since(entry.stored);
        if age >= Duration::from_secs(entry.seconds.into()) {
            return None;
        }
        let age = u32::try_from(age.as_secs()).unwrap_or(u32::MAX);
        let mut answer = entry.answer.clone();
        for record in records_of(&mut answer) {
            record.ttl = record.ttl.saturating_sub(age);
            // Another client may have asked in another case.
            if record.name == question.name {
                record.name = question.name.clone();
            }
        }
        Some(answer)
    }

    /// Stores an answer that may be kept; others pass by.
    pub fn put(&mut self, question: &Question, answer: &Answer, now: Instant) {
        let Some(seconds) = time_to_live(answer) else { return };
        let key = Key::of(question);
        let mut answer = answer.clone();
        for record in records_of(&mut answer) {
            record.ttl = record.ttl.min(MAX_SECONDS);
        }
        if self.entries.insert(key.clone(), Entry { answer, stored: now, seconds }).is_some() {
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
        _ => return None,
    };
    Some(seconds.min(MAX_SECONDS)).filter(|seconds| *seconds > 0)
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use hickory_proto::rr::Name;

    use super::*;

    fn question(name: &str) -> Question {
        Question::new(Name::from_ascii(name).expect("a name"), RecordType::A)
    }

    fn answer(name: &str, ttl: u32) -> Answer {
        let owner = Name::from_ascii(name).expect("a name");
        let record = Record::from_rdata(owner, ttl, RData::from(Ipv4Addr::new(192, 0, 2, 1)));
        Answer { answers: vec![record], ..Answer::code(ResponseCode::NoError) }
    }

    #[test]
    fn answers_age_and_end() {
        let start = Instant::now();
        let mut cache = Cache::default();
        cache.put(&question("a.example."), &answer("a.example.", 10), start);
        let found = cache.get(&question("A.example."), start + Duration::from_secs(4)).expect("still fresh");
        assert_eq!(found.answers[0].ttl, 6);
        assert!(found.answers[0].name.eq_case(&question("A.example.").name), "the client's case is kept");
        assert!(cache.get(&question("a.example."), start + Duration::from_secs(10)).is_none());
    }

    #[test]
    fn nobody_is_believed_for_long_and_zero_not_at_all() {
        let start = Instant::now();
        let mut cache = Cache::default();
        cache.put(&question("a."), &answer("a.", 86_400), start);
        cache.put(&question("b."), &answer("b.", 0), start);
        cache.put(&question("c."), &Answer::code(ResponseCode::ServFail), start);
        cache.put(&question("d."), &Answer::code(ResponseCode::NXDomain), start);
        assert_eq!(cache.get(&question("a."), start).map(|found| found.answers[0].ttl), Some(30));
        for name in ["b.", "c.", "d."] {
            assert!(cache.get(&question(name), start).is_none(), "{name} is not kept");
        }
    }

    #[test]
    fn the_oldest_makes_room() {
        let start = Instant::now();
        let mut cache = Cache { capacity: 2, ..Cache::default() };
        for name in ["a.", "b.", "a.", "c."] {
            cache.put(&question(name), &answer(name, 10), start);
        }
        assert!(cache.get(&question("a."), start).is_none());
        assert!(cache.get(&question("b."), start).is_some());
        assert!(cache.get(&question("c."), start).is_some());
    }
}
