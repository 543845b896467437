//! Other servers: who is asked, over what, and what clients get while they are silent, wrong or gone.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use dns::{DnsConfig, Hosts, Transport, UpstreamServer, Upstreams};
use hickory_proto::op::{Message, Metadata, ResponseCode};
use hickory_proto::rr::{RData, Record, RecordType};
use rcgen::{CertificateParams, KeyPair};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UdpSocket};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::{self, pki_types::ServerName};

use crate::server::{PATIENCE, Running, question, read_framed, write_framed};

const LOCALHOST: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// What an upstream server of a test does with a question.
#[derive(Default)]
struct Temper {
    asked: AtomicUsize,
    /// Says nothing at all.
    silent: AtomicBool,
    /// Says nothing to questions for IPv6 addresses, as some broken ones do.
    drops_ipv6: bool,
    /// The last byte of the address that it gives.
    last: u8,
    ttl: u32,
    /// Sends answers to other questions first.
    lies: bool,
}

impl Temper {
    fn new(last: u8) -> Self {
        Temper { last, ttl: 20, ..Temper::default() }
    }

    fn reply(&self, bytes: &[u8]) -> Option<Message> {
        let request = Message::from_vec(bytes).expect("a message");
        self.asked.fetch_add(1, Ordering::Relaxed);
        let query = request.queries[0].clone();
        if self.silent.load(Ordering::Relaxed) || (self.drops_ipv6 && query.query_type() == RecordType::AAAA) {
            return None;
        }
        let mut reply = request.clone().into_response();
        reply.metadata = Metadata::response_from_request(&request.metadata);
        if query.name().to_ascii().starts_with("nope.") {
            reply.metadata.response_code = ResponseCode::NXDomain;
        } else if query.query_type() == RecordType::A {
            let address = Ipv4Addr::new(192, 0, 2, self.last);
            reply.add_answer(Record::from_rdata(query.name().clone(), self.ttl, RData::from(address)));
        }
        Some(reply)
    }
}

async fn udp(temper: Arc<Temper>) -> SocketAddr {
    let socket = UdpSocket::bind((LOCALHOST, 0)).await.expect("loopback");
    let address = socket.local_addr().expect("bound");
    tokio::spawn(async move {
        let mut buffer = vec![0; 4096];
        while let Ok((length, peer)) = socket.recv_from(&mut buffer).await {
            let Some(reply) = temper.reply(&buffer[..length]) else { continue };
            if temper.lies {
                // Another question's answer with the right id, and the right answer with another id.
                let mut other = reply.clone();
                other.queries[0].set_query_type(RecordType::TXT);
                socket.send_to(&other.to_vec().expect("a message"), peer).await.expect("sent");
                let mut late = reply.clone();
                late.metadata.id ^= 1;
                late.answers.clear();
                socket.send_to(&late.to_vec().expect("a message"), peer).await.expect("sent");
                socket.send_to(b"nonsense", peer).await.expect("sent");
            }
            socket.send_to(&reply.to_vec().expect("a message"), peer).await.expect("sent");
        }
    });
    address
}

async fn converse<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S, temper: &Temper) {
    use tokio::io::AsyncReadExt;
    while let Ok(length) = stream.read_u16().await {
        let mut bytes = vec![0; usize::from(length)];
        stream.read_exact(&mut bytes).await.expect("whole");
        let Some(reply) = temper.reply(&bytes) else { continue };
        let reply = reply.to_vec().expect("a message");
        let length = u16::try_from(reply.len()).expect("short").to_be_bytes();
        stream.write_all(&[length.as_slice(), &reply].concat()).await.expect("sent");
    }
}

/// A server over TLS and who vouches for it; counts connections.
async fn tls(temper: Arc<Temper>, connections: Arc<AtomicUsize>) -> (SocketAddr, Arc<rustls::ClientConfig>) {
    let key = KeyPair::generate().expect("a key");
    let params = CertificateParams::new(vec!["dns.example".to_owned()]).expect("parameters");
    let certificate = params.self_signed(&key).expect("a certificate");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let server = rustls::ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key.serialize_der().try_into().expect("a key"))
        .expect("a certificate");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate.der().clone()).expect("an authority");
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    let listener = TcpListener::bind((LOCALHOST, 0)).await.expect("loopback");
    let address = listener.local_addr().expect("bound");
    let acceptor = TlsAcceptor::from(Arc::new(server));
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            connections.fetch_add(1, Ordering::Relaxed);
            let (acceptor, temper) = (acceptor.clone(), temper.clone());
            // A client that does not trust us goes away.
            tokio::spawn(async move {
                if let Ok(stream) = acceptor.accept(stream).await {
                    converse(stream, &temper).await;
                }
            });
        }
    });
    (address, Arc::new(client))
}

