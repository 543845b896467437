//! One upstream server: how it is written, how it is reached, and how it has done lately.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hickory_proto::op::{Edns, Message, MessageType, Query, ResponseCode};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UdpSocket;
use tokio::time::Instant;
use tokio_rustls::TlsConnector;
use tokio_rustls::rustls::ClientConfig;
use tokio_rustls::rustls::pki_types::ServerName;

use crate::answer::{Answer, Question};
use crate::config::SocketMaker;
use crate::counts::{CODES, Histogram, SECONDS, code_index};
use crate::error::DnsError;
use crate::wire::UDP_PAYLOAD;
use crate::{compile, message};

const PORT: u16 = 53;
const TLS_PORT: u16 = 853;
/// A server that fails is left alone for so long, twice as long after each further failure.
const FIRST_REST: Duration = Duration::from_millis(500);
const LONGEST_REST: Duration = Duration::from_secs(30);
/// Connections that wait for the next question, for a server that is spoken to over TCP or TLS.
const MAX_IDLE: usize = 4;
/// Servers may close what is silent for longer.
const IDLE: Duration = Duration::from_secs(8);

/// How a server is spoken to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Transport {
    /// UDP, and TCP for what does not fit.
    Udp,
    Tcp,
    /// DNS over TLS (RFC 7858); the certificate is for this name.
    Tls(ServerName<'static>),
}

/// An upstream server as an operator writes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UpstreamServer {
    pub address: SocketAddr,
    pub transport: Transport,
}

impl From<SocketAddr> for UpstreamServer {
    fn from(address: SocketAddr) -> Self {
        UpstreamServer { address, transport: Transport::Udp }
    }
}

impl FromStr for UpstreamServer {
    type Err = DnsError;

    fn from_str(text: &str) -> Result<Self, DnsError> {
        let wrong = |reason: &str| DnsError::Upstream { text: text.to_owned(), reason: reason.to_owned() };
        let (scheme, rest) = text.split_once("://").unwrap_or(("udp", text));
        let (host, name) = rest.split_once('#').map_or((rest, None), |(host, name)| (host, Some(name)));
        let port = if scheme == "tls" { TLS_PORT } else { PORT };
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        let address = match bare.parse::<IpAddr>() {
            Ok(ip) => SocketAddr::new(ip, port),
            Err(_) => host.parse().map_err(|_| wrong("servers are given by address, with or without a port"))?,
        };
        let transport = match (scheme, name) {
            ("udp", None) => Transport::Udp,
            ("tcp", None) => Transport::Tcp,
            ("udp" | "tcp", Some(_)) => return Err(wrong("only tls:// has a name after #")),
            ("tls", name) => {
                let name = name.map_or_else(|| address.ip().to_string(), str::to_owned);
                Transport::Tls(ServerName::try_from(name).map_err(|_| wrong("what follows # is no server name"))?)
            }
            _ => return Err(wrong("the ways to speak to it are udp, tcp and tls")),
        };
        Ok(UpstreamServer { address, transport })
    }
}

/// Reads `ZONE=SERVER[,SERVER…]`.
pub fn parse_stub(text: &str) -> Result<(String, Vec<UpstreamServer>), DnsError> {
    let wrong = |reason: &str| DnsError::Stub { text: text.to_owned(), reason: reason.to_owned() };
    let (zone, servers) = text.split_once('=').ok_or_else(|| wrong("there is no ="))?;
    compile::name(zone).ok_or_else(|| wrong("what precedes the = is no DNS name"))?;
    let servers: Vec<UpstreamServer> = servers.split(',').map(str::parse).collect::<Result<_, _>>()?;
    Ok((zone.to_owned(), servers))
}

impl fmt::Display for UpstreamServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.address)
    }
}

#[derive(Default)]
struct Health {
    failures: u32,
    rests_until: Option<Instant>,
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}
type Connection = Box<dyn Stream>;

/// A server with what is known of it.
pub struct Upstream {
    server: UpstreamServer,
    sockets: Arc<dyn SocketMaker>,
    tls: Option<TlsConnector>,
    health: Mutex<Health>,
    idle: Mutex<Vec<(Connection, Instant)>>,
    /// How long answers took, by their code as in [`CODES`].
    pub took: [Histogram<{ SECONDS.len() }>; CODES.len()],
    /// How often it was left alone.
    pub failures: AtomicU64,
}

impl Upstream {
    pub fn new(
        server: UpstreamServer,
        sockets: Arc<dyn SocketMaker>,
        tls: Option<&Arc<ClientConfig>>,
    ) -> Result<Self, DnsError> {
        let tls = tls.cloned().map(TlsConnector::from);
        if matches!(server.transport, Transport::Tls(_)) && tls.is_none() {
            return Err(DnsError::NoAuthorities { server: server.address });
        }
        Ok(Upstream {
            server,
            sockets,
            tls,
            health: Mutex::default(),
            idle: Mutex::default(),
            took: std::array::from_fn(|_| Histogram::new(&SECONDS)),
            failures: AtomicU64::new(0),
        })
    }

    pub fn address(&self) -> SocketAddr {
        self.server.address
    }

    /// It failed, and it is not yet time to try again.
    pub fn rests(&self, now: Instant) -> bool {
        let health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        health.rests_until.is_some_and(|until| now < until)
    }

