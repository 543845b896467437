//! The server over loopback: framing, size, forwarding, metrics and its end.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Duration;

use dns::{DnsConfig, Feed, Listen, Server, UpstreamServer, Upstreams};
use hickory_proto::op::{Edns, Message, Metadata, Query, ResponseCode};
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use services::{Changes, ServiceTable};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::broadcast;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::zone::table;

pub const PATIENCE: Duration = Duration::from_secs(10);

fn objects(endpoints: usize) -> String {
    let many: Vec<String> =
        (0..endpoints).map(|i| format!(r#"{{"addresses":["10.244.{}.{}"]}}"#, i / 250, i % 250 + 1)).collect();
    [
        r#"{"kind":"Service","metadata":{"name":"web","namespace":"default"},"spec":{"clusterIP":"10.96.0.20","clusterIPs":["10.96.0.20"],"ports":[{"name":"http","port":80}]}}"#.to_owned(),
        r#"{"kind":"Service","metadata":{"name":"many","namespace":"default"},"spec":{"clusterIP":"None","clusterIPs":["None"],"ports":[{"name":"http","port":80}]}}"#.to_owned(),
        format!(
            r#"{{"kind":"EndpointSlice","metadata":{{"name":"many-1","namespace":"default","labels":{{"kubernetes.io/service-name":"many"}}}},"addressType":"IPv4","ports":[{{"name":"http","port":80}}],"endpoints":[{}]}}"#,
            many.join(",")
        ),
    ]
    .join("\n")
}

pub struct Running {
    pub address: SocketAddr,
    metrics: SocketAddr,
    token: CancellationToken,
    task: JoinHandle<()>,
    table: Arc<RwLock<ServiceTable>>,
    sender: broadcast::Sender<Arc<Changes>>,
}

impl Running {
    pub async fn start(upstreams: Vec<SocketAddr>) -> Self {
        Running::start_with(upstreams, |_| {}).await
    }

    pub async fn start_with(upstreams: Vec<SocketAddr>, change: impl FnOnce(&mut DnsConfig)) -> Self {
        let mut table = table(&objects(200));
        table.set_synced();
        let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("loopback");
        let metrics = listener.local_addr().expect("bound");
        let mut config = DnsConfig::new(vec![Listen::Address((Ipv4Addr::LOCALHOST, 0).into())]);
        config.upstreams = Upstreams::Servers(upstreams.into_iter().map(UpstreamServer::from).collect());
        config.metrics = Some(listener);
        change(&mut config);
        let (sender, changes) = broadcast::channel(8);
        let table = Arc::new(RwLock::new(table));
        let server = Server::bind(config, Feed { table: table.clone(), changes }).await.expect("loopback");
        let address = server.addresses()[0];
        let token = CancellationToken::new();
        let task = tokio::spawn(server.run(token.clone()));
        Running { address, metrics, token, task, table, sender }
    }

    /// As whoever feeds the table does it.
    fn change(&self, change: impl FnOnce(&mut ServiceTable) -> Changes) {
        let changes = change(&mut self.table.write().expect("unpoisoned"));
        self.sender.send(Arc::new(changes)).expect("the server listens");
    }

    pub async fn stop(self) {
        self.token.cancel();
        timeout(PATIENCE, self.task).await.expect("the server ends").expect("without a panic");
    }

    async fn send_udp(&self, bytes: &[u8]) -> Option<Vec<u8>> {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("loopback");
        socket.connect(self.address).await.expect("loopback");
        socket.send(bytes).await.expect("sent");
        let mut buffer = vec![0; 65_535];
        let length = timeout(Duration::from_millis(500), socket.recv(&mut buffer)).await.ok()?.ok()?;
        buffer.truncate(length);
        Some(buffer)
    }

    pub async fn udp(&self, message: &Message) -> Message {
        let bytes = self.send_udp(&message.to_vec().expect("a message")).await.expect("an answer");
        Message::from_vec(&bytes).expect("a message")
    }

    /// The same for an answer that takes its time.
    pub async fn udp_patiently(&self, message: &Message) -> Message {
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("loopback");
        socket.connect(self.address).await.expect("loopback");
        socket.send(&message.to_vec().expect("a message")).await.expect("sent");
        let mut buffer = vec![0; 65_535];
        let length = timeout(PATIENCE, socket.recv(&mut buffer)).await.expect("in time").expect("an answer");
        Message::from_vec(&buffer[..length]).expect("a message")
    }

    /// The number behind a metric.
    pub async fn metric(&self, name: &str) -> u64 {
        let text = get(self.metrics, "/metrics").await;
        let line =
            text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{name} is not in\n{text}"));
        line.rsplit(' ').next().and_then(|number| number.parse().ok()).expect("a number")
    }

    /// Why a server with this configuration does not start.
    pub async fn refused(change: impl FnOnce(&mut DnsConfig)) -> String {
        let mut config = DnsConfig::new(vec![Listen::Address((Ipv4Addr::LOCALHOST, 0).into())]);
        config.upstreams = Upstreams::Servers(Vec::new());
        change(&mut config);
        let (_sender, changes) = broadcast::channel(8);
        match Server::bind(config, Feed { table: Arc::default(), changes }).await {
            Ok(_) => panic!("it starts"),
            Err(error) => error.to_string(),
        }
    }

    async fn tcp(&self, message: &Message) -> Message {
        let mut stream = TcpStream::connect(self.address).await.expect("connected");
        write_framed(&mut stream, &message.to_vec().expect("a message")).await;
        Message::from_vec(&read_framed(&mut stream).await).expect("a message")
    }
}

pub async fn write_framed(stream: &mut TcpStream, bytes: &[u8]) {
    let length = u16::try_from(bytes.len()).expect("short");
    stream.write_u16(length).await.expect("sent");
    stream.write_all(bytes).await.expect("sent");
}

pub async fn read_framed(stream: &mut TcpStream) -> Vec<u8> {
    let length = timeout(PATIENCE, stream.read_u16()).await.expect("in time").expect("an answer");
    let mut bytes = vec![0; usize::from(length)];
    timeout(PATIENCE, stream.read_exact(&mut bytes)).await.expect("in time").expect("whole");
    bytes
}

pub fn question(name: &str, record_type: RecordType) -> Message {
    let mut message = Message::query();
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(Name::from_ascii(name).expect("a name"), record_type));
    message
}

#[tokio::test]
async fn the_same_answer_over_udp_and_tcp() {
    let server = Running::start(Vec::new()).await;
    let question = question("Web.default.svc.cluster.local.", RecordType::A);
    for reply in [server.udp(&question).await, server.tcp(&question).await] {
        assert_eq!(reply.metadata.id, question.metadata.id);
        assert!(reply.metadata.authoritative && reply.metadata.recursion_available && reply.metadata.recursion_desired);
        assert_eq!(reply.queries, question.queries);
        assert_eq!(reply.answers[0].data, RData::from(Ipv4Addr::new(10, 96, 0, 20)));
        assert!(reply.answers[0].name.eq_case(&question.queries[0].name), "the case is preserved");
        assert!(reply.edns.is_none(), "a client without EDNS gets none");
    }
    server.stop().await;
}

#[tokio::test]
async fn what_does_not_fit_is_truncated_and_whole_over_tcp() {
    let server = Running::start(Vec::new()).await;
    let plain = question("many.default.svc.cluster.local.", RecordType::A);
    let bytes = server.send_udp(&plain.to_vec().expect("a message")).await.expect("an answer");
    assert!(bytes.len() <= 512, "{}", bytes.len());
    let reply = Message::from_vec(&bytes).expect("a message");
    assert!(reply.metadata.truncation && !reply.answers.is_empty());

    let mut large = plain.clone();
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    large.set_edns(edns);
    let bytes = server.send_udp(&large.to_vec().expect("a message")).await.expect("an answer");
    assert!(bytes.len() > 512 && bytes.len() <= 1232, "{}", bytes.len());
    let reply = Message::from_vec(&bytes).expect("a message");
    assert!(reply.metadata.truncation && reply.edns.is_some());

    let whole = server.tcp(&plain).await;
    assert!(!whole.metadata.truncation);
    assert_eq!(whole.answers.len(), 200);
    server.stop().await;
}

#[tokio::test]
async fn one_connection_carries_many_questions() {
    let server = Running::start(Vec::new()).await;
    let mut stream = TcpStream::connect(server.address).await.expect("connected");
    let questions = [
        question("web.default.svc.cluster.local.", RecordType::A),
        question("nope.default.svc.cluster.local.", RecordType::A),
    ];
    for question in &questions {
        write_framed(&mut stream, &question.to_vec().expect("a message")).await;
    }
    for (question, code) in questions.iter().zip([ResponseCode::NoError, ResponseCode::NXDomain]) {
        let reply = Message::from_vec(&read_framed(&mut stream).await).expect("a message");
        assert_eq!((reply.metadata.id, reply.metadata.response_code), (question.metadata.id, code));
    }
    server.stop().await;
}

#[tokio::test]
async fn what_is_not_a_question_gets_an_error_or_nothing() {
    let server = Running::start(Vec::new()).await;
    let good = question("web.default.svc.cluster.local.", RecordType::A);

    let mut response = good.clone().into_response().to_vec().expect("a message");
    assert!(server.send_udp(&response).await.is_none(), "two servers must not talk to each other for ever");
    response.truncate(2);
    assert!(server.send_udp(&response).await.is_none(), "too short to have an id");

    let mut broken = good.to_vec().expect("a message");
    broken.truncate(20);
    let reply = server.send_udp(&broken).await.expect("an answer");
    let reply = Message::from_vec(&reply).expect("a message");
    assert_eq!((reply.metadata.id, reply.metadata.response_code), (good.metadata.id, ResponseCode::FormErr));

    let mut chaos = good.clone();
    chaos.queries[0].set_query_class(DNSClass::CH);
    assert_eq!(server.udp(&chaos).await.metadata.response_code, ResponseCode::Refused);

    let mut two = good.clone();
    two.add_query(good.queries[0].clone());
    assert_eq!(server.udp(&two).await.metadata.response_code, ResponseCode::FormErr);

    let mut future = good.clone();
    let mut edns = Edns::new();
    edns.set_version(1);
    future.set_edns(edns);
    // 16 is BADVERS here and BADSIG in signed messages; the library reads it as the latter.
    assert_eq!(u16::from(server.udp(&future).await.metadata.response_code), u16::from(ResponseCode::BADVERS));
    server.stop().await;
}

/// An upstream server that knows `*.example.` and says whole answers over TCP only when `truncates`.
async fn upstream(truncates: bool, asked: Arc<AtomicUsize>) -> SocketAddr {
    let udp = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("loopback");
    let address = udp.local_addr().expect("bound");
    let tcp = TcpListener::bind(address).await.expect("loopback");
    let answer = |bytes: &[u8], truncated: bool| {
        let request = Message::from_vec(bytes).expect("a message");
        let mut reply = request.clone().into_response();
        reply.metadata = Metadata::response_from_request(&request.metadata);
        reply.metadata.truncation = truncated;
        if !truncated {
            let owner = request.queries[0].name.clone();
            reply.add_answer(Record::from_rdata(owner, 20, RData::from(Ipv4Addr::new(192, 0, 2, 1))));
        }
        reply.to_vec().expect("a message")
    };
    tokio::spawn(async move {
        let mut buffer = vec![0; 4096];
        loop {
            tokio::select! {
                Ok((length, peer)) = udp.recv_from(&mut buffer) => {
                    asked.fetch_add(1, Ordering::Relaxed);
                    let reply = answer(&buffer[..length], truncates);
                    let mut forged = reply.clone();
                    forged[0] ^= 0xff;
                    udp.send_to(&forged, peer).await.expect("sent");
                    udp.send_to(&reply, peer).await.expect("sent");
                }
                Ok((mut stream, _)) = tcp.accept() => {
                    let bytes = read_framed(&mut stream).await;
                    write_framed(&mut stream, &answer(&bytes, false)).await;
                }
            }
        }
    });
    address
}

#[tokio::test]
async fn other_names_are_asked_upstream_once_and_kept() {
    let asked = Arc::new(AtomicUsize::new(0));
    let dead = SocketAddr::from((Ipv4Addr::LOCALHOST, 9));
    let server = Running::start(vec![dead, upstream(false, asked.clone()).await]).await;
    for name in ["www.example.", "WWW.example."] {
        let reply = server.udp(&question(name, RecordType::A)).await;
        assert_eq!(reply.metadata.response_code, ResponseCode::NoError);
        assert!(!reply.metadata.authoritative);
        assert_eq!(reply.answers[0].data, RData::from(Ipv4Addr::new(192, 0, 2, 1)));
        assert!(reply.answers[0].name.eq_case(&Name::from_ascii(name).expect("a name")));
    }
    assert_eq!(asked.load(Ordering::Relaxed), 1, "the second answer comes from the cache");
    let text = get(server.metrics, "/metrics").await;
    for wanted in [
        r#"coredns_proxy_request_duration_seconds_count{proxy_name="forward",to="127.0.0.1:"#,
        r#"rcode="NOERROR",le="+Inf"} 1"#,
        r#"coredns_proxy_healthcheck_failures_total{proxy_name="forward",to="127.0.0.1:9"} 1"#,
    ] {
        assert!(text.contains(wanted), "{wanted} is not in\n{text}");
    }
    server.stop().await;
}

#[tokio::test]
async fn a_truncated_upstream_answer_is_fetched_over_tcp() {
    let asked = Arc::new(AtomicUsize::new(0));
    let server = Running::start(vec![upstream(true, asked).await]).await;
    let reply = server.tcp(&question("www.example.", RecordType::A)).await;
    assert_eq!(reply.answers[0].data, RData::from(Ipv4Addr::new(192, 0, 2, 1)));
    server.stop().await;
}

#[tokio::test]
async fn without_upstream_servers_other_names_fail_at_once() {
    let server = Running::start(Vec::new()).await;
    let reply = server.udp(&question("example.", RecordType::A)).await;
    assert_eq!(reply.metadata.response_code, ResponseCode::Refused);
    server.stop().await;

    let server = Running::start(vec![SocketAddr::from((Ipv4Addr::LOCALHOST, 9))]).await;
    let reply = server.udp(&question("example.", RecordType::A)).await;
    assert_eq!(reply.metadata.response_code, ResponseCode::ServFail);
    server.stop().await;
}

#[tokio::test]
async fn a_new_name_is_answered_and_an_old_one_is_not() {
    let server = Running::start(Vec::new()).await;
    let new = question("new.default.svc.cluster.local.", RecordType::A);
    let missing = server.udp(&new).await;
    assert_eq!(missing.metadata.response_code, ResponseCode::NXDomain);
    assert_eq!(missing.authorities[0].ttl, 0, "nobody is to remember that it was not there");
    let service = objects(0).lines().next().expect("web").replace("\"web\"", "\"new\"");
    server.change(|table| table.upsert_service(service.as_bytes()).expect("a Service"));
    until(&server, &new, ResponseCode::NoError).await;
    server.change(|table| table.delete_service("default", "new"));
    until(&server, &new, ResponseCode::NXDomain).await;
    server.stop().await;
}

/// The compiler runs beside the answers: asks until it has seen the change, a bounded number of times.
async fn until(server: &Running, question: &Message, code: ResponseCode) {
    for _ in 0..1000 {
        if server.udp(question).await.metadata.response_code == code {
            return;
        }
    }
    panic!("{} is not {code}", question.queries[0].name());
}

async fn get(address: SocketAddr, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.expect("connected");
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: a\r\n\r\n").as_bytes()).await.expect("sent");
    let mut text = String::new();
    timeout(PATIENCE, stream.read_to_string(&mut text)).await.expect("in time").expect("text");
    text
}

#[tokio::test]
async fn prometheus_sees_what_was_answered() {
    let server = Running::start(Vec::new()).await;
    server.udp(&question("web.default.svc.cluster.local.", RecordType::A)).await;
    server.tcp(&question("nope.default.svc.cluster.local.", RecordType::AAAA)).await;
    let text = get(server.metrics, "/metrics").await;
    for wanted in [
        r#"coredns_dns_requests_total{"#,
        r#"proto="udp",family="1",type="A"} 1"#,
        r#"proto="tcp",family="1",type="AAAA"} 1"#,
        r#"rcode="NOERROR",plugin="kubernetes"} 1"#,
        r#"rcode="NXDOMAIN",plugin="kubernetes"} 1"#,
        r#"le="+Inf"} 2"#,
        "coredns_dns_request_duration_seconds_count",
        "coredns_forward_healthcheck_broken_total 0",
    ] {
        assert!(text.contains(wanted), "{wanted} is not in\n{text}");
    }
    assert!(get(server.metrics, "/ready").await.starts_with("HTTP/1.1 200"));
    assert!(get(server.metrics, "/nothing").await.starts_with("HTTP/1.1 404"));
    server.stop().await;
}

#[tokio::test]
async fn open_connections_do_not_keep_the_server() {
    let server = Running::start(Vec::new()).await;
    let mut silent = TcpStream::connect(server.address).await.expect("connected");
    silent.write_all(&[0]).await.expect("sent");
    server.stop().await;
}
