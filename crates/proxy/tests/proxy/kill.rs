//! A proxy that is killed in the middle of a commit: the next start makes everything right, and whoever has nothing to do
//! with the change notices nothing.

use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use proxy::{Hooks, Mode};

use crate::case::Objects;
use crate::history::{Dice, random_cases};
use crate::ring::{Place, Proxy, Ring, Seen, ask};

/// The child's mode, seed and namespace, and the cgroup and pins of its programs if it has any.
const CHILD: &str = "FAIRLEAD_TEST_KILLED_PROXY";

/// However busy the machine is.
const PATIENCE: Duration = Duration::from_secs(5);

/// Many Services that change, and one that does not.
fn objects(dice: &mut Dice) -> Objects {
    let mut lines = vec![
        "service steady 10.96.1.1,fd00:10:96::1:1 80/TCP".to_owned(),
        "endpoint steady 10.244.0.21:80 node-1".to_owned(),
        "endpoint steady 10.244.1.21:80 node-2".to_owned(),
        "endpoint steady [fd00:10:244::21]:80 node-1".to_owned(),
    ];
    for service in 1..40 {
        let options = dice.of(&["", "affinity=60", "internal=Local", "external=Local"]);
        let node_port = 30_000 + service;
        lines.push(format!("service s{service} 10.96.2.{service} 80/TCP nodePort={node_port} {options}"));
        for _ in 0..dice.below(4) {
            let (node, host) = (dice.below(2), 100 + dice.below(100));
            lines.push(format!("endpoint s{service} 10.244.{node}.{host}:80 node-{}", node + 1));
        }
    }
    lines.push("service probe 10.96.1.2 80/TCP".to_owned());
    lines.push(format!("endpoint probe 10.244.0.{}:80 node-1", 31 + dice.below(2)));
    Objects::parse(&lines)
}

fn spawn(mode: Mode, ring: &Ring, seed: u64) -> Child {
    let hooks = ring.hooks().map(|hooks| format!(" {} {}", hooks.cgroup.display(), hooks.pins.display()));
    let task = format!("{mode} {seed} {}{}", ring.node.path, hooks.unwrap_or_default());
    Command::new(std::env::current_exe().expect("this test"))
        .args(["--exact", "kill::changes_until_it_is_killed", "--nocapture"])
        .env(CHILD, task)
        .stdout(Stdio::piped())
        .spawn()
        .expect("spawn")
}

/// Only as a child does this test do anything: it commits one change after another and never ends.
#[test]
fn changes_until_it_is_killed() {
    let Ok(task) = std::env::var(CHILD) else { return };
    let words: Vec<&str> = task.split(' ').collect();
    let [mode, seed, namespace, ref hooks @ ..] = words[..] else { panic!("mode, seed, namespace, hooks") };
    let hooks = match hooks {
        [cgroup, pins] => Some(Hooks { cgroup: cgroup.into(), pins: pins.into() }),
        _ => None,
    };
    let mut dice = Dice::new(seed.parse().expect("a seed"));
    println!("\nstarting");
    let mut proxy = Proxy::start(namespace, mode.parse().expect("a mode"), &objects(&mut dice), hooks);
    loop {
        proxy.apply(&objects(&mut dice));
    }
}

/// The SYNs that this thread's namespace has sent again.
fn repeated_syns() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/netstat").expect("counters");
    let mut lines = text.lines().filter(|line| line.starts_with("TcpExt:"));
    let (names, values) = (lines.next().expect("names"), lines.next().expect("values"));
    let at = names.split(' ').position(|name| name == "TCPSynRetrans").expect("a counter of this kernel");
    values.split(' ').nth(at).expect("a value").parse().expect("a number")
}

/// Asks the Service that never changes, again and again; how many connections there were and what went wrong.
struct Client {
    stop: Arc<AtomicBool>,
    asked: Arc<AtomicU64>,
    thread: std::thread::JoinHandle<Vec<String>>,
}

impl Client {
    fn start(place: Place, name: String, to: &'static str) -> Self {
        let (stop, asked) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (stopped, count) = (stop.clone(), asked.clone());
        let thread = std::thread::spawn(move || {
            let mut lost = Vec::new();
            while !stopped.load(Ordering::Relaxed) {
                let seen = place.run(|| ask(6, to.parse().expect("address"), PATIENCE));
                if !matches!(seen, Seen::Answer { .. }) {
                    lost.push(format!("{name}: {seen:?}"));
                }
                count.fetch_add(1, Ordering::Relaxed);
                // Ports must not run out.
                std::thread::sleep(Duration::from_millis(2));
            }
            // The kernel's own count of lost packets does not depend on how busy the machine is.
            let repeated = place.run(repeated_syns);
            if repeated != 0 {
                lost.push(format!("{name}: {repeated} SYNs were repeated"));
            }
            lost
        });
        Client { stop, asked, thread }
    }

