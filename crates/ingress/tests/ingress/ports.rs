//! Ports of Gateways with real clients and real back ends: what comes in, over what, and where it ends up.

use std::collections::HashMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use api::object::Key;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use http::Response;
use http_body_util::BodyExt;
use ingress::gateway::{CONTROLLER, CaState, GatewayCompiler, PortKey, PortTable};
use ingress::{Certificates, OpenPorts, PortOpener, Proxy, ProxyConfig, SecretState, Swap, fallback};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::json;
use services::ServiceTable;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::process::Command;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_util::sync::CancellationToken;

use crate::gateway::gateway_object;
use crate::routes::object;
use crate::world::{Backend, PATIENCE, text};

/// A proxy with the ports of one Gateway, `edge/gw`, on an address of the loopback that nobody else uses.
struct World {
    compiler: GatewayCompiler,
    table: Arc<RwLock<ServiceTable>>,
    tables: HashMap<PortKey, Arc<Swap<PortTable>>>,
    opener: PortOpener,
    metrics: Box<dyn Fn() -> String + Send + Sync>,
    address: IpAddr,
    token: CancellationToken,
    running: JoinHandle<()>,
    /// For what curl reads.
    dir: std::path::PathBuf,
}

/// Of this process and this test alone, so that ports can be what they are.
fn own_address() -> IpAddr {
    static NEXT: AtomicU8 = AtomicU8::new(1);
    let process = std::process::id();
    let [_, _, high, low] = process.to_be_bytes();
    IpAddr::V4(Ipv4Addr::new(127, 64 + (high & 127), low, NEXT.fetch_add(1, Ordering::Relaxed)))
}

impl World {
    async fn start(lines: &[&str]) -> World {
        let address = own_address();
        let any = SocketAddr::new(address, 0);
        let mut config = ProxyConfig::new(vec![any], vec![any]);
        (config.workers, config.drain) = (2, Duration::from_millis(500));
        let certificates = Arc::new(Swap::new(Certificates::new(fallback().expect("a certificate"))));
        let proxy = Proxy::bind(config, Arc::default(), certificates, None).expect("loopback");
        let (opener, token) = (proxy.port_opener(), CancellationToken::new());
        let metrics = Box::new(proxy.metrics());
        let end = token.clone();
        let running = tokio::spawn(async move { proxy.run(end).await.expect("threads") });
        let table: Arc<RwLock<ServiceTable>> = Arc::default();
        let compiler = GatewayCompiler::new(CONTROLLER, table.clone());
        let dir = std::env::temp_dir().join(format!("fairlead-gateway-{address}"));
        std::fs::create_dir_all(&dir).expect("a directory");
        let mut world =
            World { compiler, table, tables: HashMap::new(), opener, metrics, address, token, running, dir };
        world.apply(&["GatewayClass fairlead {controllerName: fairlead.io/gateway-controller}"]);
        world.apply(lines);
        world
    }

    fn apply(&mut self, lines: &[&str]) {
        for line in lines {
            let kind = line.split(' ').next().expect("a kind");
            self.compiler.set(gateway_object(kind, object(line)).expect("a kind of Gateway API"));
        }
        self.publish();
    }

    fn publish(&mut self) {
        let Some(outcome) = self.compiler.compile() else { return };
        self.tables.retain(|key, _| outcome.ports.contains_key(key));
        for (key, table) in outcome.ports {
            match self.tables.get(&key) {
                Some(held) => held.store(table),
                None => drop(self.tables.insert(key, Arc::new(Swap::from(table)))),
            }
        }
        // Each on its own number; the real ones would need root.
        let at = |key: &PortKey| (SocketAddr::new(self.address, 20_000 + key.port), key.transport);
        let open: OpenPorts = self.tables.iter().map(|(key, table)| (at(key), table.clone())).collect();
        self.opener.open(open);
    }

