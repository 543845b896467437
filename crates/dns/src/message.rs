//! From bytes to a question, and from an answer to bytes that fit.

use hickory_proto::op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::DNSClass;

use crate::answer::{Answer, Question};

/// The UDP payload that crosses every path without fragments (DNS flag day 2020).
pub const UDP_PAYLOAD: u16 = 1232;
/// What a client without EDNS takes (RFC 1035).
const PLAIN_PAYLOAD: u16 = 512;

/// A request that deserves an answer.
pub struct Request {
    metadata: Metadata,
    queries: Vec<Query>,
    edns: Option<Edns>,
}

/// What a client sent.
pub enum Incoming {
    /// Not a question: answering could start a loop between two servers.
    Ignore,
    /// Not a question that can be answered: here is the error.
    Refuse(Request, Answer),
    Ask(Request, Question),
}

/// Reads one message.
pub fn decode(bytes: &[u8]) -> Incoming {
    let Some(&[id_high, id_low, flags]) = bytes.first_chunk() else { return Incoming::Ignore };
    if flags & 0x80 != 0 {
        return Incoming::Ignore;
    }
    let Ok(message) = Message::from_vec(bytes) else {
        let metadata = Metadata::new(u16::from_be_bytes([id_high, id_low]), MessageType::Query, OpCode::Query);
        let request = Request { metadata, queries: Vec::new(), edns: None };
        return Incoming::Refuse(request, Answer::code(ResponseCode::FormErr));
    };
    let request = Request { metadata: message.metadata, queries: message.queries, edns: message.edns };
    let refusal = match request.queries.as_slice() {
        _ if request.edns.as_ref().is_some_and(|edns| edns.version() > 0) => ResponseCode::BADVERS,
        _ if request.metadata.op_code != OpCode::Query => ResponseCode::NotImp,
        [query] if query.query_class() != DNSClass::IN => ResponseCode::Refused,
        [query] => {
            let mut question = Question::new(query.name().clone(), query.query_type());
            question.dnssec_ok = request.edns.as_ref().is_some_and(|edns| edns.flags().dnssec_ok);
            return Incoming::Ask(request, question);
        }
        _ => ResponseCode::FormErr,
    };
    Incoming::Refuse(request, Answer::code(refusal))
}

impl Request {
    /// A number that differs from question to question.
    pub fn id(&self) -> u16 {
        self.metadata.id
    }

    /// The bytes that this client can take in one UDP packet.
    pub fn udp_limit(&self) -> usize {
        let limit =
            self.edns.as_ref().map_or(PLAIN_PAYLOAD, |edns| edns.max_payload().clamp(PLAIN_PAYLOAD, UDP_PAYLOAD));
        usize::from(limit)
    }

    /// Writes the answer within `limit` bytes. What does not fit is left out: first the additional records, which the
    /// client can ask for, then answers, with the flag that tells the client to come back over TCP.
    pub fn encode(&self, answer: Answer, limit: usize) -> Option<Vec<u8>> {
        let mut reply = Message::new(self.metadata.id, MessageType::Response, self.metadata.op_code);
        reply.metadata = Metadata::response_from_request(&self.metadata);
        reply.metadata.authoritative = answer.authoritative;
        reply.metadata.recursion_available = true;
        reply.metadata.response_code = answer.code;
        reply.add_queries(self.queries.iter().cloned());
        if let Some(asked) = &self.edns {
            let mut edns = Edns::new();
            edns.set_max_payload(UDP_PAYLOAD).set_dnssec_ok(asked.flags().dnssec_ok);
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
}
