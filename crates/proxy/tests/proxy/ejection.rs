//! Endpoints die while clients talk: how long requests take, and who is asked afterwards.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use proxy::{Evidence, Mode, Notice, Status, Target, Watching};
use serde_json::json;
use services::Protocol;

use crate::cgroup::Attached;
use crate::live::Running;
use crate::net::Namespace;
use crate::objects::{service, slice};

const MODES: [Mode; 3] = [Mode::Nftables, Mode::Iptables, Mode::Ebpf];
const SERVICE: &str = "10.96.0.10:80";

/// A pod that answers with its number, as long as it is told to.
struct Pod {
    namespace: Namespace,
    address: String,
    open: Option<Arc<AtomicBool>>,
}

impl Pod {
    fn target(&self) -> Target {
        (format!("{}:8080", self.address).parse().expect("address"), Protocol::Tcp)
    }

    /// Listens on 8080.
    fn open(&mut self) {
        let listener = self.namespace.run(|| TcpListener::bind("[::]:8080").expect("bind"));
        let (open, address) = (Arc::new(AtomicBool::new(true)), self.address.clone());
        self.open = Some(open.clone());
        std::thread::spawn(move || {
            for mut stream in listener.incoming().flatten() {
                if !open.load(Ordering::SeqCst) {
                    return;
                }
                drop(stream.write_all(address.as_bytes()));
            }
        });
    }

    /// Stops to listen, as a crashed process does: from now on connections are refused.
    fn close(&mut self) {
        let Some(open) = self.open.take() else { return };
        open.store(false, Ordering::SeqCst);
        self.namespace.run(|| {
            // The thread that accepts looks at the flag once more.
            drop(TcpStream::connect("127.0.0.1:8080"));
            while TcpStream::connect("127.0.0.1:8080").is_ok() {
                std::thread::yield_now();
            }
        });
    }

    /// Nothing that one client sends to the pod arrives.
    fn forbid(&self, client: &str) {
        self.namespace.command("nft", "add table inet cut");
        self.namespace.command("nft", "add chain inet cut one { type filter hook prerouting priority -400; }");
        self.namespace.command("nft", &format!("add rule inet cut one ip saddr {client} drop"));
    }

    /// Nothing that is sent to the pod arrives.
    fn cut(&self) {
        self.namespace.command("nft", "add table inet cut");
        self.namespace.command(
            "nft",
            "add chain inet cut everything { type filter hook prerouting priority -400; policy drop; }",
        );
    }

    /// Whoever connects to the pod is told that it cannot be reached.
    fn bar(&self) {
        self.namespace.command("nft", "add table inet cut");
        self.namespace.command("nft", "add chain inet cut bar { type filter hook input priority 0; }");
        self.namespace.command("nft", "add rule inet cut bar tcp dport 8080 reject with icmpx type host-unreachable");
    }

    fn mend(&self) {
        self.namespace.command("nft", "delete table inet cut");
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        // Nobody could wake the listener through a cut.
        self.namespace
            .run(|| drop(std::process::Command::new("nft").args(["delete", "table", "inet", "cut"]).output()));
        // The listener's thread would hold the namespace.
        if let Some(open) = self.open.take() {
            open.store(false, Ordering::SeqCst);
            self.namespace.run(|| drop(TcpStream::connect("127.0.0.1:8080")));
        }
    }
}

/// A node with a client pod and three pods that serve.
struct Stage {
    mode: Mode,
    /// Before the namespaces: what is attached goes first.
    attached: Option<Attached>,
    node: Namespace,
    client: Namespace,
    pods: Vec<Pod>,
}