    /// A Service `edge/NAME` with port 80, TCP and UDP, and this endpoint.
    fn serve(&mut self, name: &str, endpoint: SocketAddr) {
        let service = json!({"metadata": {"namespace": "edge", "name": name}, "spec": {"clusterIPs": ["10.96.0.9"],
            "ports": [{"name": "tcp", "port": 80}, {"name": "udp", "port": 80, "protocol": "UDP"}]}});
        let slice = json!({"metadata": {"namespace": "edge", "name": name, "labels": {"kubernetes.io/service-name": name}},
            "addressType": "IPv4", "ports": [{"name": "tcp", "port": endpoint.port(), "protocol": "TCP"},
                {"name": "udp", "port": endpoint.port(), "protocol": "UDP"}],
            "endpoints": [{"addresses": [endpoint.ip()], "conditions": {"ready": true}}]});
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.upsert_service(service.to_string().as_bytes()).expect("a Service");
        table.upsert_slice(slice.to_string().as_bytes()).expect("a slice");
        drop(table);
        self.compiler.service_changed("edge", name);
        self.publish();
    }

    fn secret(&mut self, name: &str, certificate: &Certified) {
        let data = HashMap::from([
            ("tls.crt".to_owned(), BASE64.encode(&certificate.pem)),
            ("tls.key".to_owned(), BASE64.encode(certificate.key.serialize_pem())),
        ]);
        self.compiler.set_secret(&Key::new("edge", name), SecretState::of(Some(&data)));
        self.publish();
    }

    fn authority(&mut self, name: &str, pem: &str) {
        let data = HashMap::from([("ca.crt".to_owned(), pem.to_owned())]);
        self.compiler.set_authority(&Key::new("edge", name), CaState::of(Some(&data)));
        self.publish();
    }

    fn at(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.address, 20_000 + port)
    }

    /// A connection to a port, which may be about to be opened.
    async fn connect(&self, port: u16) -> TcpStream {
        timeout(PATIENCE, async {
            loop {
                match TcpStream::connect(self.at(port)).await {
                    Ok(stream) => return stream,
                    Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
                }
            }
        })
        .await
        .expect("the port is opened")
    }

    /// Runs curl: the ports 80, 443 and 8443 of every host are those of the Gateway.
    async fn curl(&self, args: &str) -> String {
        let mut command = Command::new("curl");
        command.args(["-sSi", "--max-time", "10"]);
        command.current_dir(&self.dir);
        for key in self.tables.keys() {
            drop(self.connect(key.port).await);
        }
        for port in [80, 443, 8443] {
            command.arg("--connect-to").arg(format!(":{port}:{}", self.at(port)));
        }
        let words = args.split(' ').filter(|word| !word.is_empty()).map(|word| word.replace('\u{a0}', " "));
        let output = timeout(PATIENCE, command.args(words).kill_on_drop(true).output()).await.expect("in time");
        let output = output.expect("curl");
        let both = [output.stdout, output.stderr].concat();
        String::from_utf8_lossy(&both).replace('\r', "")
    }

    async fn end(self) {
        self.token.cancel();
        timeout(PATIENCE, self.running).await.expect("in time").expect("no panic");
        std::fs::remove_dir_all(&self.dir).expect("removed");
    }
}

/// A certificate with its key.
pub struct Certified {
    pub pem: String,
    pub der: CertificateDer<'static>,
    pub key: KeyPair,
}

/// An authority and what it signs.
pub struct Authority {
    pub pem: String,
    pub issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    pub fn new() -> Authority {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // Another name than those that it signs, or they would look self-signed.
        params.distinguished_name.push(rcgen::DnType::CommonName, "authority");
        let certificate = params.self_signed(&key).expect("signed");
        Authority { pem: certificate.pem(), issuer: Issuer::new(params, key) }
    }

    pub fn sign(&self, names: &[&str]) -> Certified {
        let key = KeyPair::generate().expect("a key");
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let params = CertificateParams::new(names).expect("names");
        let certificate = params.signed_by(&key, &self.issuer).expect("signed");
        Certified { pem: certificate.pem(), der: certificate.der().clone(), key }
    }
}

