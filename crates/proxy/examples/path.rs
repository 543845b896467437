//! Measures the Service data path in namespaces of its own, and prints one JSON object; `cargo xtask bench proxy` runs it.
//!
//! - `path program --mode M --services N --endpoints E`: a cold start, then single changes, through the proxy's own loop
//! - `path die --mode M --how cut|crash|stop --watch on|off [--first-timeout MS]`: one of three endpoints dies under 200
//!   requests per second
//! - `path connect --rounds R --services A,B,… [--modes M,…] [--unwatched on]`: connections from a pod to random Services,
//!   beside no rule at all and beside one constant translation, which is the least that netfilter can do; with `--unwatched`
//!   each mode once more without its watch

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use linux::link::{Address, Item, Links, Route, Veth};
use linux::netns::Netns;
use linux::nft::{
    Chain, ChainKind, DataType, Datum, Element, ElementData, Family, Hook, Key, Nft, Op, Rule, Set, Socket, Statement,
    Transaction, Value, ct_state,
};
use proxy::{Config, Feed, Mode, NodeView, Status};
use serde_json::json;
use services::{Changes, Place, ServiceTable};
use tokio::sync::{broadcast, watch};
use tokio_util::sync::CancellationToken;

#[path = "../tests/proxy/cgroup.rs"]
mod cgroup;

use cgroup::Attached;

type Failure = Box<dyn std::error::Error + Send + Sync>;

const NODE: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 1);
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 11);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 12);
const PORTS: std::ops::Range<u16> = 8080..8085;
/// Services that a client talks to, however many there are.
const DRAWN: usize = 1_000;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let what = arguments.next().unwrap_or_default();
    if what == "serve" {
        return answer(arguments.next().unwrap_or_default().parse()?);
    }
    linux::memory::keep_large_apart();
    let mut flags = BTreeMap::new();
    while let (Some(name), Some(value)) = (arguments.next(), arguments.next()) {
        flags.insert(name.trim_start_matches("--").to_owned(), value);
    }
    let flag = |name: &str, default: &str| flags.get(name).cloned().unwrap_or_else(|| default.to_owned());
    let number = |name: &str, default: &str| flag(name, default).parse::<usize>();
    let lab = Lab::new()?;
    let printed = match what.as_str() {
        "program" => {
            let mode = flag("mode", "nftables").parse::<Mode>()?;
            program(&lab, mode, number("services", "10000")?, number("endpoints", "5")?, number("changes", "200")?)?
        }
        "connect" => {
            let sizes: Vec<usize> =
                flag("services", "1000,10000").split(',').map(str::parse).collect::<Result<_, _>>()?;
            let modes: Vec<Mode> =
                flag("modes", "nftables,iptables").split(',').map(str::parse).collect::<Result<_, _>>()?;
            let watches: &[bool] = if flag("unwatched", "off") == "on" { &[true, false] } else { &[true] };
            connect(&lab, number("rounds", "5")?, &sizes, &modes, watches, number("iptables-limit", "10000")?)?
        }
        "die" => {
            let first_timeout = flags.get("first-timeout").map(|text| text.parse().map(Duration::from_millis));
            let watching =
                proxy::Watching { first_timeout: first_timeout.transpose()?, ..watched(flag("watch", "on") == "on") };
            die(&lab, flag("mode", "nftables").parse::<Mode>()?, &flag("how", "crash"), watching)?
        }
        other => return Err(format!("{other:?} is neither program, die nor connect").into()),
    };
    println!("{printed}");
    Ok(())
}

/// The watch, or none.
fn watched(is_on: bool) -> proxy::Watching {
    match is_on {
        true => proxy::Watching::default(),
        false => proxy::Watching { ejection: false, retry: false, traffic: false, ..proxy::Watching::default() },
    }
}

/// A directory for pins of namespaces; all of them go with it.
struct Lab {
    dir: PathBuf,
}

