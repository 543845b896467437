//! A proxy on loopback with real back ends, made of the same object lines as the route cases.

use std::collections::HashMap;
use std::convert::Infallible;
use std::future::Future;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use api::object::Key;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use ingress::{CONTROLLER, Certificates, Compiler, Proxy, ProxyConfig, RouteTable, SecretState, Swap, fallback};
use serde_json::json;
use services::ServiceTable;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::routes::object;

pub const PATIENCE: Duration = Duration::from_secs(20);
pub type Body = UnsyncBoxBody<Bytes, Infallible>;

pub struct World {
    pub compiler: Compiler,
    pub table: Arc<RwLock<ServiceTable>>,
    pub routes: Arc<Swap<RouteTable>>,
    pub certificates: Arc<Swap<Certificates>>,
    pub http: SocketAddr,
    pub https: SocketAddr,
    pub metrics: Box<dyn Fn() -> String + Send + Sync>,
    token: CancellationToken,
    running: JoinHandle<()>,
}

impl World {
    /// `lines` are objects as in the route cases.
    pub async fn start(lines: &[&str], change: impl FnOnce(&mut ProxyConfig)) -> World {
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut config = ProxyConfig::new(vec![any], vec![any]);
        config.workers = 2;
        config.drain = Duration::from_millis(500);
        change(&mut config);
        let fallback = fallback().expect("a certificate");
        let (routes, certificates): (Arc<Swap<RouteTable>>, _) =
            (Arc::default(), Arc::new(Swap::new(Certificates::new(fallback.clone()))));
        let proxy = Proxy::bind(config, routes.clone(), certificates.clone(), None).expect("loopback");
        let (http, https) = (proxy.http()[0], proxy.https()[0]);
        let metrics = Box::new(proxy.metrics());
        let token = CancellationToken::new();
        let end = token.clone();
        let running = tokio::spawn(async move { proxy.run(end).await.expect("threads") });
        let table: Arc<RwLock<ServiceTable>> = Arc::default();
        let compiler = Compiler::new(CONTROLLER, table.clone(), fallback);
        let mut world = World { compiler, table, routes, certificates, http, https, metrics, token, running };
        world.apply(&["IngressClass fairlead {controller: fairlead.io/ingress}"]);
        world.apply(lines);
        world
    }

    /// Creates or changes objects.
    pub fn apply(&mut self, lines: &[&str]) {
        for line in lines {
            let object = object(line);
            let name = object["metadata"]["name"].as_str().expect("a name").to_owned();
            let namespace = object["metadata"]["namespace"].as_str().unwrap_or_default().to_owned();
            let bytes = object.to_string();
            let write = || self.table.write().unwrap_or_else(PoisonError::into_inner);
            match line.split(' ').next() {
                Some("Service") => drop(write().upsert_service(bytes.as_bytes()).expect("a Service")),
                Some("EndpointSlice") => drop(write().upsert_slice(bytes.as_bytes()).expect("a slice")),
                Some("Ingress") => self.compiler.set_ingress(serde_json::from_value(object).expect("an Ingress")),
                Some("IngressClass") => self.compiler.set_class(serde_json::from_value(object).expect("a class")),
                kind => panic!("{kind:?} is no kind"),
            }
            self.compiler.service_changed(&namespace, &name);
        }
        self.publish();
    }

    /// A Service `shop/NAME` with port 80 and these endpoints, each in a slice of its own, as their ports differ.
    pub fn serve(&mut self, name: &str, endpoints: &[SocketAddr]) {
        let service = json!({"metadata": {"namespace": "shop", "name": name}, "spec": {"clusterIPs": ["10.96.0.9"], "ports": [{"port": 80}]}});
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        table.upsert_service(service.to_string().as_bytes()).expect("a Service");
        let mut names = Vec::new();
        for endpoint in endpoints {
            let of = format!("{name}-{}", endpoint.port());
            let slice = json!({"metadata": {"namespace": "shop", "name": of, "labels": {"kubernetes.io/service-name": name}},
                "addressType": "IPv4", "ports": [{"name": "", "port": endpoint.port(), "protocol": "TCP"}],
                "endpoints": [{"addresses": [endpoint.ip()], "conditions": {"ready": true}}]});
            table.upsert_slice(slice.to_string().as_bytes()).expect("a slice");
            names.push(of);
        }
        let held: Vec<String> = table.slices("shop", name).map(|slice| slice.name.to_string()).collect();
        for gone in held.iter().filter(|held| !names.contains(held)) {
            table.delete_slice("shop", gone);
        }
        drop(table);
        self.compiler.service_changed("shop", name);
    }