fn only(config: &mut DnsConfig, address: SocketAddr, transport: Transport) {
    config.upstreams = Upstreams::Servers(vec![UpstreamServer { address, transport }]);
}

fn addresses(message: &Message) -> Vec<String> {
    message.answers.iter().map(|record| record.data.to_string()).collect()
}

#[tokio::test]
async fn tls_asks_the_name_that_was_given_and_keeps_the_connection() {
    let (temper, connections) = (Arc::new(Temper::new(1)), Arc::new(AtomicUsize::new(0)));
    let (address, client) = tls(temper.clone(), connections.clone()).await;
    let trusting = client.clone();
    let server = Running::start_with(Vec::new(), |config| {
        config.tls = Some(trusting);
        only(config, address, Transport::Tls(ServerName::try_from("dns.example").expect("a name")));
    })
    .await;
    for name in ["a.example.", "b.example.", "c.example."] {
        assert_eq!(addresses(&server.udp(&question(name, RecordType::A)).await), ["192.0.2.1"]);
    }
    assert_eq!((temper.asked.load(Ordering::Relaxed), connections.load(Ordering::Relaxed)), (3, 1));
    server.stop().await;

    // Another name than the certificate's: nothing is asked.
    let server = Running::start_with(Vec::new(), |config| {
        config.tls = Some(client);
        only(config, address, Transport::Tls(ServerName::try_from("other.example").expect("a name")));
    })
    .await;
    let reply = server.udp(&question("d.example.", RecordType::A)).await;
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    assert_eq!(temper.asked.load(Ordering::Relaxed), 3);
    server.stop().await;
}

#[tokio::test]
async fn tcp_alone_when_the_operator_says_so() {
    let temper = Arc::new(Temper::new(2));
    let listener = TcpListener::bind((LOCALHOST, 0)).await.expect("loopback");
    let address = listener.local_addr().expect("bound");
    let held = temper.clone();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            converse(stream, &held).await;
        }
    });
    let server = Running::start_with(Vec::new(), |config| only(config, address, Transport::Tcp)).await;
    assert_eq!(addresses(&server.udp(&question("a.example.", RecordType::A)).await), ["192.0.2.2"]);
    server.stop().await;
}

#[tokio::test]
async fn stub_domains_go_to_their_own_servers() {
    let (inner, corp, outer) = (Arc::new(Temper::new(1)), Arc::new(Temper::new(2)), Arc::new(Temper::new(3)));
    let servers = [udp(inner).await, udp(corp).await];
    let server = Running::start_with(vec![udp(outer).await], |config| {
        let [inner, corp] = servers.map(|address| vec![UpstreamServer::from(address)]);
        config.stubs = vec![("corp.example".to_owned(), corp), ("inner.corp.example".to_owned(), inner)];
    })
    .await;
    for (name, want) in [
        ("a.inner.corp.example.", "192.0.2.1"),
        ("A.CORP.example.", "192.0.2.2"),
        ("corp.example.", "192.0.2.2"),
        ("acorp.example.", "192.0.2.3"),
    ] {
        assert_eq!(addresses(&server.udp(&question(name, RecordType::A)).await), [want], "{name}");
    }
    server.stop().await;
}

#[tokio::test]
async fn answers_to_other_questions_do_not_count() {
    let temper = Arc::new(Temper { lies: true, ..Temper::new(4) });
    let server = Running::start(vec![udp(temper).await]).await;
    assert_eq!(addresses(&server.udp(&question("a.example.", RecordType::A)).await), ["192.0.2.4"]);
    server.stop().await;
}

#[tokio::test]
async fn a_silent_server_costs_a_moment_once() {
    let dumb = Arc::new(Temper { silent: AtomicBool::new(true), ..Temper::new(5) });
    let good = Arc::new(Temper::new(6));
    let server = Running::start(vec![udp(dumb.clone()).await, udp(good).await]).await;
    for name in ["a.example.", "b.example.", "c.example."] {
        assert_eq!(addresses(&server.udp_patiently(&question(name, RecordType::A)).await), ["192.0.2.6"], "{name}");
    }
    assert_eq!(dumb.asked.load(Ordering::Relaxed), 1, "who was silent is asked last");
    server.stop().await;
}