impl Lab {
    fn new() -> Result<Lab, Failure> {
        let dir = std::env::temp_dir().join(format!("fairlead-path-{}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        Ok(Lab { dir })
    }

    fn namespace(&self, name: &str) -> Result<Netns, Failure> {
        Ok(Netns::create(&self.dir.join(name))?)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for pin in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            // What cannot be unpinned now goes with the machine; the figures are what matters here.
            let _ = Netns::remove(&pin.path());
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// A client pod and a server pod on one node.
struct World {
    /// Of the ebpf mode: for the threads of clients alone.
    attached: Option<Attached>,
    client: Netns,
    node: Netns,
    server: Netns,
}

impl World {
    fn new(lab: &Lab, name: &str) -> Result<World, Failure> {
        let namespace = |part: &str| lab.namespace(&format!("{name}-{part}"));
        let (client, node, server) = (namespace("client")?, namespace("node")?, namespace("server")?);
        node.sysctls(&[("net/ipv4/ip_forward", "1"), ("net/ipv4/conf/all/send_redirects", "0")])?;
        attach(&node, &client, CLIENT, "client")?;
        attach(&node, &server, SERVER, "server")?;
        Ok(World { attached: None, client, node, server })
    }

    fn for_mode(lab: &Lab, name: &str, mode: Mode) -> Result<World, Failure> {
        let attached = (mode == Mode::Ebpf).then(Attached::new);
        Ok(World { attached, ..World::new(lab, name)? })
    }

    fn hooks(&self) -> Option<proxy::Hooks> {
        self.attached.as_ref().map(Attached::hooks)
    }

    /// Runs on a thread of the client pod, in its cgroup.
    fn as_client<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, Failure> {
        Ok(self.client.run(|| {
            if let Some(attached) = &self.attached {
                attached.add(nix::unistd::gettid().as_raw());
            }
            work()
        })?)
    }

    /// Accepts on all ports until told to stop.
    fn serve(&self, stop: &Arc<AtomicBool>) -> Result<(), Failure> {
        for port in PORTS {
            let listener = Arc::new(self.server.run(|| TcpListener::bind((SERVER, port)))??);
            for _ in 0..4 {
                let (stop, listener) = (stop.clone(), listener.clone());
                // The client resets what is closed here, so that nothing stays in TIME-WAIT.
                std::thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        // One that was reset before it was accepted is an error, and the next one is not.
                        drop(listener.accept());
                    }
                });
            }
        }
        Ok(())
    }
}

/// A cable from the node to a pod.
fn attach(node: &Netns, pod: &Netns, address: Ipv4Addr, link: &str) -> Result<(), Failure> {
    let net = |address: Ipv4Addr| ipnet::IpNet::new_assert(address.into(), 32);
    let veth = Veth { name: link.into(), peer: "eth0".into(), peer_netns: pod.clone(), peer_mac: None, mtu: None };
    Links::open(node)?.ensure_all(&[
        Item::Veth(veth),
        Item::Up(link.into()),
        Item::Address(Address { link: link.into(), address: net(NODE) }),
        Item::Route(Route::host(address.into()).link(link)),
    ])?;
    Links::open(pod)?.ensure_all(&[
        Item::Up("eth0".into()),
        Item::Address(Address { link: "eth0".into(), address: net(address) }),
        Item::Route(Route::default_via(NODE.into()).link("eth0").onlink()),
    ])?;
    Ok(())
}

fn view() -> NodeView {
    NodeView::new(
        Place { node: "node-1".into(), zone: None },
        vec![NODE.into()],
        vec!["10.244.0.0/14".parse().expect("a literal")],
        vec!["10.96.0.0/12".parse().expect("a literal")],
    )
}

fn cluster_ip(number: usize) -> IpAddr {
    let base = u32::from(Ipv4Addr::new(10, 96, 1, 0));
    IpAddr::V4(Ipv4Addr::from(base + number as u32))
}

fn service(number: usize) -> Vec<u8> {
    let ip = cluster_ip(number);
    json!({
        "metadata": {"name": format!("s{number}"), "namespace": "default"},
        "spec": {"clusterIP": ip, "clusterIPs": [ip], "ports": [{"port": 80, "protocol": "TCP"}]},
    })
    .to_string()
    .into_bytes()
}

fn slice(number: usize, port: u16, endpoints: impl IntoIterator<Item = Ipv4Addr>) -> Vec<u8> {
    let endpoints: Vec<_> =
        endpoints.into_iter().map(|address| json!({"addresses": [address], "nodeName": "node-2"})).collect();
    json!({
        "metadata": {"name": format!("s{number}-1"), "namespace": "default",
            "labels": {"kubernetes.io/service-name": format!("s{number}")}},
        "addressType": "IPv4", "ports": [{"port": port, "protocol": "TCP"}], "endpoints": endpoints,
    })
    .to_string()
    .into_bytes()
}

/// Endpoints that exist nowhere.
fn nowhere(number: usize, count: usize) -> impl Iterator<Item = Ipv4Addr> {
    let base = u32::from(Ipv4Addr::new(10, 244, 16, 0));
    (0..count).map(move |endpoint| Ipv4Addr::from(base + (number * count + endpoint) as u32 % 200_000))
}

/// The proxy's loop on a namespace.
struct Running {
    table: Arc<RwLock<ServiceTable>>,
    changes: broadcast::Sender<Arc<Changes>>,
    status: watch::Receiver<Status>,
    token: CancellationToken,
    runtime: tokio::runtime::Runtime,
    _node: watch::Sender<Arc<NodeView>>,
}

impl Running {
    fn start(
        mode: Mode,
        namespace: &Netns,
        table: ServiceTable,
        hooks: Option<proxy::Hooks>,
    ) -> Result<Running, Failure> {
        Self::start_with(mode, namespace, table, proxy::Watching::default(), hooks)
    }

