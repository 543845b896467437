//! What probes, scrapers and load balancers get, over real sockets in a namespace of their own.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use linux::netns::Netns;
use proxy::{Feed, Health, HealthChecks, Metrics, NodeView, Status};
use services::{Changes, Place, ServiceTable};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

use crate::net::Namespace;

const PATIENCE: Duration = Duration::from_secs(10);
const NODE: &str = "192.168.49.2";
const NODE6: &str = "fd00:c0a8:31::2";

/// One request; `None` where nobody listens, or not any more.
fn get(namespace: &Namespace, address: &str, path: &str) -> Option<String> {
    let address: SocketAddr = address.parse().expect("an address");
    let request = format!("GET {path} HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n");
    namespace.run(move || {
        let mut stream = TcpStream::connect(address).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).expect("a timeout");
        stream.write_all(request.as_bytes()).ok()?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).ok()?;
        Some(answer)
    })
}

/// Asks until the answer is as wanted: ports are opened by a task of their own.
fn until(what: &str, mut ask: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !ask() {
        assert!(begun.elapsed() < PATIENCE, "{what}");
        std::thread::yield_now();
    }
}

fn service(name: &str, port: u16) -> String {
    format!(
        r#"{{"metadata":{{"namespace":"shop","name":"{name}"}},"spec":{{"type":"LoadBalancer","clusterIP":"10.96.0.9",
        "externalTrafficPolicy":"Local","healthCheckNodePort":{port},
        "ports":[{{"name":"a","port":80,"nodePort":30080}},{{"name":"b","port":81,"nodePort":30081}}]}}}}"#
    )
}

/// Endpoints as (address, node, condition).
fn slice(endpoints: &[(&str, &str, &str)]) -> String {
    let endpoints: Vec<String> = endpoints
        .iter()
        .map(|(address, node, conditions)| {
            format!(r#"{{"addresses":["{address}"],"nodeName":"{node}","conditions":{{{conditions}}}}}"#)
        })
        .collect();
    format!(
        r#"{{"metadata":{{"namespace":"shop","name":"web-1","labels":{{"kubernetes.io/service-name":"web"}}}},
        "addressType":"IPv4","ports":[{{"name":"a","port":8080}},{{"name":"b","port":8081}}],"endpoints":[{}]}}"#,
        endpoints.join(",")
    )
}