    /// Takes note of how a question went.
    pub fn note(&self, answered: bool, now: Instant) {
        let mut health = self.health.lock().unwrap_or_else(PoisonError::into_inner);
        if answered {
            *health = Health::default();
            return;
        }
        // Several questions may fail for one reason: the first of them counts.
        if health.rests_until.is_some_and(|until| now < until) {
            return;
        }
        let rest = FIRST_REST.saturating_mul(1 << health.failures.min(10)).min(LONGEST_REST);
        health.failures = health.failures.saturating_add(1);
        self.failures.fetch_add(1, Ordering::Relaxed);
        health.rests_until = Some(now + rest);
    }

    /// Asks; the caller decides how long to wait.
    pub async fn exchange(&self, question: &Question) -> io::Result<Answer> {
        // The library's random id, and the kernel's random port for each question over UDP, are what a forger has to guess.
        let mut request = Message::query();
        request.metadata.recursion_desired = true;
        request.add_query(Query::query(question.name.clone(), question.record_type));
        let mut edns = Edns::new();
        edns.set_max_payload(UDP_PAYLOAD).set_dnssec_ok(question.dnssec_ok);
        request.set_edns(edns);
        let bytes = request.to_vec().map_err(io::Error::other)?;
        let begun = Instant::now();
        let reply = match self.server.transport {
            Transport::Udp => {
                let reply = self.over_udp(&request, &bytes).await?;
                if reply.metadata.truncation { self.over_stream(&request, &bytes).await? } else { reply }
            }
            Transport::Tcp | Transport::Tls(_) => self.over_stream(&request, &bytes).await?,
        };
        let code = u16::from(reply.metadata.response_code);
        self.took[code_index(code)].add(begun.elapsed().as_secs_f64());
        let mut answer = message::of(reply);
        // Another server's authority is not ours.
        answer.authoritative = false;
        Ok(answer)
    }

    async fn over_udp(&self, request: &Message, bytes: &[u8]) -> io::Result<Message> {
        let socket = self.sockets.udp(self.server.address)?;
        socket.set_nonblocking(true)?;
        let socket = UdpSocket::from_std(socket)?;
        socket.connect(self.server.address).await?;
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

    async fn over_stream(&self, request: &Message, bytes: &[u8]) -> io::Result<Message> {
        let held = self.take_idle(Instant::now());
        // The server may have closed what was idle: then a new connection is as good as the first.
        if let Some(connection) = held
            && let Ok(reply) = self.converse(connection, request, bytes).await
        {
            return Ok(reply);
        }
        self.converse(self.connect().await?, request, bytes).await
    }

    async fn connect(&self) -> io::Result<Connection> {
        let stream = self.sockets.tcp(self.server.address)?.connect(self.server.address).await?;
        stream.set_nodelay(true)?;
        match (&self.server.transport, &self.tls) {
            (Transport::Tls(name), Some(tls)) => Ok(Box::new(tls.connect(name.clone(), stream).await?)),
            _ => Ok(Box::new(stream)),
        }
    }

    async fn converse(&self, mut stream: Connection, request: &Message, bytes: &[u8]) -> io::Result<Message> {
        let length = u16::try_from(bytes.len()).map_err(io::Error::other)?;
        let mut framed = length.to_be_bytes().to_vec();
        framed.extend_from_slice(bytes);
        stream.write_all(&framed).await?;
        stream.flush().await?;
        let length = stream.read_u16().await?;
        let mut buffer = vec![0; usize::from(length)];
        stream.read_exact(&mut buffer).await?;
        let reply = reply_to(request, &buffer);
        let reply = reply.ok_or_else(|| io::Error::other("the answer belongs to another question"))?;
        if self.server.transport != Transport::Udp {
            let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
            if idle.len() < MAX_IDLE {
                idle.push((stream, Instant::now()));
            }
        }
        Ok(reply)
    }

    fn take_idle(&self, now: Instant) -> Option<Connection> {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.retain(|(_, since)| now.saturating_duration_since(*since) < IDLE);
        idle.pop().map(|(connection, _)| connection)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_written_in_three_ways() {
        for (text, address, is_tls) in [
            ("192.0.2.1", "192.0.2.1:53", false),
            ("2001:db8::1", "[2001:db8::1]:53", false),
            ("[2001:db8::1]:5353", "[2001:db8::1]:5353", false),
            ("tcp://192.0.2.1:54", "192.0.2.1:54", false),
            ("tls://192.0.2.1", "192.0.2.1:853", true),
            ("tls://192.0.2.1:8853#dns.example", "192.0.2.1:8853", true),
        ] {
            let server: UpstreamServer = text.parse().expect(text);
            assert_eq!(server.address.to_string(), address);
            assert_eq!(matches!(server.transport, Transport::Tls(_)), is_tls, "{text}");
        }
        for (text, part) in [
            ("dns.example", "by address"),
            ("https://192.0.2.1", "udp, tcp and tls"),
            ("192.0.2.1#dns.example", "only tls://"),
            ("tls://192.0.2.1#a b", "no server name"),
        ] {
            let error = text.parse::<UpstreamServer>().expect_err(text).to_string();
            assert!(error.contains(part), "{error}");
        }
    }

    #[test]
    fn who_fails_rests_longer_each_time_until_it_answers() {
        let sockets = Arc::new(crate::config::HostSockets);
        let server: UpstreamServer = "192.0.2.1".parse().expect("a server");
        let upstream = Upstream::new(server, sockets, None).expect("no TLS");
        let start = Instant::now();
        upstream.note(false, start);
        upstream.note(false, start);
        assert!(upstream.rests(start) && !upstream.rests(start + FIRST_REST));
        upstream.note(false, start + FIRST_REST);
        assert!(upstream.rests(start + FIRST_REST * 2));
        upstream.note(true, start + FIRST_REST * 2);
        assert!(!upstream.rests(start + FIRST_REST * 2));
    }
}