impl Stage {
    fn new(mode: Mode) -> Self {
        let attached = (mode == Mode::Ebpf).then(Attached::new);
        let node = Namespace::new();
        node.sysctl("net/ipv4/ip_forward", "1");
        for interface in ["all", "default"] {
            node.sysctl(&format!("net/ipv4/conf/{interface}/send_redirects"), "0");
        }
        let plug = |name: &str, address: &str| {
            let pod = Namespace::new();
            node.ip(&format!("link add {name} type veth peer name eth0 netns {}", pod.path));
            node.ip(&format!("link set {name} up"));
            pod.ip("link set eth0 up");
            node.ip(&format!("addr add 10.244.0.1/32 dev {name}"));
            node.ip(&format!("route add {address} dev {name}"));
            pod.ip(&format!("addr add {address}/32 dev eth0"));
            pod.ip("route add 10.244.0.1 dev eth0");
            pod.ip("route add default via 10.244.0.1 dev eth0");
            pod
        };
        let client = plug("client", "10.244.0.9");
        let pods = (0..3).map(|index| {
            let address = format!("10.244.0.{}", 11 + index);
            let mut pod = Pod { namespace: plug(&format!("pod{index}"), &address), address, open: None };
            pod.open();
            pod
        });
        let pods = pods.collect();
        if let Some(attached) = &attached {
            attached.add(client.thread_id);
            attached.add(node.thread_id);
        }
        Stage { mode, attached, node, client, pods }
    }

    /// The proxy, with a Service of the first pods.
    fn serve(&self, pods: usize, watching: Watching) -> Running {
        let hooks = self.attached.as_ref().map(Attached::hooks);
        let mut running = Running::start_in(&self.node, self.mode, watching, hooks);
        running.table.write().expect("table").upsert_service(&service("web", json!({}))).expect("service");
        let endpoints: Vec<(&str, &str)> = self.pods[..pods].iter().map(|pod| (&*pod.address, "node-1")).collect();
        running.table.write().expect("table").upsert_slice(&slice("web", 8080, "TCP", &endpoints)).expect("slice");
        running.change(|table| table.set_synced());
        assert_eq!(running.status.borrow().watch_error, None);
        running
    }

    /// One request: who answered, and how long it took.
    fn request(&self) -> (Result<String, std::io::ErrorKind>, Duration) {
        Self::request_from(&self.client)
    }

    fn request_from(place: &Namespace) -> (Result<String, std::io::ErrorKind>, Duration) {
        place.run(|| {
            let start = Instant::now();
            let to: SocketAddr = SERVICE.parse().expect("address");
            let ask = || -> std::io::Result<String> {
                let mut stream = TcpStream::connect_timeout(&to, Duration::from_secs(5))?;
                stream.set_read_timeout(Some(Duration::from_secs(5)))?;
                let mut text = String::new();
                stream.read_to_string(&mut text)?;
                Ok(text)
            };
            (ask().map_err(|error| error.kind()), start.elapsed())
        })
    }

    /// Asks until the endpoint in question is out; each request must be answered, and at most `slow` of them may have been
    /// repeated by the client's kernel, which takes a second. Then nobody is slow.
    fn ask_until_out(&self, running: &mut Running, pod: &Pod, slow: usize) {
        Self::ask_until_out_from(&self.client, running, pod, slow);
    }

    fn ask_until_out_from(place: &Namespace, running: &mut Running, pod: &Pod, slow: usize) {
        let mut repeated = 0;
        for round in 0.. {
            assert!(round < 200, "{} is still in the pick", pod.address);
            let (answer, took) = Self::request_from(place);
            let answer = answer.unwrap_or_else(|error| panic!("{error} after {took:?}"));
            assert_ne!(answer, pod.address, "it is dead");
            assert!(took < Duration::from_millis(2500), "{took:?}");
            repeated += usize::from(took > Duration::from_millis(700));
            if running.status.borrow().ejected.contains(&pod.target()) && took < Duration::from_millis(700) {
                break;
            }
        }
        assert!((1..=slow).contains(&repeated), "{repeated} requests had to be repeated");
        Self::is_out_for(place, pod);
    }

    fn is_out_for(place: &Namespace, pod: &Pod) {
        for _ in 0..20 {
            let (answer, took) = Self::request_from(place);
            assert!(answer.is_ok_and(|answer| answer != pod.address) && took < Duration::from_millis(700), "{took:?}");
        }
    }