struct Node {
    namespace: Namespace,
    table: Arc<RwLock<ServiceTable>>,
    changes: broadcast::Sender<Arc<Changes>>,
    view: watch::Sender<Arc<NodeView>>,
    status: watch::Sender<Status>,
    token: CancellationToken,
    runtime: tokio::runtime::Runtime,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Node {
    fn start() -> Self {
        let namespace = Namespace::new();
        namespace.ip(&format!("address add {NODE}/32 dev lo"));
        namespace.ip(&format!("address add {NODE6}/128 dev lo nodad"));
        let held = Netns::open(Path::new(&namespace.path)).expect("a namespace");
        let table = Arc::new(RwLock::new(ServiceTable::new()));
        let (changes, receiver) = broadcast::channel(64);
        let addresses = [NODE, NODE6].map(|address| address.parse().expect("an address")).to_vec();
        let place = Place { node: "node-1".into(), zone: None };
        let (view, view_seen) = watch::channel(Arc::new(NodeView { place, addresses, ..NodeView::default() }));
        let (status, status_seen) = watch::channel(Status::default());
        let token = CancellationToken::new();
        let health = Arc::new(Health::new(Duration::from_secs(30)));
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("tokio");
        let checks = HealthChecks {
            namespace: Some(held),
            node: view_seen,
            feed: Feed { table: table.clone(), changes: receiver },
            health: health.clone(),
            events: None,
        };
        let follow = {
            let token = token.clone();
            async move { health.follow(status_seen, token).await }
        };
        let tasks = vec![runtime.spawn(proxy::serve_health_checks(checks, token.clone())), runtime.spawn(follow)];
        Node { namespace, table, changes, view, status, token, runtime, tasks }
    }

    fn change(&self, change: impl FnOnce(&mut ServiceTable) -> Changes) {
        let changes = change(&mut self.table.write().expect("table"));
        self.changes.send(Arc::new(changes)).expect("somebody listens");
    }

    fn ask(&self, address: &str) -> Option<String> {
        get(&self.namespace, address, "/")
    }

    fn stop(self) {
        self.token.cancel();
        for task in self.tasks {
            self.runtime.block_on(task).expect("joined");
        }
    }
}

#[test]
fn load_balancers_learn_which_node_has_an_endpoint_of_its_own() {
    let node = Node::start();
    let (v4, v6) = (format!("{NODE}:32000"), format!("[{NODE6}]:32000"));
    assert_eq!(node.ask(&v4), None);
    node.change(|table| table.upsert_service(service("web", 32000).as_bytes()).expect("a Service"));
    until("the port opens", || node.ask(&v4).is_some() && node.ask(&v6).is_some());
    let answer = node.ask(&v4).expect("an answer");
    assert!(answer.starts_with("HTTP/1.1 503"), "no endpoint yet: {answer}");

    // Two on this node, of which each serves two ports; one elsewhere; one here that terminates and still serves.
    let all = [
        ("10.244.0.5", "node-1", ""),
        ("10.244.0.6", "node-1", ""),
        ("10.244.1.5", "node-2", ""),
        ("10.244.0.7", "node-1", r#""ready":false,"serving":true,"terminating":true"#),
    ];
    node.change(|table| table.upsert_slice(slice(&all).as_bytes()).expect("a slice"));
    until("they are counted", || node.ask(&v4).expect("an answer").contains("\"localEndpoints\":2"));
    let unhealthy = node.ask(&v4).expect("an answer");
    assert!(unhealthy.starts_with("HTTP/1.1 503"), "the proxy has not committed yet: {unhealthy}");
    assert!(unhealthy.contains("\"serviceProxyHealthy\":false"), "{unhealthy}");
    node.status.send_modify(|status| status.commits = 1);
    until("the proxy is healthy", || node.ask(&v4).expect("an answer").starts_with("HTTP/1.1 200"));
    let answer = node.ask(&v6).expect("an answer");
    for part in [
        "HTTP/1.1 200",
        "x-load-balancing-endpoint-weight: 2\r\n",
        "content-type: application/json\r\n",
        r#""namespace":"shop""#,
        r#""localEndpoints":2"#,
        r#""serviceProxyHealthy":true"#,
    ] {
        assert!(answer.contains(part), "{part} is not in {answer}");
    }

    // A terminating endpoint is served, and is no reason to send more traffic.
    node.change(|table| table.upsert_slice(slice(&all[2..]).as_bytes()).expect("a slice"));
    until("none is left", || node.ask(&v4).expect("an answer").starts_with("HTTP/1.1 503"));

    // The node loses an address, the Service its port.
    node.view.send_modify(|view| Arc::make_mut(view).addresses.truncate(1));
    until("the address is not served any more", || node.ask(&v6).is_none());
    assert!(node.ask(&v4).is_some());
    node.change(|table| table.delete_service("shop", "web"));
    until("the port closes", || node.ask(&v4).is_none());
    node.stop();
}

#[test]
fn a_health_check_port_that_is_taken_is_opened_when_it_is_free() {
    let node = Node::start();
    let address = format!("{NODE}:32001");
    let taken = {
        let address = address.clone();
        node.namespace.run(move || TcpListener::bind(address).expect("a free port"))
    };
    node.change(|table| table.upsert_service(service("web", 32001).as_bytes()).expect("a Service"));
    // The other family is served all the while.
    until("the other address answers", || node.ask(&format!("[{NODE6}]:32001")).is_some());
    drop(taken);
    until("the port is tried again", || node.ask(&address).is_some());
    node.stop();
}

#[test]
fn probes_are_answered_over_http() {
    let namespace = Namespace::new();
    let held = Netns::open(Path::new(&namespace.path)).expect("a namespace");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("tokio");
    let token = CancellationToken::new();
    let (health, metrics) = (Arc::new(Health::new(Duration::from_secs(30))), Arc::new(Metrics::default()));
    let listener = held.tcp_listen("127.0.0.1:10256".parse().expect("an address")).expect("a free port");
    let respond = proxy::probes(health.clone(), metrics.clone());
    let end = token.clone();
    let server = runtime.spawn(async move {
        let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
        proxy::http::serve(listener, respond, end).await;
    });
    let ask = |path| get(&namespace, "127.0.0.1:10256", path).expect("an answer");
    assert!(ask("/healthz").starts_with("HTTP/1.1 503"));
    assert!(ask("/livez").starts_with("HTTP/1.1 503"));
    let (status, seen) = watch::channel(Status { commits: 1, ..Status::default() });
    let follow = {
        let (health, token) = (health.clone(), token.clone());
        runtime.spawn(async move { health.follow(seen, token).await })
    };
    until("the proxy is live", || ask("/livez").starts_with("HTTP/1.1 200"));
    assert!(ask("/healthz").contains("\"nodeEligible\":true"));
    health.set_taints(["ToBeDeletedByClusterAutoscaler"].into_iter());
    assert!(ask("/healthz").starts_with("HTTP/1.1 503"));
    assert!(ask("/livez").starts_with("HTTP/1.1 200"));
    assert!(ask("/metrics").starts_with("HTTP/1.1 404"));
    let text = metrics.text(proxy::Mode::Nftables, &ServiceTable::new(), &NodeView::default(), &Status::default());
    assert!(text.contains("kubeproxy_proxy_healthz_total{code=\"503\"} 2\n"), "{text}");
    token.cancel();
    runtime.block_on(server).expect("joined");
    runtime.block_on(follow).expect("joined");
    drop(status);
}
