//! Plans as text, packets through the fake kernel, and that a change stays small.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex};

use ipnet::IpNet;
use linux::nft::{Chain, Fake, Family, Fate, Packet, Set};
use runtime::PortMapping;

use super::*;

fn port(sandbox: &str, pod: &[&str], host: (&str, u16), protocol: &str, container_port: u16) -> HostPort {
    let (host_ip, host_port) = host;
    HostPort {
        sandbox: sandbox.into(),
        pod_addresses: pod.iter().map(|text| address(text)).collect(),
        mapping: PortMapping {
            host_ip: (!host_ip.is_empty()).then(|| address(host_ip)),
            host_port,
            container_port,
            protocol: protocol.into(),
        },
    }
}

fn address(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

const A: [&str; 2] = ["10.244.0.2", "fd00:10:244::2"];
const B: [&str; 2] = ["10.244.0.3", "fd00:10:244::3"];

fn two_pods() -> Vec<HostPort> {
    vec![port("a", &A, ("", 8080), "TCP", 80), port("b", &B, ("192.168.49.2", 53), "UDP", 5353)]
}

fn way_out() -> Masquerade {
    let ranges = |texts: &[&str]| texts.iter().map(|text| text.parse::<IpNet>().expect("a range")).collect();
    Masquerade {
        from: ranges(&["10.244.0.0/24", "fd00:10:244::/64"]),
        except: ranges(&["10.244.0.0/16", "fd00:10:244::/56", "10.96.0.0/12", "192.168.49.2/32", "192.168.49.3/32"]),
    }
}

#[test]
fn ports_and_ranges_become_elements() {
    let mut ports = two_pods();
    ports.extend([
        port("b", &B, ("", 8080), "TCP", 81),
        port("c", &["10.244.0.4"], ("127.0.0.1", 9000), "TCP", 80),
        port("c", &["10.244.0.4"], ("", 9001), "ICMP", 80),
        port("c", &["10.244.0.4"], ("fd00:c0a8:31::2", 9002), "TCP", 80),
        port("c", &["10.244.0.4"], ("", 0), "TCP", 80),
    ]);
    let text = "\
        host_ports4 192.168.49.2 . udp . 53 : 10.244.0.3 . 5353\n\
        any_host_ports4 tcp . 8080 : 10.244.0.2 . 80\n\
        any_host_ports6 tcp . 8080 : fd00:10:244::2 . 80\n\
        hairpin4 10.244.0.2 . 10.244.0.2\n\
        hairpin4 10.244.0.3 . 10.244.0.3\n\
        hairpin6 fd00:10:244::2 . fd00:10:244::2\n\
        direct4 10.244.0.0-10.244.0.255 . 10.96.0.0-10.111.255.255\n\
        direct4 10.244.0.0-10.244.0.255 . 10.244.0.0-10.244.255.255\n\
        direct4 10.244.0.0-10.244.0.255 . 192.168.49.2-192.168.49.3\n\
        direct6 fd00:10:244::-fd00:10:244:0:ffff:ffff:ffff:ffff . fd00:10:244::-fd00:10:244:ff:ffff:ffff:ffff:ffff\n\
        outside4 10.244.0.0-10.244.0.255 . 0.0.0.0-255.255.255.255\n\
        outside6 fd00:10:244::-fd00:10:244:0:ffff:ffff:ffff:ffff . ::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff\n\
        refused: host port 9001 of sandbox c: \"ICMP\" has no ports here; use TCP, UDP or SCTP\n\
        refused: host port 9000 of sandbox c: nothing leads from loopback address 127.0.0.1 to a pod; leave hostIP out, or give another address of the node\n\
        refused: host port 9002 of sandbox c: the pod has no address of the family of fd00:c0a8:31::2; change hostIP\n\
        refused: host port 8080 of sandbox b: sandbox a has it; delete one of the two pods\n";
    assert_eq!(plan(&ports, &way_out()).to_string(), text);
}

#[test]
fn packets_go_where_the_plan_says() {
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    let mut kernel = Fake::default();
    apply(&mut kernel, &plan(&two_pods(), &way_out())).expect("applied");
    let locals = ["192.168.49.2", "fd00:c0a8:31::2", "10.244.0.1", "127.0.0.1"].map(address);
    let cases = [
        // Host ports, from far away, from another pod, from the node.
        ("203.0.113.9:4000", TCP, "192.168.49.2:8080", "10.244.0.2:80", false),
        ("[2001:db8:203::9]:4000", TCP, "[fd00:c0a8:31::2]:8080", "[fd00:10:244::2]:80", false),
        ("10.244.0.3:4000", TCP, "192.168.49.2:8080", "10.244.0.2:80", false),
        ("192.168.49.2:4000", TCP, "192.168.49.2:8080", "10.244.0.2:80", false),
        // A pod that reaches itself must not see itself.
        ("10.244.0.2:4000", TCP, "192.168.49.2:8080", "10.244.0.2:80", true),
        ("[fd00:10:244::2]:4000", TCP, "[fd00:c0a8:31::2]:8080", "[fd00:10:244::2]:80", true),
        // Only the protocol, port and address that were asked for; never another node's, never loopback.
        ("203.0.113.9:4000", UDP, "192.168.49.2:8080", "192.168.49.2:8080", false),
        ("203.0.113.9:4000", UDP, "192.168.49.2:53", "10.244.0.3:5353", false),
        ("203.0.113.9:4000", UDP, "10.244.0.1:53", "10.244.0.1:53", false),
        ("203.0.113.9:4000", TCP, "192.168.49.3:8080", "192.168.49.3:8080", false),
        ("127.0.0.1:4000", TCP, "127.0.0.1:8080", "127.0.0.1:8080", false),
        // Pods show themselves to pods, Services and nodes, and hide from everybody else.
        ("10.244.0.2:4000", TCP, "10.244.1.2:80", "10.244.1.2:80", false),
        ("10.244.0.2:4000", TCP, "10.96.0.10:80", "10.96.0.10:80", false),
        ("10.244.0.2:4000", TCP, "192.168.49.3:80", "192.168.49.3:80", false),
        ("10.244.0.2:4000", TCP, "192.168.49.1:80", "192.168.49.1:80", true),
        ("10.244.0.2:4000", UDP, "203.0.113.9:53", "203.0.113.9:53", true),
        ("[fd00:10:244::2]:4000", TCP, "[2001:db8:203::9]:80", "[2001:db8:203::9]:80", true),
        // What comes from elsewhere is none of this table's business.
        ("203.0.113.9:4000", TCP, "10.244.0.2:80", "10.244.0.2:80", false),
        ("10.244.1.2:4000", TCP, "203.0.113.9:80", "203.0.113.9:80", false),
    ];
    let socket = |text: &str| text.parse::<SocketAddr>().expect("address and port");
    for (from, protocol, to, arrives, masqueraded) in cases {
        let packet = Packet { from: socket(from), to: socket(to), protocol };
        let fate = kernel.trace(packet, &locals, &mut |_| 0);
        assert_eq!(fate, Fate::Sent { to: socket(arrives), masqueraded }, "{from} -> {to}, protocol {protocol}");
    }
}

#[test]
fn a_change_is_a_few_elements_and_a_restart_none() {
    let mut kernel = Fake::default();
    apply(&mut kernel, &plan(&two_pods(), &way_out())).expect("applied");
    let (whole, text) = (kernel.changed, kernel.dump());
    apply(&mut kernel, &plan(&two_pods(), &way_out())).expect("applied");
    assert_eq!((kernel.changed, kernel.dump()), (whole, text.clone()));

    let mut more = two_pods();
    more.push(port("c", &["10.244.0.4"], ("", 9000), "TCP", 80));
    apply(&mut kernel, &plan(&more, &way_out())).expect("applied");
    assert_eq!(kernel.changed, whole + 2, "the port and its hairpin");
    // The port moves to another pod: one element goes, one comes, under the same key.
    more[2] = port("d", &["10.244.0.5"], ("", 9000), "TCP", 80);
    apply(&mut kernel, &plan(&more, &way_out())).expect("applied");
    assert_eq!(kernel.changed, whole + 6);
    apply(&mut kernel, &plan(&two_pods(), &way_out())).expect("applied");
    assert_eq!(kernel.dump(), text);
}

#[test]
fn a_table_with_other_rules_is_replaced() {
    let mut old = Transaction::new(Family::Inet, TABLE);
    old.push(Op::AddTable { comment: None });
    old.push(Op::AddChain(Chain::regular("layout_0")));
    old.push(Op::AddSet(Set::of("direct4", &[])));
    let (mut kernel, mut fresh) = (Fake::default(), Fake::default());
    kernel.commit(&old).expect("an older agent's table");
    for kernel in [&mut kernel, &mut fresh] {
        apply(kernel, &plan(&two_pods(), &way_out())).expect("applied");
    }
    assert_eq!(kernel.dump(), fresh.dump());
}

/// One kernel, seen by the task and by the test.
#[derive(Clone)]
struct Shared(Arc<Mutex<Fake>>);

impl Shared {
    fn held(&self) -> std::sync::MutexGuard<'_, Fake> {
        self.0.lock().expect("nobody panicked")
    }
}