/// A server that says over TLS who it is, and `upper` what it is told, once.
pub async fn tls_echo(certificate: &Certified) -> (SocketAddr, JoinHandle<()>) {
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let key = PrivateKeyDer::try_from(certificate.key.serialize_der()).expect("a key");
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der.clone()], key)
        .expect("a certificate");
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("loopback");
    let address = listener.local_addr().expect("bound");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // The proxy may not take us for whom it wants.
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let mut bytes = vec![0; 4096];
            let Ok(_) = stream.read(&mut bytes).await else { continue };
            let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\nconnection: close\r\n\r\nsecret";
            stream.write_all(answer).await.ok();
            stream.shutdown().await.ok();
        }
    });
    (address, task)
}

const HTTP: &str = "Gateway edge/gw {gatewayClassName: fairlead, listeners: [{name: web, port: 80, protocol: HTTP}]}";

fn route(rules: &str) -> String {
    format!("HTTPRoute edge/r {{parentRefs: [{{name: gw}}], rules: [{rules}]}}")
}

#[tokio::test]
async fn a_gateway_port_opens_carries_requests_and_closes() {
    let (one, two) = (Backend::named("one").await, Backend::named("two").await);
    let mut world = World::start(&[HTTP, &route("{backendRefs: [{name: one, port: 80}]}")]).await;
    world.serve("one", one.address);
    world.serve("two", two.address);
    let seen = world.curl("http://shop.example/a").await;
    assert!(seen.contains(" 200 ") && seen.ends_with("one"), "{seen}");
    assert!(one.last().contains("\"x-forwarded-port\": \"80\""), "{}", one.last());
    let told = "fairlead_ingress_requests_total{namespace=\"edge\",kind=\"HTTPRoute\",route=\"r\",host=\"\",path=\"/\",status=\"2xx\"} 1\n";
    assert!((world.metrics)().contains(told), "{}", (world.metrics)());
    // A change of a route needs no new connection.
    let mut stream = world.connect(80).await;
    let ask = b"GET / HTTP/1.1\r\nhost: shop.example\r\n\r\n";
    let mut answer = vec![0; 4096];
    stream.write_all(ask).await.expect("sent");
    let count = stream.read(&mut answer).await.expect("an answer");
    assert!(answer[..count].ends_with(b"one"));
    world.apply(&[&route("{backendRefs: [{name: two, port: 80}]}")]);
    stream.write_all(ask).await.expect("sent");
    let count = stream.read(&mut answer).await.expect("an answer");
    assert!(answer[..count].ends_with(b"two"));
    // Without its listener the port is closed.
    world.apply(&[&HTTP.replace("port: 80", "port: 81")]);
    timeout(PATIENCE, async {
        while TcpStream::connect(world.at(80)).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("the port is closed");
    world.end().await;
}

#[tokio::test]
async fn redirects_name_the_port_that_clients_know() {
    let rules = "{matches: [{path: {value: /host}}], filters: [{type: RequestRedirect, requestRedirect: {hostname: b.example}}]}, \
        {matches: [{path: {value: /tls}}], filters: [{type: RequestRedirect, requestRedirect: {scheme: https, statusCode: 301}}]}, \
        {matches: [{path: {value: /port}}], filters: [{type: RequestRedirect, requestRedirect: {port: 8083}}]}, \
        {matches: [{path: {value: /old}}], filters: [{type: RequestRedirect, requestRedirect: {path: {type: ReplacePrefixMatch, replacePrefixMatch: /new}}}]}";
    let gateway = "Gateway edge/gw {gatewayClassName: fairlead, listeners: [{name: web, port: 80, protocol: HTTP}, {name: alt, port: 8443, protocol: HTTP}]}";
    let world = World::start(&[gateway, &route(rules)]).await;
    for (url, status, location) in [
        ("http://a.example/host/x?q=1", "302", "http://b.example/host/x?q=1"),
        ("http://a.example/tls", "301", "https://a.example/tls"),
        ("http://a.example/port", "302", "http://a.example:8083/port"),
        ("http://a.example/old/x", "302", "http://a.example/new/x"),
        ("http://a.example:8443/host", "302", "http://b.example:8443/host"),
    ] {
        let seen = world.curl(url).await;
        assert!(
            seen.contains(&format!(" {status} ")) && seen.contains(&format!("location: {location}\n")),
            "{url}: {seen}"
        );
    }
    world.end().await;
}

const TLS: &str = "Gateway edge/gw {gatewayClassName: fairlead, listeners: [\
    {name: a, port: 443, protocol: HTTPS, hostname: a.example, tls: {certificateRefs: [{name: cert}]}}, \
    {name: b, port: 443, protocol: HTTPS, hostname: b.example, tls: {certificateRefs: [{name: cert}]}}]}";

#[tokio::test]
async fn a_connection_for_one_listener_is_not_for_another() {
    let backend = Backend::named("hello").await;
    let authority = Authority::new();
    let mut world = World::start(&[TLS, &route("{backendRefs: [{name: web, port: 80}]}")]).await;
    world.serve("web", backend.address);
    world.secret("cert", &authority.sign(&["a.example", "b.example"]));
    std::fs::write(world.dir.join("ca"), &authority.pem).expect("written");
    for version in ["--http1.1", "--http2"] {
        let seen = world.curl(&format!("{version} --cacert ca https://a.example/")).await;
        assert!(seen.contains(" 200") && seen.ends_with("hello"), "{seen}");
        let seen = world.curl(&format!("{version} --cacert ca -H Host:\u{a0}b.example https://a.example/")).await;
        assert!(seen.contains(" 421"), "{seen}");
        let seen = world.curl(&format!("{version} --cacert ca -H Host:\u{a0}c.example https://a.example/")).await;
        assert!(seen.contains(" 404"), "{seen}");
    }
    // No listener is for this name: there is no certificate to show either.
    let seen = world.curl("-k https://c.example/").await;
    assert!(seen.contains("curl: ("), "{seen}");
    world.end().await;
}

#[tokio::test]
async fn clients_show_who_they_are_where_the_gateway_asks() {
    let backend = Backend::named("hello").await;
    let (authority, stranger) = (Authority::new(), Authority::new());
    let gateway = "Gateway edge/gw {gatewayClassName: fairlead, tls: {frontend: {default: {validation: {caCertificateRefs: [{group: '', kind: ConfigMap, name: ca}]}}, \
        perPort: [{port: 8443, tls: {validation: {mode: AllowInsecureFallback, caCertificateRefs: [{group: '', kind: ConfigMap, name: ca}]}}}]}}, listeners: [\
        {name: strict, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: cert}]}}, {name: lax, port: 8443, protocol: HTTPS, tls: {certificateRefs: [{name: cert}]}}]}";
    let mut world = World::start(&[gateway, &route("{backendRefs: [{name: web, port: 80}]}")]).await;
    world.serve("web", backend.address);
    world.secret("cert", &authority.sign(&["a.example"]));
    world.authority("ca", &authority.pem);
    for (name, signed) in [("good", authority.sign(&["client"])), ("bad", stranger.sign(&["client"]))] {
        std::fs::write(world.dir.join(name), format!("{}{}", signed.pem, signed.key.serialize_pem())).expect("written");
    }
    for (args, works) in [
        ("--cert good https://a.example/", true),
        ("--cert bad https://a.example/", false),
        ("https://a.example/", false),
        ("--cert good https://a.example:8443/", true),
        ("--cert bad https://a.example:8443/", true),
        ("https://a.example:8443/", true),
    ] {
        let seen = world.curl(&format!("-k {args}")).await;
        assert_eq!(seen.ends_with("hello"), works, "{args}: {seen}");
    }
    world.end().await;
}

#[tokio::test]
async fn tls_is_passed_through_or_taken_off_by_its_name() {
    let authority = Authority::new();
    let (inner, _task) = tls_echo(&authority.sign(&["pass.example"])).await;
    let plain = Backend::named("plain").await;
    let gateway = "Gateway edge/gw {gatewayClassName: fairlead, listeners: [\
        {name: pass, port: 443, protocol: TLS, hostname: pass.example, tls: {mode: Passthrough}}, \
        {name: end, port: 443, protocol: TLS, hostname: end.example, tls: {certificateRefs: [{name: cert}]}}]}";
    let mut world = World::start(&[
        gateway,
        "TLSRoute edge/pass {parentRefs: [{name: gw, sectionName: pass}], hostnames: [pass.example], rules: [{backendRefs: [{name: inner, port: 80}]}]}",
        "TLSRoute edge/end {parentRefs: [{name: gw, sectionName: end}], hostnames: [end.example], rules: [{backendRefs: [{name: plain, port: 80}]}]}",
    ])
    .await;
    world.serve("inner", inner);
    world.serve("plain", plain.address);
    world.secret("cert", &authority.sign(&["end.example"]));
    std::fs::write(world.dir.join("ca"), &authority.pem).expect("written");
    let seen = world.curl("--cacert ca https://pass.example/").await;
    assert!(seen.ends_with("secret"), "{seen}");
    let seen = world.curl("--cacert ca https://end.example/").await;
    assert!(seen.ends_with("plain"), "{seen}");
    assert!(!plain.last().contains("x-forwarded-for"), "nobody looks into it: {}", plain.last());
    world.end().await;
}

#[tokio::test]
async fn connections_and_datagrams_reach_an_endpoint() {
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("loopback");
    let tcp = listener.local_addr().expect("bound");
    let server = tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let mut bytes = Vec::new();
            if stream.read_to_end(&mut bytes).await.is_ok() {
                stream.write_all(&bytes).await.ok();
            }
        }
    });
    let socket = UdpSocket::bind(("127.0.0.1", 0)).await.expect("loopback");
    let udp = socket.local_addr().expect("bound");
    let datagrams = tokio::spawn(async move {
        let mut bytes = [0; 2048];
        while let Ok((count, from)) = socket.recv_from(&mut bytes).await {
            bytes[..count].make_ascii_uppercase();
            socket.send_to(&bytes[..count], from).await.ok();
        }
    });
    let mut world = World::start(&[
        "Gateway edge/gw {gatewayClassName: fairlead, listeners: [{name: tcp, port: 53, protocol: TCP}, {name: udp, port: 53, protocol: UDP}]}",
        "TCPRoute edge/t {parentRefs: [{name: gw}], rules: [{backendRefs: [{name: tcp, port: 80}]}]}",
        "UDPRoute edge/u {parentRefs: [{name: gw}], rules: [{backendRefs: [{name: udp, port: 80}]}]}",
    ])
    .await;
    world.serve("tcp", tcp);
    world.serve("udp", udp);
    let mut stream = world.connect(53).await;
    stream.write_all(&vec![b'x'; 3_000_000]).await.expect("sent");
    stream.shutdown().await.expect("ended");
    let mut back = Vec::new();
    timeout(PATIENCE, stream.read_to_end(&mut back)).await.expect("in time").expect("answered");
    assert_eq!(back.len(), 3_000_000, "one end at a time");
    let client = UdpSocket::bind((world.address, 0)).await.expect("loopback");
    client.connect(world.at(53)).await.expect("an address");
    let mut answer = [0; 2048];
    // The port may be about to be opened: what is sent before is refused or lost.
    let count = timeout(PATIENCE, async {
        loop {
            client.send(b"hello").await.ok();
            if let Ok(Ok(count)) = timeout(Duration::from_millis(200), client.recv(&mut answer)).await {
                return count;
            }
        }
    })
    .await
    .expect("an answer");
    assert_eq!(&answer[..count], b"HELLO");
    // A connection is counted when both of its ends are over, which the client does not wait for.
    let told = |route: &str, name: &str| {
        let metrics = (world.metrics)();
        let (name, route) = (format!("fairlead_ingress_stream_{name}_bytes_total"), format!("route=\"{route}\""));
        let line = metrics.lines().find(|line| line.starts_with(&name) && line.contains(&route));
        line.and_then(|line| line.rsplit(' ').next()?.parse::<u64>().ok()).is_some_and(|count| count > 0)
    };
    let counted = timeout(PATIENCE, async {
        while !(told("t", "received") && told("u", "sent")) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    counted.await.expect("the bytes are counted");
    server.abort();
    datagrams.abort();
    world.end().await;
}

#[tokio::test]
async fn mirrors_get_a_copy_with_its_body_and_nobody_waits_for_them() {
    let backend = Backend::start(|request| async move {
        let body = request.into_body().collect().await.map(|body| body.to_bytes()).unwrap_or_default();
        Response::new(text(body))
    })
    .await;
    let (sender, mut copies) = tokio::sync::mpsc::unbounded_channel();
    let mirror = Backend::start(move |request| {
        let sender = sender.clone();
        async move {
            let path = request.uri().path().to_owned();
            let body = request.into_body().collect().await.map(|body| body.to_bytes().len()).unwrap_or_default();
            sender.send((path, body)).ok();
            // Nobody waits for this.
            std::future::pending::<()>().await;
            Response::new(text(""))
        }
    })
    .await;
    let rules = "{filters: [{type: RequestMirror, requestMirror: {backendRef: {name: mirror, port: 80}}}], backendRefs: [{name: web, port: 80}]}";
    let mut world = World::start(&[HTTP, &route(rules)]).await;
    world.serve("web", backend.address);
    world.serve("mirror", mirror.address);
    assert!(world.curl("http://a.example/get").await.contains(" 200 "));
    let body = "x".repeat(100_000);
    std::fs::write(world.dir.join("body"), &body).expect("written");
    let seen = world.curl("-H Expect: --data-binary @body http://a.example/post").await;
    assert!(seen.ends_with(&body), "the request itself is whole");
    let mut seen = Vec::new();
    for _ in 0..2 {
        seen.push(timeout(PATIENCE, copies.recv()).await.expect("in time").expect("a copy"));
    }
    seen.sort();
    assert_eq!(seen, [("/get".to_owned(), 0), ("/post".to_owned(), 100_000)]);
    world.end().await;
}

#[tokio::test]
async fn endpoints_over_tls_are_who_the_policy_says_or_nobody() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (good, _a) = tls_echo(&authority.sign(&["web.internal", "other.internal"])).await;
    let (forged, _b) = tls_echo(&stranger.sign(&["web.internal"])).await;
    let policy = |name: &str, more: &str| {
        format!(
            "BackendTLSPolicy edge/{name} {{targetRefs: [{{group: '', kind: Service, name: {name}}}], validation: {{caCertificateRefs: [{{group: '', kind: ConfigMap, name: ca}}], {more}}}}}"
        )
    };
    let rules: Vec<String> = ["good", "forged", "misnamed", "alternative", "no-alternative"]
        .iter()
        .map(|name| format!("{{matches: [{{path: {{value: /{name}}}}}], backendRefs: [{{name: {name}, port: 80}}]}}"))
        .collect();
    let mut world = World::start(&[HTTP, &route(&rules.join(", "))]).await;
    for (name, endpoint) in
        [("good", good), ("forged", forged), ("misnamed", good), ("alternative", good), ("no-alternative", good)]
    {
        world.serve(name, endpoint);
    }
    world.apply(&[
        &policy("good", "hostname: web.internal"),
        &policy("forged", "hostname: web.internal"),
        &policy("misnamed", "hostname: nobody.internal"),
        &policy("alternative", "hostname: sni.internal, subjectAltNames: [{type: Hostname, hostname: other.internal}]"),
        &policy("no-alternative", "hostname: web.internal, subjectAltNames: [{type: URI, uri: 'spiffe://x/y'}]"),
    ]);
    world.authority("ca", &authority.pem);
    for (path, works) in
        [("good", true), ("forged", false), ("misnamed", false), ("alternative", true), ("no-alternative", false)]
    {
        let seen = world.curl(&format!("http://a.example/{path}")).await;
        assert_eq!(seen.ends_with("secret"), works, "{path}: {seen}");
        assert!(works || seen.contains(" 502 "), "{path}: {seen}");
    }
    world.end().await;
}