    fn traffic(&self, running: &Running) -> proxy::Traffic {
        let file = std::fs::File::open(&self.node.path).expect("namespace");
        let hooks = self.attached.as_ref().map(Attached::hooks);
        let table = running.table.read().expect("table");
        let (namespace, view) = (Some(std::os::fd::AsFd::as_fd(&file)), crate::net::node_view());
        proxy::traffic(self.mode, namespace, hooks.as_ref(), &running.metrics, &table, &view).expect("traffic")
    }

    /// Takes the endpoints away: from now on clients are refused, and their first packets counted.
    fn rejections_are_counted(&self, running: &mut Running) {
        let rejected = |running: &Running| self.traffic(running).services[0].rejected;
        assert_eq!(rejected(running), 0, "{}", self.mode);
        // Somewhere to go: what has no route is not forwarded, and not refused by us.
        self.node.ip("route add 10.96.0.0/12 dev pod2");
        running.change(|table| table.upsert_slice(&slice("web", 8080, "TCP", &[])).expect("slice"));
        for _ in 0..3 {
            assert_eq!(self.request().0, Err(std::io::ErrorKind::ConnectionRefused), "{}", self.mode);
        }
        assert_eq!(rejected(running), 3, "{}", self.mode);
    }

    fn wait(running: &mut Running, what: &str, done: impl FnMut(&Status) -> bool) {
        let status = &mut running.status;
        let done = running.runtime.block_on(async {
            let waited = tokio::time::timeout(Duration::from_secs(20), status.wait_for(done)).await;
            waited.is_ok_and(|status| status.is_ok())
        });
        assert!(done, "{what}: {:?}", running.status.borrow());
    }
}

/// What was said about endpoints.
type Told = Arc<Mutex<Vec<Notice>>>;

fn telling(told: &Told) -> Watching {
    let told = told.clone();
    Watching { notices: Some(Arc::new(move |notice| told.lock().expect("list").push(notice))), ..Watching::default() }
}

fn notice(pod: &Pod, ejected: Option<Evidence>) -> Notice {
    Notice { endpoint: pod.target(), services: vec![("default".into(), "web".into())], ejected }
}

#[test]
fn a_cut_endpoint_costs_a_second_once_and_returns() {
    cut_and_mended(&MODES);
}

pub fn cut_and_mended(modes: &[Mode]) {
    for mode in modes.iter().copied() {
        let stage = Stage::new(mode);
        let told = Told::default();
        let mut running = stage.serve(3, telling(&told));
        let pod = &stage.pods[1];
        pod.cut();
        stage.ask_until_out(&mut running, pod, 3);
        assert_eq!(*told.lock().expect("list"), [notice(pod, Some(Evidence::Unanswered))], "{mode}");
        Stage::wait(&mut running, "a retry", |status| status.retries >= 1);
        assert_eq!(running.status.borrow().ejections, 1, "{mode}");
        pod.mend();
        Stage::wait(&mut running, "a trial", |status| status.ejected.is_empty());
        for round in 0.. {
            assert!(round < 200, "{mode}: it is not asked again");
            if stage.request().0.is_ok_and(|answer| answer == pod.address) {
                break;
            }
        }
        running.stop();
    }
}

/// One client may not reach an endpoint: it is sent elsewhere, and nobody else loses the endpoint.
#[test]
fn what_one_client_misses_ejects_nobody() {
    missed_by_one_client(&[Mode::Nftables, Mode::Ebpf]);
}

pub fn missed_by_one_client(modes: &[Mode]) {
    for mode in modes.iter().copied() {
        let stage = Stage::new(mode);
        let running = stage.serve(3, Watching::default());
        stage.pods[1].forbid("10.244.0.9");
        // Each repeated packet may find the same endpoint again, so how long a request takes is not known.
        let asked = (0..300).take_while(|_| running.status.borrow().retries < 2);
        let answers: Vec<_> = asked.map(|_| stage.request().0).collect();
        assert!(running.status.borrow().retries >= 2, "the endpoint was never asked");
        assert!(answers.iter().flatten().all(|answer| *answer != stage.pods[1].address));
        assert_eq!((running.status.borrow().ejections, running.status.borrow().ejected.len()), (0, 0));
        running.stop();
    }
}