    /// A certificate for these names, as the Secret `shop/NAME`; returns it in DER.
    pub fn secret(&mut self, name: &str, host: &str) -> Vec<u8> {
        let key = rcgen::KeyPair::generate().expect("a key");
        let certificate =
            rcgen::CertificateParams::new(vec![host.to_owned()]).expect("a name").self_signed(&key).expect("signed");
        let data = HashMap::from([
            ("tls.crt".to_owned(), BASE64.encode(certificate.pem())),
            ("tls.key".to_owned(), BASE64.encode(key.serialize_pem())),
        ]);
        self.compiler.wanted_secrets();
        self.compiler.set_secret(&Key::new("shop", name), SecretState::of(Some(&data)));
        self.publish();
        certificate.der().to_vec()
    }

    pub fn publish(&mut self) {
        if let Some(routes) = self.compiler.routes() {
            self.routes.store(Arc::new(routes));
        }
        if let Some(certificates) = self.compiler.certificates() {
            self.certificates.store(Arc::new(certificates));
        }
    }

    /// Runs curl, which asks for `shop.example` here, with the answer's head in its output.
    pub async fn curl(&self, args: &str) -> String {
        let mut command = Command::new("curl");
        command.args(["-sSik", "--max-time", "10"]);
        for (port, address) in [(80, self.http), (443, self.https)] {
            command.arg("--connect-to").arg(format!(":{port}:{}:{}", address.ip(), address.port()));
        }
        let words = args.split(' ').filter(|word| !word.is_empty()).map(|word| word.replace('\u{a0}', " "));
        let output = timeout(PATIENCE, command.args(words).kill_on_drop(true).output()).await.expect("in time");
        let output = output.expect("curl");
        let both = [output.stdout, output.stderr].concat();
        String::from_utf8_lossy(&both).replace('\r', "")
    }

    /// Sends bytes over a connection of their own and returns all that comes back until it is closed.
    pub async fn raw(&self, bytes: &[u8]) -> String {
        let mut stream = TcpStream::connect(self.http).await.expect("loopback");
        stream.write_all(bytes).await.expect("sent");
        let mut answer = Vec::new();
        // What resets the connection has said enough.
        timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("the connection is closed").ok();
        String::from_utf8_lossy(&answer).into_owned()
    }

    pub async fn end(self) {
        self.token.cancel();
        timeout(PATIENCE, self.running).await.expect("in time").expect("no panic");
    }
}

/// An HTTP/1.1 and HTTP/2 server on loopback.
pub struct Backend {
    pub address: SocketAddr,
    /// Heads of the requests that came.
    pub seen: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Backend {
    pub async fn start<F, R>(answer: F) -> Backend
    where
        F: Fn(Request<Incoming>) -> R + Clone + Send + Sync + 'static,
        R: Future<Output = Response<Body>> + Send + 'static,
    {
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("loopback");
        let address = listener.local_addr().expect("bound");
        let seen: Arc<Mutex<Vec<String>>> = Arc::default();
        let memory = seen.clone();
        let task = tokio::spawn(async move {
            let mut connections = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                let (answer, memory) = (answer.clone(), memory.clone());
                connections.spawn(async move {
                    let service = service_fn(move |request: Request<Incoming>| {
                        let head = format!("{} {} {:?}", request.method(), request.uri(), request.headers());
                        memory.lock().expect("unpoisoned").push(head);
                        let answer = answer(request);
                        async move { Ok::<_, Infallible>(answer.await) }
                    });
                    let server = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                    // The proxy may break off, as its clients may.
                    server.serve_connection_with_upgrades(TokioIo::new(stream), service).await.ok();
                });
            }
        });
        Backend { address, seen, task }
    }

    /// One that says its name.
    pub async fn named(name: &'static str) -> Backend {
        Backend::start(move |_| async move { Response::new(text(name)) }).await
    }

    pub fn last(&self) -> String {
        self.seen.lock().expect("unpoisoned").last().cloned().unwrap_or_default()
    }

    pub fn count(&self) -> usize {
        self.seen.lock().expect("unpoisoned").len()
    }
}

pub fn text(text: impl Into<Bytes>) -> Body {
    http_body_util::BodyExt::boxed_unsync(http_body_util::Full::new(text.into()))
}

/// `shop/web` behind every path of shop.example, with these annotations.
pub fn ingress(annotations: &str) -> String {
    format!(
        "Ingress shop/web {{ingressClassName: fairlead, rules: [{{host: shop.example, http: {{paths: [{{path: /, pathType: Prefix, \
         backend: {{service: {{name: web, port: {{number: 80}}}}}}}}]}}}}]}} | {{annotations: {{{annotations}}}}}"
    )
}