#[tokio::test]
async fn a_request_has_so_long_and_no_longer() {
    let slow = Backend::start(|_| async {
        std::future::pending::<()>().await;
        Response::new(text(""))
    })
    .await;
    let rules = "{matches: [{path: {value: /all}}], timeouts: {request: 100ms}, backendRefs: [{name: slow, port: 80}]}, \
        {matches: [{path: {value: /one}}], timeouts: {backendRequest: 100ms}, backendRefs: [{name: slow, port: 80}]}";
    let mut world = World::start(&[HTTP, &route(rules)]).await;
    world.serve("slow", slow.address);
    for path in ["all", "one"] {
        let seen = world.curl(&format!("http://a.example/{path}")).await;
        assert!(seen.contains(" 504 "), "{seen}");
    }
    world.end().await;
}

#[tokio::test]
async fn origins_are_told_what_gateway_api_wants() {
    let backend = Backend::named("hello").await;
    let rules = "{matches: [{path: {value: /some}}], filters: [{type: CORS, cors: {allowOrigins: ['https://a.example', 'https://*.b.example'], allowMethods: [GET, PUT], allowHeaders: [x-one], exposeHeaders: [x-two], allowCredentials: true, maxAge: 60}}], backendRefs: [{name: web, port: 80}]}, \
        {matches: [{path: {value: /any}}], filters: [{type: CORS, cors: {allowOrigins: ['*'], allowMethods: ['*'], allowHeaders: ['*'], allowCredentials: true}}], backendRefs: [{name: web, port: 80}]}";
    let mut world = World::start(&[HTTP, &route(rules)]).await;
    world.serve("web", backend.address);
    let preflight =
        "-X OPTIONS -H Access-Control-Request-Method:\u{a0}PATCH -H Access-Control-Request-Headers:\u{a0}x-asked";
    let seen = world.curl(&format!("{preflight} -H Origin:\u{a0}https://a.example http://x.example/some")).await;
    for part in [
        "access-control-allow-origin: https://a.example\n",
        "access-control-allow-methods: GET, PUT\n",
        "access-control-allow-headers: x-one\n",
        "access-control-allow-credentials: true\n",
        "access-control-max-age: 60\n",
    ] {
        assert!(seen.contains(part), "{part}: {seen}");
    }
    // Whoever asks with credentials takes no star: it is told what it asked for.
    let seen = world.curl(&format!("{preflight} -H Origin:\u{a0}https://z.example http://x.example/any")).await;
    for part in [
        "access-control-allow-origin: https://z.example\n",
        "access-control-allow-methods: PATCH\n",
        "access-control-allow-headers: x-asked\n",
    ] {
        assert!(seen.contains(part), "{part}: {seen}");
    }
    let seen = world.curl("-H Origin:\u{a0}https://x.b.example http://x.example/some").await;
    assert!(
        seen.contains("access-control-allow-origin: https://x.b.example\n")
            && seen.contains("access-control-expose-headers: x-two\n"),
        "{seen}"
    );
    let seen = world.curl("-H Origin:\u{a0}https://evil.example http://x.example/some").await;
    assert!(!seen.contains("access-control"), "{seen}");
    world.end().await;
}