impl Nft for Shared {
    fn commit(&mut self, transaction: &Transaction) -> Result<(), Error> {
        self.held().commit(transaction)
    }
    fn table_comment(&mut self, family: Family, table: &str) -> Result<Option<String>, Error> {
        self.held().table_comment(family, table)
    }
    fn chains(&mut self, family: Family, table: &str) -> Result<Vec<String>, Error> {
        self.held().chains(family, table)
    }
    fn sets(&mut self, family: Family, table: &str) -> Result<Vec<String>, Error> {
        self.held().sets(family, table)
    }
    fn elements(&mut self, family: Family, table: &str, set: &Set) -> Result<Vec<Element>, Error> {
        self.held().elements(family, table, set)
    }
}

#[tokio::test]
async fn the_task_tries_again_and_leaves_the_table_behind() {
    let kernel = Shared(Arc::new(Mutex::new(Fake::failing(2))));
    let (ports, ports_seen) = watch::channel(Vec::new());
    let (_masquerade, masquerade_seen) = watch::channel(way_out());
    let (status, mut seen) = watch::channel(Status::default());
    let stop = CancellationToken::new();
    let task = tokio::spawn(run(kernel.clone(), ports_seen, masquerade_seen, status, stop.clone()));
    seen.wait_for(|status| status.applied == 1).await.expect("the task runs");
    ports.send(two_pods()).expect("the task listens");
    seen.wait_for(|status| status.error.is_some()).await.expect("the second commit fails");
    let done = seen.wait_for(|status| status.applied == 2).await.expect("the third does not").clone();
    assert_eq!(done.error, None);
    stop.cancel();
    task.await.expect("the task ends");
    let mut wanted = Fake::default();
    apply(&mut wanted, &plan(&two_pods(), &way_out())).expect("applied");
    assert_eq!(kernel.held().dump(), wanted.dump());
}