/// A resolver sends both questions at once and waits five seconds for both answers.
#[tokio::test]
async fn a_and_aaaa_are_both_answered_before_the_client_gives_up() {
    let broken = Arc::new(Temper { drops_ipv6: true, ..Temper::new(7) });
    let server = Running::start(vec![udp(broken).await]).await;
    let socket = UdpSocket::bind((LOCALHOST, 0)).await.expect("loopback");
    socket.connect(server.address).await.expect("loopback");
    let begun = Instant::now();
    for record_type in [RecordType::A, RecordType::AAAA] {
        socket.send(&question("a.example.", record_type).to_vec().expect("a message")).await.expect("sent");
    }
    let mut codes = Vec::new();
    for _ in 0..2 {
        let mut buffer = vec![0; 4096];
        let length =
            tokio::time::timeout(PATIENCE, socket.recv(&mut buffer)).await.expect("in time").expect("an answer");
        codes.push(Message::from_vec(&buffer[..length]).expect("a message").metadata.response_code);
    }
    assert_eq!(codes, [ResponseCode::NoError, ResponseCode::ServFail]);
    assert!(begun.elapsed() < Duration::from_secs(4), "{:?}", begun.elapsed());
    server.stop().await;
}

#[tokio::test]
async fn the_last_good_answer_stands_in_while_servers_fail() {
    let temper = Arc::new(Temper { ttl: 1, ..Temper::new(8) });
    let server = Running::start(vec![udp(temper.clone()).await]).await;
    let asked = question("a.example.", RecordType::A);
    assert_eq!(addresses(&server.udp(&asked).await), ["192.0.2.8"]);
    temper.silent.store(true, Ordering::Relaxed);
    // Until its second is over the answer is simply kept; then it stands in.
    let begun = Instant::now();
    let mut reply = server.udp(&asked).await;
    while begun.elapsed() < PATIENCE && reply.answers[0].ttl != 5 {
        reply = server.udp_patiently(&asked).await;
        assert_eq!(addresses(&reply), ["192.0.2.8"]);
    }
    assert_eq!(reply.answers[0].ttl, 5, "whoever is told to ask again soon");
    assert!(server.metric("coredns_cache_served_stale_total").await >= 1);
    server.stop().await;
}

#[tokio::test]
async fn search_paths_end_upstream_in_one_round_trip_or_as_specified() {
    let temper = Arc::new(Temper::new(9));
    let server = Running::start_with(vec![udp(temper.clone()).await], |config| {
        config.search_clients = vec!["127.0.0.0/8".parse().expect("a range")];
        config.hosts = Hosts::parse("192.0.2.99 written.example").expect("an entry");
    })
    .await;
    let a = server.udp(&question("www.example.default.svc.cluster.local.", RecordType::A)).await;
    assert_eq!(addresses(&a), ["www.example.", "192.0.2.9"]);
    // The name has no IPv6 address, but it is there: the resolver must not look further for it.
    let aaaa = server.udp(&question("www.example.default.svc.cluster.local.", RecordType::AAAA)).await;
    assert_eq!(
        (aaaa.metadata.response_code, addresses(&aaaa)),
        (ResponseCode::NoError, vec!["www.example.".to_owned()])
    );
    let written = server.udp(&question("written.example.default.svc.cluster.local.", RecordType::A)).await;
    assert_eq!(addresses(&written), ["written.example.", "192.0.2.99"]);
    for (name, silent) in
        [("nope.example.default.svc.cluster.local.", false), ("slow.example.default.svc.cluster.local.", true)]
    {
        temper.silent.store(silent, Ordering::Relaxed);
        let begun = Instant::now();
        let reply = server.udp(&question(name, RecordType::A)).await;
        assert_eq!(reply.metadata.response_code, ResponseCode::NXDomain, "{name}");
        assert!(reply.metadata.authoritative && begun.elapsed() < Duration::from_millis(400), "{:?}", begun.elapsed());
    }
    assert_eq!(server.metric("coredns_autopath_success_total").await, 3);
    server.stop().await;
}

#[tokio::test]
async fn a_stub_within_the_zone_is_refused() {
    let stub = dns::parse_stub("in.cluster.local=192.0.2.1").expect("a stub");
    let error = Running::refused(|config| config.stubs = vec![stub]).await;
    assert!(error.contains("in.cluster.local") && error.contains("answered here"), "{error}");
    let error = Running::refused(|config| {
        config.upstreams = Upstreams::Servers(vec!["tls://192.0.2.1".parse().expect("a server")]);
    })
    .await;
    assert!(error.contains("no certificate authority"), "{error}");
}

#[tokio::test]
async fn a_connection_answers_what_was_forwarded_too() {
    let server = Running::start(vec![udp(Arc::new(Temper::new(10))).await]).await;
    let mut stream = tokio::net::TcpStream::connect(server.address).await.expect("connected");
    write_framed(&mut stream, &question("a.example.", RecordType::A).to_vec().expect("a message")).await;
    let reply = Message::from_vec(&read_framed(&mut stream).await).expect("a message");
    assert_eq!(addresses(&reply), ["192.0.2.10"]);
    server.stop().await;
}