#[tokio::test]
async fn who_we_are_is_shown_to_endpoints_that_ask() {
    let authority = Authority::new();
    let provider = Arc::new(tokio_rustls::rustls::crypto::ring::default_provider());
    let mut roots = tokio_rustls::rustls::RootCertStore::empty();
    use rustls_pki_types::pem::PemObject;
    roots.add(CertificateDer::from_pem_slice(authority.pem.as_bytes()).expect("PEM")).expect("a root");
    let verifier =
        tokio_rustls::rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone())
            .build()
            .expect("a verifier");
    let own = authority.sign(&["web.internal"]);
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_client_cert_verifier(verifier)
        .with_single_cert(vec![own.der.clone()], PrivateKeyDer::try_from(own.key.serialize_der()).expect("a key"))
        .expect("a certificate");
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("loopback");
    let address = listener.local_addr().expect("bound");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let server = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let mut bytes = vec![0; 4096];
            let Ok(_) = stream.read(&mut bytes).await else { continue };
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nknown").await.ok();
            stream.shutdown().await.ok();
        }
    });
    let policy = "BackendTLSPolicy edge/web {targetRefs: [{group: '', kind: Service, name: web}], validation: {hostname: web.internal, caCertificateRefs: [{group: '', kind: ConfigMap, name: ca}]}}";
    let mut world = World::start(&[HTTP, policy, &route("{backendRefs: [{name: web, port: 80}]}")]).await;
    world.serve("web", address);
    world.authority("ca", &authority.pem);
    let seen = world.curl("http://a.example/").await;
    assert!(seen.contains(" 502 "), "{seen}");
    world.apply(&[&HTTP.replace("listeners:", "tls: {backend: {clientCertificateRef: {name: me}}}, listeners:")]);
    world.secret("me", &authority.sign(&["gateway"]));
    let seen = world.curl("http://a.example/").await;
    assert!(seen.ends_with("known"), "{seen}");
    server.abort();
    world.end().await;
}

