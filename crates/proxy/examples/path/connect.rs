//! What a connection through a Service costs.

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use linux::netns::Netns;
use linux::nft::{
    Chain, ChainKind, DataType, Datum, Element, ElementData, Family, Hook, Key, Nft, Op, Rule, Set, Socket, Statement,
    Transaction, Value, ct_state,
};
use proxy::Mode;
use serde_json::json;
use services::ServiceTable;

use crate::program::cpu_ms;
use crate::world::{Running, World, cluster_ip, service, slice};
use crate::{DRAWN, Draw, Failure, Lab, PORTS, Rules, SERVER, peer, watched};

/// One way for packets from the client to the server.
struct Variant {
    name: String,
    world: World,
    targets: Vec<SocketAddr>,
    /// Kept: the rules are under its care.
    _running: Option<Running>,
    /// Whether a connection is over when its client has closed it: a relay still has files open then, until none are left.
    has_rate: bool,
    p50: Vec<f64>,
    rate: Vec<f64>,
    /// Of client, kernel and server together, for one connection.
    cpu: Vec<f64>,
}

pub fn connect(
    lab: &Lab,
    rounds: usize,
    sizes: &[usize],
    rules: &[Rules],
    watches: &[bool],
    limit: usize,
) -> Result<String, Failure> {
    let stop = Arc::new(AtomicBool::new(false));
    let direct: Vec<SocketAddr> = PORTS.map(|port| (SERVER, port).into()).collect();
    let mut variants = Vec::new();
    let mut add = |name: String, world: World, targets: Vec<SocketAddr>, running: Option<Running>| {
        world.serve(&stop)?;
        let (p50, rate, cpu) = (Vec::new(), Vec::new(), Vec::new());
        let has_rate = !name.starts_with("userspace");
        variants.push(Variant { name, world, targets, _running: running, has_rate, p50, rate, cpu });
        Ok::<(), Failure>(())
    };
    add("direct".into(), World::new(lab, "direct")?, direct.clone(), None)?;
    let world = World::new(lab, "nat")?;
    lay(&world.node, nat_and_ct())?;
    add("direct, an empty nat chain and one ct rule".into(), world, direct.clone(), None)?;
    let world = World::new(lab, "constant")?;
    lay(&world.node, constant())?;
    let spread = (0..DRAWN).map(|number| (cluster_ip(number), port(number)).into());
    add("one constant dnat rule".into(), world, spread.collect(), None)?;
    let mut seconds = BTreeMap::new();
    let variety = rules.iter().flat_map(|rules| sizes.iter().map(move |size| (*rules, *size)));
    for ((rules, size), is_watched) in variety.flat_map(|of| watches.iter().map(move |watch| (of, *watch))) {
        if rules.are_few() && size > limit {
            continue;
        }
        let name = format!("{rules} {size}{}", if is_watched { "" } else { " unwatched" });
        let mut draw = Draw::new(size as u64);
        let targets: Vec<SocketAddr> = (0..DRAWN).map(|_| (cluster_ip(draw.below(size)), 80).into()).collect();
        let directory = name.replace(' ', "-");
        match rules {
            Rules::Ours(mode) => {
                let world = World::for_mode(lab, &directory, mode)?;
                let watching = watched(is_watched);
                let mut running = Running::start_with(mode, &world.node, table(size)?, watching, world.hooks())?;
                seconds.insert(name.clone(), running.change(ServiceTable::set_synced)?.as_secs_f64());
                if mode == Mode::Nftables && is_watched && Some(&size) == sizes.iter().max() {
                    // The tax that everybody else pays.
                    let other = World::new(lab, &format!("{directory}-direct"))?;
                    let mut beside = Running::start(mode, &other.node, table(size)?, None)?;
                    beside.change(ServiceTable::set_synced)?;
                    add(format!("direct through {name}"), other, direct.clone(), Some(beside))?;
                }
                add(name, world, targets, Some(running))?;
            }
            Rules::KubeProxyNftables if is_watched => {
                let world = World::new(lab, &directory)?;
                let all: Vec<peer::Service> = (0..size)
                    .map(|number| peer::Service {
                        number,
                        address: cluster_ip(number),
                        port: port(number),
                        endpoints: vec![SERVER],
                    })
                    .collect();
                let started = Instant::now();
                peer::load(&world.node, &all)?;
                seconds.insert(name.clone(), started.elapsed().as_secs_f64());
                add(name, world, targets, None)?;
            }
            // It has no watch to be without.
            Rules::KubeProxyNftables => {}
        }
    }
    for _ in 0..rounds {
        for variant in &mut variants {
            let (world, targets) = (&variant.world, &variant.targets);
            variant.p50.push(world.as_client(|| latency(targets, DRAWN * 2))??);
            if !variant.has_rate {
                continue;
            }
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

/// Where the only endpoint of a Service listens.
fn port(number: usize) -> u16 {
    PORTS.start + (number % PORTS.len()) as u16
}

fn table(size: usize) -> Result<ServiceTable, Failure> {
    let mut table = ServiceTable::new();
    for number in 0..size {
        table.upsert_service(&service(number))?;
        table.upsert_slice(&slice(number, port(number), [SERVER]))?;
    }
    Ok(table)
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
