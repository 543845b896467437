//! Messages whose records come from elsewhere: read and written whole, by the library.
//!
//! What the cluster knows is compiled and copied; this is for answers of other servers, and for aliases that lead to them.

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::Name;
use hickory_proto::serialize::binary::BinDecodable;

use crate::answer::{Answer, Question};
use crate::wire::{self, Ask, Incoming, UDP_PAYLOAD};

/// The question in the library's words.
pub fn question(ask: &Ask) -> Option<Question> {
    let name = Name::from_bytes(ask.written_name()).ok()?;
    let dnssec_ok = ask.edns.is_some_and(|edns| edns.dnssec_ok);
    Some(Question { name, record_type: ask.kind.into(), dnssec_ok })
}

/// The same question as a client would send it: how a target of an alias is asked about.
pub fn ask(question: &Question) -> Option<Box<Ask>> {
    let mut message = Message::new(0, MessageType::Query, OpCode::Query);
    message.add_query(Query::query(question.name.clone(), question.record_type));
    match wire::decode(&message.to_vec().ok()?) {
        Incoming::Ask(ask) => Some(ask),
        Incoming::Ignore | Incoming::Refuse(_) => None,
    }
}

/// What a message answers.
pub fn answer(bytes: &[u8]) -> Option<Answer> {
    Message::from_vec(bytes).ok().map(of)
}

pub fn of(message: Message) -> Answer {
    Answer {
        authoritative: message.metadata.authoritative,
        answers: message.answers,
        authorities: message.authorities,
        additionals: message.additionals,
        ..Answer::code(message.metadata.response_code)
    }
}

/// Writes the answer within `limit` bytes. What does not fit is left out: first the additional records, which the
/// client can ask for, then answers, with the flag that tells the client to come back over TCP.
pub fn encode(ask: &Ask, answer: Answer, limit: usize) -> Option<Vec<u8>> {
    let mut reply = Message::new(ask.id(), MessageType::Response, OpCode::Query);
    reply.metadata.recursion_desired = ask.wants_recursion();
    reply.metadata.checking_disabled = ask.checking_disabled();
    reply.metadata.authoritative = answer.authoritative;
    reply.metadata.recursion_available = true;
    reply.metadata.response_code = answer.code;
    let asked = question(ask)?;
    reply.add_query(Query::query(asked.name, asked.record_type));
    if let Some(client) = ask.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_PAYLOAD).set_dnssec_ok(client.dnssec_ok);
        reply.set_edns(edns);
    }
    reply.answers = answer.answers;
    reply.authorities = answer.authorities;
    reply.additionals = answer.additionals;

    let fits = |reply: &Message| reply.to_vec().ok().filter(|bytes| bytes.len() <= limit);
    if let Some(bytes) = fits(&reply) {
        return Some(bytes);
    }
    reply.additionals.clear();
    if let Some(bytes) = fits(&reply) {
        return Some(bytes);
    }
    reply.metadata.truncation = true;
    reply.authorities.clear();
    loop {
        let bytes = reply.to_vec().ok()?;
        if bytes.len() <= limit {
            return Some(bytes);
        }
        let most = reply.answers.len().checked_sub(1)?;
        reply.answers.truncate(most.min(reply.answers.len() * limit / bytes.len()));
    }
}

/// The number of a response code on the wire.
pub fn number(code: ResponseCode) -> u16 {
    code.into()
}