/// Redirects and answers' headers, where a rule has them for one of its backends.
#[tokio::test]
async fn filters_of_one_backend_are_for_its_requests_only() {
    let (web, other) = (Backend::named("web").await, Backend::named("other").await);
    let marked = "{name: web, port: 80, filters: [{type: ResponseHeaderModifier, responseHeaderModifier: {set: [{name: x-of, value: web}]}}]}";
    let sent_away =
        "{name: other, port: 80, filters: [{type: RequestRedirect, requestRedirect: {hostname: b.example}}]}";
    let mut world = World::start(&[HTTP, &route(&format!("{{backendRefs: [{marked}, {sent_away}]}}"))]).await;
    world.serve("web", web.address);
    world.serve("other", other.address);
    let (mut answered, mut redirected) = (0, 0);
    while (answered == 0 || redirected == 0) && answered + redirected < 200 {
        let seen = world.curl("http://a.example/x?y").await;
        if seen.ends_with("web") {
            assert!(seen.contains("x-of: web"), "{seen}");
            answered += 1;
        } else {
            assert!(seen.contains(" 302 ") && seen.contains("location: http://b.example/x?y"), "{seen}");
            assert!(!seen.contains("x-of"), "{seen}");
            redirected += 1;
        }
    }
    assert!(answered > 0 && redirected > 0, "{answered} {redirected}");
    assert_eq!((web.count(), other.count()), (answered, 0));
    world.end().await;
}