    fn start_with(
        mode: Mode,
        namespace: &Netns,
        table: ServiceTable,
        watching: proxy::Watching,
        hooks: Option<proxy::Hooks>,
    ) -> Result<Running, Failure> {
        let held: OwnedFd = std::fs::File::open(namespace.path().ok_or("an unnamed namespace")?)?.into();
        let table = Arc::new(RwLock::new(table));
        let (changes, receiver) = broadcast::channel(1024);
        let (sender, status) = watch::channel(Status::default());
        let (node, receiver_of_node) = watch::channel(Arc::new(view()));
        let token = CancellationToken::new();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let config =
            Config { mode, node: receiver_of_node, namespace: Some(held), hooks, metrics: Arc::default(), watching };
        runtime.spawn(proxy::run(config, Feed { table: table.clone(), changes: receiver }, sender, token.clone()));
        Ok(Running { table, changes, status, token, runtime, _node: node })
    }

    fn change(&mut self, change: impl FnOnce(&mut ServiceTable) -> Changes) -> Result<Duration, Failure> {
        let before = self.status.borrow().commits;
        let started = Instant::now();
        let changes = {
            let mut table = self.table.write().map_err(|_| "the table's writer panicked")?;
            change(&mut table)
        };
        self.changes.send(Arc::new(changes)).map_err(|_| "the proxy has ended")?;
        let status = &mut self.status;
        self.runtime.block_on(async {
            let done = status.wait_for(|status| status.commits > before && status.pending == 0);
            tokio::time::timeout(Duration::from_secs(600), done).await.map(drop)
        })?;
        Ok(started.elapsed())
    }
}

fn program(lab: &Lab, mode: Mode, services: usize, endpoints: usize, changes: usize) -> Result<String, Failure> {
    let node = lab.namespace("node")?;
    let mut table = ServiceTable::new();
    for number in 0..services {
        table.upsert_service(&service(number))?;
        table.upsert_slice(&slice(number, 8080, nowhere(number, endpoints)))?;
    }
    let attached = (mode == Mode::Ebpf).then(Attached::new);
    let mut running = Running::start(mode, &node, table, attached.as_ref().map(Attached::hooks))?;
    // Everything known: from here to the kernel holding it.
    let before = cpu_ms()?;
    let cold = running.change(ServiceTable::set_synced)?;
    let cold_cpu = cpu_ms()? - before;
    let memory = pss()?;
    let mut times = Vec::new();
    let mut draw = Draw::new(services as u64);
    for turn in 0..changes.div_ceil(2) {
        let number = draw.below(services);
        let more = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 247, 0, 0)) + turn as u32);
        for extra in [Some(more), None] {
            let object = slice(number, 8080, nowhere(number, endpoints).chain(extra));
            let mut failure = None;
            let took = running.change(|table| {
                table.upsert_slice(&object).unwrap_or_else(|error| {
                    failure = Some(error);
                    Changes::default()
                })
            })?;
            if let Some(error) = failure {
                return Err(error.into());
            }
            times.push(took);
        }
    }
    running.token.cancel();
    times.sort();
    let at =
        |part: f64| times.get(((times.len().max(1) - 1) as f64 * part) as usize).map_or(0.0, Duration::as_secs_f64);
    Ok(json!({
        "mode": mode.to_string(), "services": services, "endpoints": endpoints,
        "cold_ms": cold.as_secs_f64() * 1000.0, "cold_cpu_ms": cold_cpu, "changes": times.len(),
        "change_p50_ms": at(0.5) * 1000.0, "change_p99_ms": at(0.99) * 1000.0, "pss_mb": memory,
    })
    .to_string())
}