#[test]
fn the_endpoints_of_a_lost_node_are_out_until_it_is_back() {
    for mode in [Mode::Nftables, Mode::Ebpf] {
        let stage = Stage::new(mode);
        let told = Told::default();
        let (nodes, lost) = tokio::sync::watch::channel(std::collections::BTreeSet::new());
        let mut running = stage.serve(2, Watching { lost_nodes: Some(lost), ..telling(&told) });
        // All of them are on this node: half stay.
        nodes.send_replace(["node-1".into()].into());
        Stage::wait(&mut running, "an ejection", |status| status.ejected.len() == 2);
        for _ in 0..20 {
            assert_eq!(stage.request().0, Ok(stage.pods[1].address.clone()));
        }
        nodes.send_replace(Default::default());
        Stage::wait(&mut running, "a trial", |status| status.ejected.is_empty());
        assert_eq!(told.lock().expect("list")[0], notice(&stage.pods[0], Some(Evidence::NodeLost)));
        running.stop();
    }
}

#[test]
fn a_crashed_endpoint_is_hidden_while_there_is_another() {
    crashed_and_started(&MODES);
}

pub fn crashed_and_started(modes: &[Mode]) {
    for mode in modes.iter().copied() {
        let mut stage = Stage::new(mode);
        let told = Told::default();
        let mut running = stage.serve(2, telling(&told));
        stage.pods[1].close();
        stage.ask_until_out(&mut running, &stage.pods[1], 2);
        assert_eq!(*told.lock().expect("list"), [notice(&stage.pods[1], Some(Evidence::Refused))], "{mode}");
        // Now the last one goes: it has to refuse, at once.
        stage.pods[0].close();
        for _ in 0..3 {
            let (answer, took) = stage.request();
            assert_eq!(answer, Err(std::io::ErrorKind::ConnectionRefused), "{mode} after {took:?}");
            assert!(took < Duration::from_millis(700), "{took:?}");
        }
        // Both come back, and both are asked.
        stage.pods[0].open();
        stage.pods[1].open();
        Stage::wait(&mut running, "a trial", |status| status.ejected.is_empty());
        for index in 0..2 {
            let answers = |_| stage.request().0.is_ok_and(|answer| answer == stage.pods[index].address);
            assert!((0..200).any(answers), "{mode}: pod {index} is not asked");
        }
        running.stop();
    }
}

/// The word of a router, or of a firewall, is a refusal like any other.
#[test]
fn ebpf_hides_an_unreachable_endpoint_while_there_is_another() {
    let stage = Stage::new(Mode::Ebpf);
    let told = Told::default();
    let mut running = stage.serve(2, telling(&told));
    stage.pods[1].bar();
    stage.ask_until_out(&mut running, &stage.pods[1], 2);
    assert_eq!(*told.lock().expect("list"), [notice(&stage.pods[1], Some(Evidence::Refused))]);
    running.stop();
}

/// The same where netfilter translates, and for many clients at once: some repeat their packets when the endpoint is out and
/// one other is left.
#[test]
fn an_unreachable_endpoint_is_hidden_while_there_is_another() {
    for mode in [Mode::Nftables, Mode::Iptables] {
        let stage = Stage::new(mode);
        let mut running = stage.serve(2, Watching::default());
        stage.pods[1].bar();
        let to: SocketAddr = SERVICE.parse().expect("address");
        let answers = stage.client.run(move || {
            std::thread::scope(|scope| {
                let ask = || TcpStream::connect_timeout(&to, Duration::from_secs(8)).map_err(|error| error.kind());
                let clients: Vec<_> = (0..40).map(|_| scope.spawn(ask)).collect();
                clients.into_iter().map(|client| client.join().expect("no panic").map(drop)).collect::<Vec<_>>()
            })
        });
        assert!(answers.iter().all(Result::is_ok), "{mode}: {answers:?}");
        Stage::wait(&mut running, "an ejection", |status| status.ejections == 1);
        running.stop();
    }
}