    fn stop(self) -> (u64, Vec<String>) {
        self.stop.store(true, Ordering::Relaxed);
        let lost = self.thread.join().expect("the client ends");
        (self.asked.load(Ordering::Relaxed), lost)
    }
}

pub fn is_killed_and_starts_again(mode: Mode, longest: Duration) {
    let kills = (random_cases(50) / 50).clamp(4, 200);
    let mut ring = Ring::new(mode, false);
    let mut dice = Dice::new(1);
    let namespace = ring.node.path.clone();
    let steady = "endpoint steady 10.244.0.21:80 node-1 over=TCP";
    let others = ["10.244.1.21", "[fd00:10:244::21]", "10.244.0.31", "10.244.0.32"];
    let lines = others.map(|address| format!("endpoint steady {address}:80 node-1 over=TCP slice=-{address}"));
    ring.serve(&Objects::parse(&[steady.to_owned()]));
    ring.serve(&Objects::parse(&lines));
    let clients =
        [("10.244.0.7", "10.96.1.1:80"), ("203.0.113.9", "10.96.1.1:80"), ("fd00:10:244::7", "[fd00:10:96::1:1]:80")];
    let pod = ring.place("10.244.0.8".parse().expect("address"));
    // Links that come while no proxy runs have no programs.
    let clients = clients.map(|(from, to)| (ring.place(from.parse().expect("address")), from, to));
    Proxy::start(&namespace, mode, &objects(&mut dice), ring.hooks()).stop();
    // Clients that connect for minutes must not fill the table of connections, which is small on a small machine.
    ring.node.sysctl("net/netfilter/nf_conntrack_tcp_timeout_time_wait", "2");
    let clients = clients.map(|(place, from, to)| Client::start(place, format!("{from} -> {to}"), to));
    for kill in 0..kills {
        let asked = clients.each_ref().map(|client| client.asked.load(Ordering::Relaxed));
        let mut child = spawn(mode, &ring, kill + 2);
        let mut lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        assert!(lines.any(|line| line.is_ok_and(|line| line == "starting")), "the child starts");
        let micros = dice.below(longest.as_micros() as usize) as u64;
        std::thread::sleep(Duration::from_micros(micros));
        child.kill().expect("killed");
        child.wait().expect("reaped");

        let wanted = objects(&mut dice);
        let proxy = Proxy::start(&namespace, mode, &wanted, ring.hooks());
        let frontends: Vec<_> = proxy.table.read().expect("table").frontends().cloned().collect();
        let file = std::fs::File::open(&namespace).expect("namespace");
        let drift = proxy::explain::drift(mode, &frontends, &wanted.node, Some(file.as_fd()), ring.hooks().as_ref());
        let drift = drift.expect("compared");
        assert!(drift.is_empty(), "kill {kill} after {micros} µs: {drift:#?}");
        let probe = frontends.iter().find(|frontend| &*frontend.name.service == "probe").expect("there");
        let seen = pod.run(|| ask(6, "10.96.1.2:80".parse().expect("address"), PATIENCE));
        let by = probe.endpoints[0].address;
        assert!(matches!(seen, Seen::Answer { by: answered, .. } if answered == by), "kill {kill}: {seen:?}, not {by}");
        proxy.stop();
        // Whatever this has broken, each client has met it.
        for (client, before) in clients.iter().zip(asked) {
            while client.asked.load(Ordering::Relaxed) < before + 2 {
                std::thread::sleep(Duration::from_millis(1));
            }
        }
    }
    for client in clients {
        let (asked, lost) = client.stop();
        // Relays end with their process: their clients are told at once.
        let lost: Vec<_> = lost.into_iter().filter(|_| mode != Mode::Userspace).collect();
        assert!(lost.is_empty(), "{} of {asked} were lost: {lost:?}", lost.len());
    }
}

#[test]
fn nftables_is_killed_and_starts_again() {
    is_killed_and_starts_again(Mode::Nftables, Duration::from_millis(40));
}

#[test]
fn iptables_is_killed_and_starts_again() {
    is_killed_and_starts_again(Mode::Iptables, Duration::from_millis(400));
}

#[test]
fn userspace_is_killed_and_starts_again() {
    is_killed_and_starts_again(Mode::Userspace, Duration::from_millis(40));
}

#[test]
fn ebpf_is_killed_and_starts_again() {
    is_killed_and_starts_again(Mode::Ebpf, Duration::from_millis(400));
}