/// What this process has used of the processors, in steps of 10 ms, user and system together.
fn cpu_ms() -> Result<f64, Failure> {
    let text = std::fs::read_to_string("/proc/self/stat")?;
    let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok());
    Ok((ticks(11).ok_or("no utime")? + ticks(12).ok_or("no stime")?) * 10.0)
}

/// Megabytes of this process, shared pages divided among their users.
fn pss() -> Result<f64, Failure> {
    let text = std::fs::read_to_string("/proc/self/smaps_rollup")?;
    let line = text.lines().find_map(|line| line.strip_prefix("Pss:")).ok_or("no Pss")?;
    let kilobytes: f64 = line.trim().trim_end_matches("kB").trim().parse()?;
    Ok(kilobytes / 1024.0)
}

/// Answers each connection with one byte, a thread for each.
fn answer(address: SocketAddr) -> Result<(), Failure> {
    let listener = TcpListener::bind(address)?;
    println!("listening");
    for mut stream in listener.incoming().flatten() {
        std::thread::spawn(move || {
            let mut byte = [0];
            // A client that has gone needs no answer.
            let _ = stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte));
        });
    }
    Ok(())
}

/// A server process that ends with its guard, also when it is stopped.
struct Server(std::process::Child);

impl Server {
    fn start(namespace: &Netns, address: SocketAddr) -> Result<Server, Failure> {
        let program = std::env::current_exe()?;
        let mut child = namespace
            .run(|| Command::new(program).arg("serve").arg(address.to_string()).stdout(Stdio::piped()).spawn())??;
        let mut line = [0; 10];
        child.stdout.as_mut().ok_or("no output")?.read_exact(&mut line)?;
        Ok(Server(child))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be dead already: that is what this is about.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How long before the death, and after it, requests are sent.
const BEFORE: Duration = Duration::from_secs(1);
const AFTER: Duration = Duration::from_secs(6);
const EVERY: Duration = Duration::from_millis(5);
/// An answer that takes longer is as bad as none.
const PATIENCE: Duration = Duration::from_millis(1200);

fn die(lab: &Lab, mode: Mode, how: &str, watching: proxy::Watching) -> Result<String, Failure> {
    let world = World::for_mode(lab, "die", mode)?;
    let mut pods = vec![(world.server.clone(), SERVER)];
    for number in 0..2u8 {
        let (pod, address) = (lab.namespace(&format!("die-{number}"))?, Ipv4Addr::new(10, 244, 0, 13 + number));
        attach(&world.node, &pod, address, &format!("server{number}"))?;
        pods.push((pod, address));
    }
    let mut servers = Vec::new();
    for (pod, address) in &pods {
        servers.push(Server::start(pod, (*address, PORTS.start).into())?);
    }
    let mut table = ServiceTable::new();
    table.upsert_service(&service(0))?;
    let here = String::from_utf8(slice(0, PORTS.start, pods.iter().map(|(_, address)| *address)))?;
    table.upsert_slice(here.replace("node-2", "node-1").as_bytes())?;
    let mut running = Running::start_with(mode, &world.node, table, watching, world.hooks())?;
    running.change(ServiceTable::set_synced)?;

    let target = SocketAddr::from((cluster_ip(0), 80));
    let started = Instant::now();
    let outcomes = std::thread::scope(|scope| -> Result<Vec<Outcome>, Failure> {
        let clients = scope.spawn(|| world.as_client(|| request_steadily(target, started)));
        std::thread::sleep(BEFORE);
        kill(how, &mut servers[0], &pods[0].0)?;
        clients.join().map_err(|_| "the clients panicked")?
    })?;
    let failed = outcomes.iter().filter(|outcome| outcome.took.is_none()).count();
    let late = outcomes.iter().filter(|outcome| outcome.took.is_some_and(|took| took > PATIENCE)).count();
    let slow = outcomes.iter().filter(|outcome| outcome.took.is_some_and(|took| took > PATIENCE / 4)).count();
    let last = outcomes
        .iter()
        .filter(|outcome| outcome.took.is_none_or(|took| took > PATIENCE / 4))
        .map(|outcome| outcome.at.saturating_sub(BEFORE))
        .max();
    let status = running.status.borrow().clone();
    Ok(json!({
        "mode": mode.to_string(), "how": how, "requests": outcomes.len(), "failed": failed, "over_1200_ms": late,
        "over_300_ms": slow, "last_bad_ms": last.map(|last| last.as_millis() as u64),
        "ejections": status.ejections, "retries": status.retries,
    })
    .to_string())
}

/// One of the endpoints dies.
fn kill(how: &str, server: &mut Server, pod: &Netns) -> Result<(), Failure> {
    match how {
        "crash" => server.0.kill()?,
        "stop" => nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(i32::try_from(server.0.id())?),
            nix::sys::signal::Signal::SIGSTOP,
        )?,
        "cut" => {
            let output = pod.run(|| Command::new("ip").args(["link", "set", "eth0", "down"]).output())??;
            if !output.status.success() {
                return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
            }
        }
        other => return Err(format!("{other:?} is no way to die: cut, crash or stop").into()),
    }
    Ok(())
}

struct Outcome {
    /// When it was sent.
    at: Duration,
    /// `None`: it failed.
    took: Option<Duration>,
}

/// A request each 5 ms, whatever became of the last ones.
fn request_steadily(target: SocketAddr, started: Instant) -> Vec<Outcome> {
    let mut all = Vec::new();
    let count = ((BEFORE + AFTER).as_millis() / EVERY.as_millis()) as u32;
    for number in 0..count {
        let at = EVERY * number;
        std::thread::sleep(at.saturating_sub(started.elapsed()));
        all.push((at, std::thread::spawn(move || request(target))));
    }
    all.into_iter().map(|(at, request)| Outcome { at, took: request.join().ok().and_then(Result::ok) }).collect()
}

fn request(target: SocketAddr) -> std::io::Result<Duration> {
    let started = Instant::now();
    let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    Ok(started.elapsed())
}

/// One way for packets from the client to the server.
struct Variant {
    name: String,
    world: World,
    targets: Vec<SocketAddr>,
    /// Kept: the rules are under its care.
    _running: Option<Running>,
    p50: Vec<f64>,
    rate: Vec<f64>,
    /// Of client, kernel and server together, for one connection.
    cpu: Vec<f64>,
}

fn connect(
    lab: &Lab,
    rounds: usize,
    sizes: &[usize],
    modes: &[Mode],
    watches: &[bool],
    limit: usize,
) -> Result<String, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let direct: Vec<SocketAddr> = PORTS.map(|port| (SERVER, port).into()).collect();
    let mut variants = Vec::new();
    let mut add = |name: String, world: World, targets: Vec<SocketAddr>, running: Option<Running>| {
        world.serve(&stop)?;
        let (p50, rate, cpu) = (Vec::new(), Vec::new(), Vec::new());
        variants.push(Variant { name, world, targets, _running: running, p50, rate, cpu });
        Ok::<(), Failure>(())
    };
    add("direct".into(), World::new(lab, "direct")?, direct.clone(), None)?;
    let world = World::new(lab, "nat")?;
    lay(&world.node, nat_and_ct())?;
    add("direct, an empty nat chain and one ct rule".into(), world, direct.clone(), None)?;
    let world = World::new(lab, "constant")?;
    lay(&world.node, constant())?;
    let spread = (0..DRAWN).map(|number| (cluster_ip(number), PORTS.start + (number % PORTS.len()) as u16).into());
    add("one constant dnat rule".into(), world, spread.collect(), None)?;
    let mut seconds = BTreeMap::new();
    let variety = modes.iter().flat_map(|mode| sizes.iter().map(move |size| (mode, size)));
    for ((mode, size), is_watched) in variety.flat_map(|of| watches.iter().map(move |watch| (of, *watch))) {
        if *mode == Mode::Iptables && *size > limit {
            continue;
        }
        let name = format!("{mode} {size}{}", if is_watched { "" } else { " unwatched" });
        let world = World::for_mode(lab, &name.replace(' ', "-"), *mode)?;
        let mut table = ServiceTable::new();
        for number in 0..*size {
            table.upsert_service(&service(number))?;
            let port = PORTS.start + (number % PORTS.len()) as u16;
            table.upsert_slice(&slice(number, port, [SERVER]))?;
        }
        let mut running = Running::start_with(*mode, &world.node, table, watched(is_watched), world.hooks())?;
        seconds.insert(name.clone(), running.change(ServiceTable::set_synced)?.as_secs_f64());
        let mut draw = Draw::new(*size as u64);
        let targets: Vec<SocketAddr> = (0..DRAWN).map(|_| (cluster_ip(draw.below(*size)), 80).into()).collect();
        if *mode == Mode::Nftables && is_watched && Some(size) == sizes.iter().max() {
            // The tax that everybody else pays.
            let other = World::new(lab, &format!("{mode}{size}-direct"))?;
            let mut table = ServiceTable::new();
            for number in 0..*size {
                table.upsert_service(&service(number))?;
                table.upsert_slice(&slice(number, 8080, [SERVER]))?;
            }
            let mut beside = Running::start(*mode, &other.node, table, None)?;
            beside.change(ServiceTable::set_synced)?;
            add(format!("direct through {name}"), other, direct.clone(), Some(beside))?;
        }
        add(name, world, targets, Some(running))?;
    }
    for _ in 0..rounds {
        for variant in &mut variants {
            let (world, targets) = (&variant.world, &variant.targets);
            variant.p50.push(world.as_client(|| latency(targets, DRAWN * 2))??);
            let before = cpu_ms()?;
            let (count, per_second) = world.as_client(|| rate(targets, Duration::from_millis(700)))??;
            variant.cpu.push((cpu_ms()? - before) * 1000.0 / count as f64);
            variant.rate.push(per_second);
        }
    }
    stop.store(true, Ordering::Relaxed);
    let rows: Vec<_> = variants
        .iter()
        .map(|variant| json!({"name": variant.name, "p50_us": variant.p50, "per_second": variant.rate, "cpu_us": variant.cpu, "programmed_s": seconds.get(&variant.name)}))
        .collect();
    Ok(json!(rows).to_string())
}