/// Packets whose sockets no program has seen are watched on their way. Pods are not in the cgroup here.
#[test]
fn ebpf_watches_packets_from_outside() {
    for (way, evidence) in
        [("cut", Evidence::Unanswered), ("crashed", Evidence::Refused), ("unreachable", Evidence::Refused)]
    {
        let mut stage = Stage::new(Mode::Ebpf);
        let told = Told::default();
        let mut running = stage.serve(2, telling(&told));
        match way {
            "cut" => stage.pods[1].cut(),
            "crashed" => stage.pods[1].close(),
            _ => stage.pods[1].bar(),
        }
        Stage::ask_until_out_from(&stage.pods[2].namespace, &mut running, &stage.pods[1], 2);
        assert_eq!(*told.lock().expect("list"), [notice(&stage.pods[1], Some(evidence))], "{way}");
        Stage::wait(&mut running, way, |status| status.retries >= 1);
        running.stop();
    }
}

/// Nothing of ours sees the packets of the node's own processes before they are sent: a connection to an endpoint that has
/// died fails. But the endpoint leaves the pick.
#[test]
fn ebpf_ejects_for_processes_of_the_node() {
    for crashed in [false, true] {
        let mut stage = Stage::new(Mode::Ebpf);
        let mut running = stage.serve(2, Watching::default());
        if crashed {
            stage.pods[1].close();
        } else {
            stage.pods[1].cut();
        }
        // On one processor it may take a while until somebody hears of a refusal.
        let asked = (0..200).take_while(|_| Stage::request_from(&stage.node).0.is_ok()).count();
        assert!(asked < 200, "the endpoint was never asked");
        Stage::wait(&mut running, "an ejection", |status| status.ejected.contains(&stage.pods[1].target()));
        Stage::is_out_for(&stage.node, &stage.pods[1]);
        running.stop();
    }
}

/// Whoever switches it off gets what the kernel does by itself.
#[test]
fn without_the_watch_a_refusal_is_a_refusal() {
    for mode in [Mode::Nftables, Mode::Ebpf] {
        let mut stage = Stage::new(mode);
        let running = stage.serve(2, Watching { ejection: false, retry: false, traffic: false, ..Watching::default() });
        stage.pods[1].close();
        let refused = (0..200).filter(|_| stage.request().0 == Err(std::io::ErrorKind::ConnectionRefused)).count();
        assert!((50..150).contains(&refused), "{refused} of 200");
        assert!(running.status.borrow().ejected.is_empty());
        assert!(!stage.node.command("nft", "list tables").contains("fairlead-watch"));
        running.stop();
    }
}

/// A process of its own, which a signal can stop.
struct Server(std::process::Child);

impl Server {
    fn start(pod: &mut Pod) -> Self {
        pod.close();
        let address = pod.address.clone();
        let server = Server(pod.namespace.run(move || {
            let program = std::env::current_exe().expect("this program");
            let mut command = std::process::Command::new(program);
            command.args(["--exact", "ejection::serve_until_killed", "--ignored"]).env("FAIRLEAD_ANSWER", address);
            command.stdout(std::process::Stdio::null()).stderr(std::process::Stdio::null());
            command.spawn().expect("a server")
        }));
        pod.namespace.run(|| {
            while TcpStream::connect("127.0.0.1:8080").is_err() {
                std::thread::sleep(Duration::from_millis(5));
            }
        });
        server
    }

