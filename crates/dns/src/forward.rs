//! Asks upstream servers, over UDP and, when an answer does not fit, over TCP.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, Query, ResponseCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::time::timeout;
use tracing::debug;

use crate::answer::{Answer, Question};
use crate::config::{HostSockets, SocketMaker};
use crate::message::UDP_PAYLOAD;

/// How long one server may think. Clients ask again after five seconds.
const PATIENCE: Duration = Duration::from_secs(2);
/// A single server is asked again once, because UDP loses packets.
const MIN_ATTEMPTS: usize = 2;
const MAX_ATTEMPTS: usize = 4;

/// The upstream servers.
pub struct Forward {
    servers: Vec<SocketAddr>,
    sockets: Arc<dyn SocketMaker>,
    /// The server that answered last: it is asked first.
    preferred: AtomicUsize,
}

impl Forward {
    pub fn new(servers: Vec<SocketAddr>, sockets: Arc<dyn SocketMaker>) -> Self {
        Forward { servers, sockets, preferred: AtomicUsize::new(0) }
    }

    pub fn nowhere() -> Self {
        Forward::new(Vec::new(), Arc::new(HostSockets))
    }

    /// The first good answer; SERVFAIL when no server gives one, REFUSED when there is no server.
    pub async fn ask(&self, question: &Question) -> Answer {
        if self.servers.is_empty() {
            return Answer::code(ResponseCode::Refused);
        }
        let first = self.preferred.load(Ordering::Relaxed);
        let attempts = self.servers.len().clamp(MIN_ATTEMPTS, MAX_ATTEMPTS);
        let mut last = Answer::code(ResponseCode::ServFail);
        for attempt in 0..attempts {
            let index = (first + attempt) % self.servers.len();
            let server = self.servers[index];
            match timeout(PATIENCE, self.exchange(server, question)).await {
                Ok(Ok(answer)) if matches!(answer.code, ResponseCode::ServFail | ResponseCode::Refused) => {
                    last = answer;
                }
                Ok(Ok(answer)) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return answer;
                }
                Ok(Err(error)) => debug!(%server, %error, "an upstream DNS server did not answer"),
                Err(_) => debug!(%server, "an upstream DNS server took too long"),
            }
        }
        last
    }

    async fn exchange(&self, server: SocketAddr, question: &Question) -> io::Result<Answer> {
        let mut request = Message::query();
        request.metadata.recursion_desired = true;
        request.add_query(Query::query(question.name.clone(), question.record_type));
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_PAYLOAD).set_dnssec_ok(question.dnssec_ok);
        request.set_edns(edns);
        let bytes = request.to_vec().map_err(io::Error::other)?;

        let reply = self.over_udp(server, &request, &bytes).await?;
        let reply = if reply.metadata.truncation { self.over_tcp(server, &request, &bytes).await? } else { reply };
        Ok(Answer {
            answers: reply.answers,
            authorities: reply.authorities,
            additionals: reply.additionals,
            ..Answer::code(reply.metadata.response_code)
        })
    }

    async fn over_udp(&self, server: SocketAddr, request: &Message, bytes: &[u8]) -> io::Result<Message> {
        // A socket of its own for every question: its random port is half of what a forger has to guess.
        let socket = self.sockets.udp(server)?;
        socket.set_nonblocking(true)?;
        let socket = UdpSocket::from_std(socket)?;
        socket.connect(server).await?;
        socket.send(bytes).await?;
        let mut buffer = vec![0; usize::from(u16::MAX)];
        loop {
            let length = socket.recv(&mut buffer).await?;
            // Anything else is late or forged: the answer may still come.
            if let Some(reply) = reply_to(request, &buffer[..length]) {
                return Ok(reply);
            }
        }
    }

    async fn over_tcp(&self, server: SocketAddr, request: &Message, bytes: &[u8]) -> io::Result<Message> {
        let mut stream = self.sockets.tcp(server)?.connect(server).await?;
        let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
        let mut framed = length.to_be_bytes().to_vec();
        framed.extend_from_slice(bytes);
        stream.write_all(&framed).await?;
        let length = stream.read_u16().await?;
        let mut buffer = vec![0; usize::from(length)];
        stream.read_exact(&mut buffer).await?;
        reply_to(request, &buffer).ok_or_else(|| io::Error::other("the answer belongs to another question"))
    }
}

/// The message, if it answers this request.
fn reply_to(request: &Message, bytes: &[u8]) -> Option<Message> {
    let reply = Message::from_vec(bytes).ok()?;
    let is_reply = reply.metadata.message_type == MessageType::Response && reply.metadata.id == request.metadata.id;
    // Some servers leave the question out of an error.
    let same_question = reply.queries == request.queries
        || (reply.queries.is_empty() && reply.metadata.response_code != ResponseCode::NoError);
    (is_reply && same_question).then_some(reply)
}