/// The median time of a connect, in microseconds.
fn latency(targets: &[SocketAddr], count: usize) -> Result<f64, Failure> {
    let mut times = Vec::with_capacity(count);
    for turn in 0..count {
        let started = Instant::now();
        let stream = TcpStream::connect(targets[turn % targets.len()])?;
        times.push(started.elapsed());
        reset(&stream)?;
    }
    times.sort();
    Ok(times[times.len() / 2].as_secs_f64() * 1e6)
}

/// Connections of eight clients at once, and how many of them a second.
fn rate(targets: &[SocketAddr], time: Duration) -> Result<(usize, f64), Failure> {
    let started = Instant::now();
    let counts: Result<Vec<usize>, Failure> = std::thread::scope(|scope| {
        let clients: Vec<_> = (0..8)
            .map(|client| {
                scope.spawn(move || {
                    let mut count = 0;
                    while started.elapsed() < time {
                        let stream = TcpStream::connect(targets[(count * 8 + client) % targets.len()])?;
                        reset(&stream)?;
                        count += 1;
                    }
                    Ok::<usize, Failure>(count)
                })
            })
            .collect();
        clients.into_iter().map(|client| client.join().map_err(|_| "a client panicked")?).collect()
    });
    let count = counts?.into_iter().sum::<usize>();
    Ok((count, count as f64 / started.elapsed().as_secs_f64()))
}