/// By annotation: over TLS, and with no question who it is.
#[tokio::test]
async fn an_ingress_speaks_to_endpoints_over_tls() {
    let (endpoint, _task) = tls_echo(&Authority::new().sign(&["anybody"])).await;
    let annotated = crate::world::ingress("nginx.ingress.kubernetes.io/backend-protocol: HTTPS");
    let mut world = crate::world::World::start(&[&annotated], |_| {}).await;
    world.serve("web", &[endpoint]);
    let seen = world.curl("http://shop.example/").await;
    assert!(seen.ends_with("secret"), "{seen}");
    // To who speaks no TLS nothing is said in the clear.
    let plain = Backend::named("plain").await;
    world.serve("web", &[plain.address]);
    let seen = world.curl("http://shop.example/").await;
    assert!(seen.contains(" 502 ") && plain.count() == 0, "{seen}");
    world.end().await;
}

/// By the PROXY protocol, of which curl speaks version 1.
#[tokio::test]
async fn clients_behind_a_load_balancer_are_who_it_says() {
    let backend = Backend::named("hello").await;
    let denied = crate::world::ingress("nginx.ingress.kubernetes.io/denylist-source-range: 203.0.113.66/32");
    let range = "127.0.0.0/8".parse().expect("a range");
    let mut world = crate::world::World::start(&[&denied], |config| config.announcers = vec![range]).await;
    world.serve("web", &[backend.address]);
    for (scheme, flags) in
        [("http", "--haproxy-protocol"), ("https", "--haproxy-protocol"), ("https", "--haproxy-protocol --http2")]
    {
        let seen = world.curl(&format!("{flags} {scheme}://shop.example/")).await;
        assert!(seen.ends_with("hello"), "{seen}");
    }
    let line = |client: &str| {
        format!(
            "PROXY TCP4 {client} 192.0.2.1 5 80\r\nGET / HTTP/1.1\r\nHost: shop.example\r\nConnection: close\r\n\r\n"
        )
    };
    assert!(world.raw(line("203.0.113.7").as_bytes()).await.starts_with("HTTP/1.1 200"));
    assert!(backend.last().contains("\"x-forwarded-for\": \"203.0.113.7\""), "{}", backend.last());
    // What is decided by address is decided by the client's.
    assert!(world.raw(line("203.0.113.66").as_bytes()).await.starts_with("HTTP/1.1 403"));
    // Who says nothing is not served.
    assert_eq!(world.raw(b"GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n").await, "");
    world.end().await;
}
