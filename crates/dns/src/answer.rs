//! A question and its answer, apart from the message that carries them.

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::CNAME;
use hickory_proto::rr::{Name, RData, Record, RecordType};

/// What a client wants to know, always of class IN.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Question {
    /// In the client's case, which answers preserve.
    pub name: Name,
    pub record_type: RecordType,
    /// The client wants DNSSEC records too (EDNS DO); upstream servers are told.
    pub dnssec_ok: bool,
}

impl Question {
    pub fn new(name: Name, record_type: RecordType) -> Self {
        Question { name, record_type, dnssec_ok: false }
    }

    pub fn wants_address(&self) -> bool {
        matches!(self.record_type, RecordType::A | RecordType::AAAA)
    }
}

/// What is known about a question.
#[derive(Debug, Clone)]
pub struct Answer {
    pub code: ResponseCode,
    pub authoritative: bool,
    pub answers: Vec<Record>,
    pub authorities: Vec<Record>,
    pub additionals: Vec<Record>,
}

impl Answer {
    /// Nothing but a response code.
    pub fn code(code: ResponseCode) -> Self {
        Answer { code, authoritative: false, answers: Vec::new(), authorities: Vec::new(), additionals: Vec::new() }
    }

    /// Says that the records of another name stand for this one's.
    pub fn alias(name: &Name, ttl: u32, target: &Name) -> Self {
        let record = Record::from_rdata(name.clone(), ttl, RData::CNAME(CNAME(target.clone())));
        Answer { answers: vec![record], authoritative: true, ..Answer::code(ResponseCode::NoError) }
    }

    /// There are records, and nothing went wrong.
    pub fn is_positive(&self) -> bool {
        self.code == ResponseCode::NoError && !self.answers.is_empty()
    }

    /// The server could not say anything of the name.
    pub fn is_failure(&self) -> bool {
        !matches!(self.code, ResponseCode::NoError | ResponseCode::NXDomain)
    }

    /// This alias with what was found behind it.
    pub fn followed_by(mut self, target: Answer) -> Self {
        // The alias itself is a good answer, even when its target cannot be resolved now.
        if !target.is_failure() {
            self.code = target.code;
        }
        self.authoritative &= target.authoritative;
        self.answers.extend(target.answers);
        self.authorities.extend(target.authorities);
        self.additionals.extend(target.additionals);
        self
    }

    /// Clients mostly take the first address: give each question another one.
    pub fn rotate(&mut self, by: usize) {
        let is_address = |record: &Record| matches!(record.record_type(), RecordType::A | RecordType::AAAA);
        let Some(first) = self.answers.iter().position(is_address) else { return };
        let addresses = &mut self.answers[first..];
        if addresses.iter().all(is_address) {
            let by = by % addresses.len();
            addresses.rotate_left(by);
        }
    }
}