/// Ends without TIME-WAIT, so that ports do not run out.
fn reset(stream: &TcpStream) -> Result<(), Failure> {
    let linger = nix::libc::linger { l_onoff: 1, l_linger: 0 };
    Ok(nix::sys::socket::setsockopt(stream, nix::sys::socket::sockopt::Linger, &linger)?)
}

/// What any machine with Docker on it has.
fn nat_and_ct() -> Vec<Op> {
    // Looks at every packet and drops those to a port that nobody uses.
    let new = Statement::HasBits(Value::CtState, ct_state::NEW);
    let nobody = Statement::Equal(Value::DestinationPort, Datum::Port(1));
    vec![
        Op::AddChain(Chain::base("prerouting", ChainKind::Nat, Hook::Prerouting, -100)),
        Op::AddChain(Chain::base("forward", ChainKind::Filter, Hook::Forward, 0)),
        Op::AddRule {
            chain: "forward".into(),
            rule: Rule::new([new, nobody, Statement::Verdict(linux::nft::Verdict::Drop)]),
        },
    ]
}

/// The least that netfilter can do for a Service: one rule, which translates whatever goes to a cluster IP.
fn constant() -> Vec<Op> {
    let rule = Rule::new([
        Statement::InNet(Value::DestinationIp { v6: false }, "10.96.0.0/12".parse().expect("a literal")),
        Statement::Equal(Value::L4Proto, Datum::Proto(6)),
        Statement::Choose(Value::lookup([Value::DestinationPort], "target")),
        Statement::Dnat { v6: false },
    ]);
    let element = |port| Element {
        key: Key::new([Datum::Port(port)]),
        end: None,
        data: ElementData::Value(Key::new([Datum::V4(SERVER), Datum::Port(port)])),
    };
    vec![
        Op::AddSet(Set::map("target", &[DataType::InetService], &[DataType::Ipv4Addr, DataType::InetService])),
        Op::AddElements { set: "target".into(), elements: PORTS.map(element).collect() },
        Op::AddChain(Chain::base("prerouting", ChainKind::Nat, Hook::Prerouting, -100)),
        Op::AddRule { chain: "prerouting".into(), rule },
    ]
}

fn lay(namespace: &Netns, ops: Vec<Op>) -> Result<(), Failure> {
    let mut transaction = Transaction::new(Family::Inet, "bench");
    transaction.push(Op::AddTable { comment: None });
    transaction.ops.extend(ops);
    let path: &Path = namespace.path().ok_or("an unnamed namespace")?;
    let file = std::fs::File::open(path)?;
    Ok(Socket::open(Some(std::os::fd::AsFd::as_fd(&file)))?.commit(&transaction)?)
}

/// Numbers that are the same in every run (xorshift64*).
struct Draw(u64);

impl Draw {
    fn new(seed: u64) -> Draw {
        Draw(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }
}