    fn signal(&self, signal: nix::sys::signal::Signal) {
        let pid = nix::unistd::Pid::from_raw(self.0.id() as i32);
        nix::sys::signal::kill(pid, signal).expect("it is alive");
        if signal == nix::sys::signal::Signal::SIGSTOP {
            // Its threads go on until each has had a processor once more.
            let stopped = nix::sys::wait::waitpid(pid, Some(nix::sys::wait::WaitPidFlag::WUNTRACED));
            assert!(matches!(stopped, Ok(nix::sys::wait::WaitStatus::Stopped(..))), "{stopped:?}");
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// What [`Server`] runs.
#[test]
#[ignore = "a server for other tests"]
fn serve_until_killed() {
    let Some(answer) = std::env::var_os("FAIRLEAD_ANSWER") else { return };
    let listener = TcpListener::bind("[::]:8080").expect("bind");
    for mut stream in listener.incoming().flatten() {
        drop(stream.write_all(answer.as_encoded_bytes()));
    }
}

/// The kernel accepts for a process that is stopped. Its own node sees that nobody takes the connections, and refuses more
/// of them to others too.
#[test]
fn a_frozen_endpoint_is_out_until_it_thaws() {
    frozen_and_thawed(&[Mode::Nftables, Mode::Ebpf]);
}

pub fn frozen_and_thawed(modes: &[Mode]) {
    for mode in modes.iter().copied() {
        use nix::sys::signal::Signal::{SIGCONT, SIGSTOP};
        let mut stage = Stage::new(mode);
        let server = Server::start(&mut stage.pods[1]);
        let told = Told::default();
        let mut running = stage.serve(3, telling(&told));
        let pod = &stage.pods[1];
        server.signal(SIGSTOP);
        // Clients that it has taken wait until it thaws; nobody else does.
        let waiting: Vec<TcpStream> = (0..3)
            .map(|_| {
                let to = format!("{}:8080", pod.address).parse().expect("address");
                stage
                    .client
                    .run(move || TcpStream::connect_timeout(&to, Duration::from_secs(5)).expect("the kernel accepts"))
            })
            .collect();
        Stage::wait(&mut running, "an ejection", |status| status.ejected.contains(&pod.target()));
        for _ in 0..20 {
            let (answer, took) = stage.request();
            assert!(answer.is_ok_and(|answer| answer != pod.address) && took < Duration::from_millis(700), "{took:?}");
        }
        // A proxy of another node, which knows nothing of it yet, gets no answer.
        let direct = |timeout| {
            let to = format!("{}:8080", pod.address).parse().expect("address");
            stage.client.run(move || {
                TcpStream::connect_timeout(&to, Duration::from_millis(timeout)).map_err(|error| error.kind())
            })
        };
        assert_eq!(direct(300).map(drop), Err(std::io::ErrorKind::TimedOut));
        assert_eq!(*told.lock().expect("list"), [notice(pod, Some(Evidence::Frozen))]);
        // A pod of another cluster on this machine has the same address: its queue says nothing of this one.
        let mut elsewhere = Stage::new(mode);
        let other = Server::start(&mut elsewhere.pods[1]);
        other.signal(SIGSTOP);
        let to = format!("{}:8080", elsewhere.pods[1].address).parse().expect("address");
        let connect = move || TcpStream::connect_timeout(&to, Duration::from_secs(5)).expect("the kernel accepts");
        let _stays = elsewhere.client.run(connect);
        server.signal(SIGCONT);
        for mut stream in waiting {
            let mut text = String::new();
            stream.read_to_string(&mut text).expect("an answer at last");
            assert_eq!(text, pod.address);
        }
        Stage::wait(&mut running, "a trial", |status| status.ejected.is_empty());
        assert!(direct(3000).is_ok());
        running.stop();
    }
}

/// Who got what, asked for when somebody wants to know.
#[test]
fn traffic_is_counted_per_endpoint() {
    counted(&[Mode::Nftables, Mode::Iptables]);
}

pub fn counted(modes: &[Mode]) {
    for mode in modes.iter().copied() {
        let stage = Stage::new(mode);
        stage.node.sysctl("net/netfilter/nf_conntrack_acct", "1");
        let mut running = stage.serve(2, Watching::default());
        let read = || stage.traffic(&running);
        assert_eq!(read().services[0].connections(), 0);
        let mut answers = std::collections::BTreeMap::<String, u64>::new();
        for _ in 0..30 {
            *answers.entry(stage.request().0.expect("an answer")).or_default() += 1;
        }
        // IPVS adds up what its processors have counted every two seconds.
        let patience = Instant::now() + Duration::from_secs(5);
        let mut traffic = read();
        while mode == Mode::Ipvs && traffic.services[0].connections() < 30 && Instant::now() < patience {
            std::thread::sleep(Duration::from_millis(100));
            traffic = read();
        }
        let web = &traffic.services[0];
        assert_eq!((web.name.to_string(), web.connections(), web.open()), ("default/web".into(), 30, 30), "{mode}");
        for endpoint in &web.endpoints {
            let answered = answers.get(&endpoint.address.ip().to_string()).copied().unwrap_or(0);
            assert_eq!((endpoint.connections, endpoint.open), (answered, answered), "{mode}");
            let (sent, received) = endpoint.bytes.expect("the kernel counts");
            assert!(sent > answered * 100 && received > answered * 100, "{sent} {received}");
        }
        assert!(traffic.conntrack.entries >= 30 && traffic.conntrack.limit > 1000, "{:?}", traffic.conntrack);
        stage.rejections_are_counted(&mut running);
        running.stop();
    }
}

/// A socket that is sent to an endpoint repeats its first packet as early as it is told to, and is then sent to another.
#[test]
fn ebpf_sets_the_first_timeout_of_sockets() {
    let stage = Stage::new(Mode::Ebpf);
    let first_timeout = Some(Duration::from_millis(200));
    let running = stage.serve(2, Watching { ejection: false, first_timeout, ..Watching::default() });
    stage.pods[1].cut();
    let mut repeated = 0;
    for _ in 0..30 {
        let (answer, took) = stage.request();
        assert_eq!(answer, Ok(stage.pods[0].address.clone()), "after {took:?}");
        assert!(took < Duration::from_millis(900), "{took:?}");
        repeated += usize::from(took > Duration::from_millis(180));
    }
    assert!((5..26).contains(&repeated), "{repeated} of 30");
    // What goes straight to a pod is left alone.
    let to: SocketAddr = format!("{}:8080", stage.pods[1].address).parse().expect("address");
    let sent = || stage.node.command("nft", "list counter inet seen syns");
    stage.node.command("nft", "add table inet seen");
    stage.node.command("nft", "add counter inet seen syns");
    stage.node.command("nft", "add chain inet seen first { type filter hook prerouting priority -500; }");
    stage.node.command("nft", "add rule inet seen first ip daddr 10.244.0.12 tcp flags syn counter name syns");
    let straight = stage.client.run(move || TcpStream::connect_timeout(&to, Duration::from_millis(700)).map(drop));
    assert!(straight.is_err() && sent().contains("packets 1 "), "{}", sent());
    stage.pods[1].mend();
    running.stop();
}

/// Who got what by the programs of the ebpf mode: sockets, and packets whose sockets no program has seen.
#[test]
fn ebpf_counts_traffic_per_endpoint() {
    let stage = Stage::new(Mode::Ebpf);
    let mut running = stage.serve(2, Watching::default());
    let read = || stage.traffic(&running).services.remove(0).endpoints;
    assert!(read().iter().all(|endpoint| endpoint.connections == 0));
    let mut asked = std::collections::BTreeMap::<String, u64>::new();
    for _ in 0..30 {
        *asked.entry(stage.request().0.expect("an answer")).or_default() += 1;
    }
    for endpoint in read() {
        let count = asked.get(&endpoint.address.ip().to_string()).copied().unwrap_or(0);
        assert_eq!((endpoint.connections, endpoint.open), (count, 0));
        // A pod answers with its address.
        assert_eq!(endpoint.bytes.unwrap_or_default(), (0, count * "10.244.0.11".len() as u64));
        let answers = endpoint.answers.unwrap_or_default();
        assert_eq!((answers.answered, answers.refused, answers.retried, answers.resets), (count, 0, 0, 0));
        assert!(answers.waited > Duration::ZERO && answers.waited < Duration::from_secs(10) || count == 0);
    }
    // One that is open, and ends by a reset.
    let stream = stage.client.run(|| TcpStream::connect(SERVICE).expect("connect"));
    assert_eq!(read().iter().map(|endpoint| endpoint.open).sum::<u64>(), 1);
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::Linger, &linger).expect("linger");
    drop(stream);
    let resets = |endpoints: &[proxy::EndpointTraffic]| -> u64 {
        endpoints.iter().filter_map(|endpoint| endpoint.answers).map(|answers| answers.resets).sum()
    };
    let after = read();
    assert_eq!((after.iter().map(|endpoint| endpoint.open).sum::<u64>(), resets(&after)), (0, 1));
    // Pods are not in the cgroup here: their packets are translated.
    for _ in 0..10 {
        Stage::request_from(&stage.pods[2].namespace).0.expect("an answer");
    }
    let last = read();
    assert_eq!(last.iter().map(|endpoint| endpoint.connections).sum::<u64>(), 41);
    assert_eq!(last.iter().filter_map(|endpoint| endpoint.answers).map(|answers| answers.answered).sum::<u64>(), 41);
    let carried = |endpoints: &[proxy::EndpointTraffic]| -> u64 {
        endpoints.iter().filter_map(|endpoint| endpoint.bytes).map(|(sent, received)| sent + received).sum()
    };
    // Ten connections of at least eight packets, each with 52 bytes of headers.
    assert!(carried(&last) - carried(&after) > 10 * 8 * 52, "{} after {}", carried(&last), carried(&after));
    stage.rejections_are_counted(&mut running);
    running.stop();
}

/// Who got what by relays, which count by themselves.
#[test]
fn relays_count_traffic_per_endpoint() {
    let mut stage = Stage::new(Mode::Userspace);
    stage.node.ip(&format!("addr add {}/32 dev lo", crate::net::NODE));
    let mut running = stage.serve(2, Watching { ejection: false, ..Watching::default() });
    let read = |stage: &Stage, running: &Running| stage.traffic(running).services.remove(0).endpoints;
    let mut asked = std::collections::BTreeMap::<String, u64>::new();
    for _ in 0..30 {
        *asked.entry(stage.request().0.expect("an answer")).or_default() += 1;
    }
    let wait = |stage: &Stage, running: &Running, open: u64| {
        let patience = Instant::now() + Duration::from_secs(5);
        while read(stage, running).iter().map(|endpoint| endpoint.open).sum::<u64>() != open {
            assert!(Instant::now() < patience, "{:?}", read(stage, running));
            std::thread::yield_now();
        }
    };
    // A relay sees an end a moment after the client.
    wait(&stage, &running, 0);
    for endpoint in read(&stage, &running) {
        let count = asked.get(&endpoint.address.ip().to_string()).copied().unwrap_or(0);
        assert_eq!((endpoint.connections, endpoint.bytes), (count, Some((0, count * "10.244.0.11".len() as u64))));
        let answers = endpoint.answers.expect("counted");
        assert_eq!((answers.answered, answers.refused, answers.retried, answers.resets), (count, 0, 0, 0));
        assert!(answers.waited > Duration::ZERO, "{answers:?}");
    }
    let before = read(&stage, &running);
    // One of them refuses: its clients are sent to the other one.
    stage.pods[1].close();
    for _ in 0..10 {
        assert_eq!(stage.request().0.as_deref(), Ok(&*stage.pods[0].address));
    }
    wait(&stage, &running, 0);
    let after = read(&stage, &running);
    let gained = |of: fn(&proxy::Answers) -> u64, endpoint: usize| {
        of(&after[endpoint].answers.expect("counted")) - of(&before[endpoint].answers.expect("counted"))
    };
    assert_eq!((gained(|one| one.answered, 0), gained(|one| one.answered, 1)), (10, 0));
    assert_eq!((gained(|one| one.refused, 0), gained(|one| one.refused, 1)), (0, 5));
    assert_eq!(gained(|one| one.retried, 1), 5);
    stage.rejections_are_counted(&mut running);
    running.stop();
}

/// A person can read the table.
#[test]
fn the_table_of_the_watch_prints() {
    let stage = Stage::new(Mode::Nftables);
    let running = stage.serve(3, Watching::default());
    let text = stage.node.command("nft", "list table inet fairlead-watch");
    for part in ["10.96.0.10 . tcp . 80", "tcp flags rst", "ct status dying", "log group 64022", "set connections4"] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
    running.stop();
}
