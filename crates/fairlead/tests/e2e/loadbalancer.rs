//! Services of type LoadBalancer in a cluster of `up`: an address of the pool, reached from outside, which another node
//! announces when the one that did is dead.

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use linux::link::{Links, Mac};
use linux::netns::Netns;
use linux::packet::{PacketSocket, Protocol};

use crate::alone::MOUNT_BINARY;
use crate::cluster::{Cluster, kubectls};
use crate::death::{expect, until};

const NODES: u8 = 3;

const OBJECTS: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 3
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: nginx, image: "nginx:test1"}]}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: LoadBalancer
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports: [{port: 80}]
---
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: small, namespace: kube-system}
spec: {addresses: [198.51.100.1-198.51.100.1], autoAssign: false}
"#;

/// One request from a place, and what was answered.
pub fn get(place: &Netns, address: IpAddr, patience: Duration) -> Option<String> {
    let ask = || {
        let mut stream = TcpStream::connect_timeout(&SocketAddr::new(address, 80), patience).ok()?;
        stream.set_read_timeout(Some(patience)).ok()?;
        stream.write_all(b"GET / HTTP/1.0\r\nHost: web\r\n\r\n").ok()?;
        let mut text = String::new();
        stream.read_to_string(&mut text).ok()?;
        text.contains("200 OK").then_some(text)
    };
    place.run(ask).expect("the place can be entered")
}

/// Who says on the nodes' network that it has the address, and when.
pub fn capture(switch: &Netns, address: IpAddr, stop: &AtomicBool) -> Vec<(Instant, Mac)> {
    let listen = || {
        let links = Links::current().expect("links can be read");
        let bridge = links.links().expect("listed").into_iter().find(|link| link.kind == "bridge").expect("a switch");
        let socket = PacketSocket::open(bridge.index, Protocol::Arp, 0).expect("a packet socket");
        let (mut said, mut buffer) = (Vec::new(), [0; 128]);
        while !stop.load(Ordering::Relaxed) {
            match socket.receive(&mut buffer).expect("received") {
                // The sender's protocol address of ARP (RFC 826).
                Some((28.., from)) if IpAddr::from([buffer[14], buffer[15], buffer[16], buffer[17]]) == address => {
                    said.push((Instant::now(), from));
                }
                Some(_) => {}
                None => std::thread::park_timeout(Duration::from_millis(1)),
            }
        }
        said
    };
    switch.run(listen).expect("the switch can be entered")
}

#[test]
fn an_address_outlives_the_node_that_announces_it() {
    let cluster = Cluster::up(&kubectls()[0], NODES);
    let cluster = &cluster;
    let applied = cluster.run("kubectl apply -f -", OBJECTS, 60);
    assert!(applied.success, "{}", applied.output);
    expect(cluster, "kubectl rollout status deployment/web --timeout=100s");
    let status = "kubectl get service web -o jsonpath='{.status.loadBalancer.ingress[*].ip}'";
    until("the Service has two addresses", || expect(cluster, status).split(' ').count() == 2);
    let addresses: Vec<IpAddr> =
        expect(cluster, status).split(' ').map(|text| text.trim().parse().expect("an address")).collect();
    assert!(expect(cluster, "kubectl get service web").contains("192.168.49.1"));
    let pool = "kubectl -n kube-system get ipaddresspool default -o jsonpath='{.status.assignedIPv4}'";
    until("the pool counts them", || expect(cluster, pool).trim() == "2");

    let id = lab::id_of(cluster.data_dir().as_ref()).expect("the cluster has an id");
    let lab = lab::Lab::open(&id).expect("the cluster is a lab");
    let outside = lab.outside().expect("the outside is there");
    for address in &addresses {
        until("outside reaches it", || get(&outside, *address, Duration::from_secs(1)).is_some());
    }

    // What cannot be had is said, and mended when it can.
    expect(cluster, "kubectl create service loadbalancer greedy --tcp=80");
    expect(cluster, "kubectl annotate service greedy metallb.io/loadBalancerIPs=203.0.113.77");
    let events = "kubectl get events --field-selector reason=AddressNotAllowed,involvedObject.name=greedy -o name";
    until("an event tells", || !expect(cluster, events).trim().is_empty());
    expect(cluster, "kubectl annotate --overwrite service greedy metallb.io/loadBalancerIPs=198.51.100.1");
    let greedy = "kubectl get service greedy -o jsonpath='{.status.loadBalancer.ingress[0].ip}'";
    until("it has what it asked for", || expect(cluster, greedy).trim() == "198.51.100.1");
    expect(cluster, "kubectl patch service greedy -p '{\"spec\":{\"type\":\"ClusterIP\"}}'");
    until("another type has no address", || expect(cluster, greedy).trim().is_empty());

    // The owner dies.
    let names: Vec<String> = lab.nodes().iter().map(|node| node.name.clone()).collect();
    let links_of = |name: &str| {
        let node = lab.node(name).expect("a node");
        Links::open(&node.namespace().expect("its namespace")).expect("its links")
    };
    let link_of = |name: &str| {
        let own = lab.node(name).expect("a node").addresses()[0];
        let held = links_of(name).addresses().expect("listed");
        held.into_iter().find(|one| one.address.addr() == own).expect("it has its address").link
    };
    let mac_of = |name: &str| {
        let link = links_of(name).link(&link_of(name)).expect("looked up").expect("a link");
        link.mac.expect("a hardware address")
    };
    let macs: Vec<(String, Mac)> = names.iter().map(|name| (name.clone(), mac_of(name))).collect();
    let name_of = |mac: Mac| macs.iter().find(|(_, known)| *known == mac).map_or("nobody", |(name, _)| name.as_str());
    let address = addresses.iter().copied().find(IpAddr::is_ipv4).expect("an IPv4 address");
    let message = "kubectl get events --field-selector reason=nodeAssigned,involvedObject.name=web \
                   --sort-by=.lastTimestamp -o jsonpath='{.items[*].message}'";
    until("an event names the owner", || expect(cluster, message).contains("announcing from node"));

    let stop = Arc::new(AtomicBool::new(false));
    let listener = {
        let (switch, stop) = (lab.switch().expect("the switch"), stop.clone());
        std::thread::spawn(move || capture(&switch, address, &stop))
    };
    // Where the router sends packets to it.
    let owner = || {
        let line = format!("nsenter --net={} -- ip neighbour show {address}", lab.netns("lab").display());
        let known = expect(cluster, &line);
        let found = macs.iter().find(|(_, mac)| known.contains(&mac.to_string()));
        found.map_or_else(|| panic!("nobody has it: {known}"), |(name, _)| name.clone())
    };
    get(&outside, address, Duration::from_secs(1)).expect("it answers");

    // The owner's agent is stopped, and its kernel lives on: the right to speak ends by itself, another node takes over, and
    // one that goes on later knows its place.
    let stopped_owner = owner();
    let processes = lab.processes().expect("listed");
    let agent = processes.iter().find(|process| process.role == stopped_owner).expect("the agent is on record").pid;
    let signal = |signal| nix::sys::signal::kill(nix::unistd::Pid::from_raw(agent as i32), signal).expect("it lives");
    signal(nix::sys::signal::Signal::SIGSTOP);
    let stopped = Instant::now();
    until("another node has the address", || {
        // The router asks anew.
        let forget = format!("nsenter --net={} -- ip neighbour flush {address}", lab.netns("lab").display());
        expect(cluster, &forget);
        get(&outside, address, Duration::from_millis(200)).is_some() && owner() != stopped_owner
    });
    let moved = stopped.elapsed();
    let second = owner();
    std::thread::sleep(Duration::from_millis(500));
    signal(nix::sys::signal::Signal::SIGCONT);
    let continued = Instant::now();
    std::thread::sleep(Duration::from_secs(2));
    until("it answers", || get(&outside, address, Duration::from_secs(1)).is_some());
    println!("{address} moved from {stopped_owner}, which was stopped, to {second} after {moved:?}");
    let stays = (stopped, continued, stopped_owner, second);

    let first = owner();
    // The kernel of a node of a lab lives on, and would still forward: its cable is pulled, too.
    let cut = format!("nsenter --net={} -- ip link set {} down", lab.netns(&first).display(), link_of(&first));
    expect(cluster, &cut);
    let killed = Instant::now();
    lab.node(&first).expect("a node").kill().expect("it can be killed");
    let mut failures = 0;
    let gap = loop {
        match get(&outside, address, Duration::from_millis(100)) {
            Some(_) => break killed.elapsed(),
            None => failures += 1,
        }
        assert!(killed.elapsed() < Duration::from_secs(30), "{address} is gone for good: {first} announced it");
    };
    stop.store(true, Ordering::Relaxed);
    let said = listener.join().expect("the capture ends");
    let heir = owner();
    println!("{address} moved from {first} to {heir}: an answer {gap:?} after the kill, {failures} tries failed");
    assert_ne!(heir, first);
    // Who spoke while one was stopped, and afterwards: never two within the life of a vote.
    let (stopped, continued, stopped_owner, second) = stays;
    let vote = Duration::from_millis(250);
    let meanwhile = said.iter().filter(|(at, _)| *at > stopped + vote && *at < continued);
    assert!(meanwhile.clone().count() > 0, "the new owner speaks");
    assert!(meanwhile.clone().all(|(_, mac)| name_of(*mac) == second), "{stopped_owner} was stopped: {said:?}");
    let alive: Vec<&(Instant, Mac)> = said.iter().filter(|(at, _)| *at > continued && *at < killed).collect();
    let turns = alive.windows(2).filter(|pair| pair[0].1 != pair[1].1).count();
    assert!(turns <= 1, "the address came and went: {alive:?}");
    let after: Vec<&(Instant, Mac)> = said.iter().filter(|(at, _)| *at > killed + Duration::from_millis(20)).collect();
    assert!(!after.is_empty(), "the new owner tells that it has the address");
    assert!(after.iter().all(|(_, mac)| name_of(*mac) == heir), "one owner: {after:?}");
    let silence = after[0].0 - killed;
    println!("announced {silence:?} after the kill, {} ARP packets seen", said.len());
    assert!(gap < Duration::from_secs(5), "{gap:?}");
}

/// A pool for who asks for it, announced only for Services with a label, and only where there is such an interface.
const PICKY: &str = r#"
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: picky, namespace: kube-system}
spec: {addresses: [192.168.49.120-192.168.49.121], autoAssign: false}
---
apiVersion: metallb.io/v1beta1
kind: L2Advertisement
metadata: {name: picky, namespace: kube-system}
spec:
  ipAddressPools: [picky]
  interfaces: [INTERFACE]
  serviceSelectors: [{matchLabels: {announced: "yes"}}]
---
apiVersion: v1
kind: Service
metadata:
  name: picky
  annotations: {metallb.io/address-pool: picky}
spec:
  type: LoadBalancer
  loadBalancerClass: fairlead.io/loadbalancer
  selector: {app: web}
  ports: [{port: 80}]
"#;

#[test]
fn alone_it_serves_a_cluster_that_has_no_other() {
    let cluster = Cluster::up_with(&kubectls()[0], NODES, &["--load-balancer", "off"]);
    let cluster = &cluster;
    let applied = cluster.run("kubectl apply -f -", OBJECTS, 60);
    assert!(applied.success, "{}", applied.output);
    expect(cluster, "kubectl rollout status deployment/web --timeout=100s");
    let deploy = format!(
        "set -e\nkubectl apply -f $EXAMPLES/loadbalancer/loadbalancer.yaml\nkind=daemonset name=fairlead-load-balancer\n\
         {MOUNT_BINARY}\nkubectl --namespace=kube-system rollout status daemonset/fairlead-load-balancer --timeout=60s"
    );
    // Nobody was there before.
    let status = "kubectl get service web -o jsonpath='{.status.loadBalancer.ingress[*].ip}'";
    assert_eq!(expect(cluster, status).trim(), "");
    expect(cluster, &deploy.replace("$BINARY", env!("CARGO_BIN_EXE_fairlead")));
    until("the Service has two addresses", || expect(cluster, status).trim().split(' ').count() == 2);
    let addresses: Vec<IpAddr> =
        expect(cluster, status).split(' ').map(|text| text.trim().parse().expect("an address")).collect();
    let id = lab::id_of(cluster.data_dir().as_ref()).expect("the cluster has an id");
    let lab = lab::Lab::open(&id).expect("the cluster is a lab");
    let outside = lab.outside().expect("the outside is there");
    for address in &addresses {
        until("outside reaches it", || get(&outside, *address, Duration::from_secs(1)).is_some());
    }

    // A label decides whether an address is announced, and an interface where.
    let node = lab.node("node-1").expect("a node");
    let own = node.addresses()[0];
    let links = Links::open(&node.namespace().expect("its namespace")).expect("its links");
    let held = links.addresses().expect("listed");
    let link = held.into_iter().find(|one| one.address.addr() == own).expect("it has its address").link;
    let applied = cluster.run("kubectl apply -f -", &PICKY.replace("INTERFACE", &link), 60);
    assert!(applied.success, "{}", applied.output);
    let picky = "kubectl get service picky -o jsonpath='{.status.loadBalancer.ingress[0].ip}'";
    until("it has an address", || expect(cluster, picky).starts_with("192.168.49.12"));
    let address: IpAddr = expect(cluster, picky).trim().parse().expect("an address");
    let events = "kubectl get events --field-selector reason=nodeAssigned,involvedObject.name=picky -o name";
    assert_eq!(expect(cluster, events).trim(), "", "no advertisement is for it");
    assert!(get(&outside, address, Duration::from_secs(1)).is_none());
    expect(cluster, "kubectl label service picky announced=yes");
    until("an event names its owner", || !expect(cluster, events).trim().is_empty());
    until("outside reaches it, too", || get(&outside, address, Duration::from_secs(1)).is_some());

    // One node tells that it announces it.
    let scrape = |node: u8| {
        let line = format!(
            "fairlead node exec --data-dir $DIR outside -- curl -s --max-time 3 http://192.168.49.{}:7472/metrics",
            node + 1
        );
        expect(cluster, &line)
    };
    let told = "metallb_speaker_announced{service=\"default/picky\",protocol=\"layer2\",";
    until("a metric tells", || (1..=NODES).filter(|node| scrape(*node).contains(told)).count() == 1);

    let account = "system:serviceaccount:kube-system:fairlead-load-balancer";
    for (line, allowed) in [
        ("watch services -A", true),
        ("patch services --subresource=status -A", true),
        ("patch services -A", false),
        ("list pods -A", false),
        ("list secrets -A", false),
        ("update leases/fairlead-layer2 -n kube-system", true),
        ("update leases/another -n kube-system", false),
    ] {
        let seen = cluster.run(&format!("kubectl auth can-i --as={account} {line}"), "", 60);
        assert_eq!(seen.success, allowed, "{line}: {}", seen.output);
    }
    // Without rights it says which, and whom to ask.
    expect(cluster, "kubectl delete clusterrolebinding fairlead-load-balancer");
    let line = "set -e
        cp $KUBECONFIG $TMP/alone.conf
        token=$(kubectl --namespace=kube-system create token fairlead-load-balancer)
        export KUBECONFIG=$TMP/alone.conf
        kubectl config unset users
        kubectl config set-credentials fairlead-user --token=$token
        fairlead loadbalancer --kubeconfig $TMP/alone.conf --metrics-bind-address 127.0.0.1:0";
    let seen = cluster.run(line, "", 60);
    assert!(
        !seen.success && seen.output.contains("fairlead-load-balancer of examples/loadbalancer"),
        "{}",
        seen.output
    );
}

#[test]
fn flags_of_the_load_balancer_that_cannot_be_meant_are_refused() {
    let cluster = Cluster::new(&kubectls()[0]);
    for (flags, part) in [
        ("--metrics-bind-address 127.0.0.1", "invalid socket address"),
        ("--kubeconfig /nowhere --metrics-bind-address 127.0.0.1:0", "/nowhere"),
        ("--load-balancer-classless maybe", "possible values: on, off"),
        ("--node-ip nowhere", "invalid IP address"),
        ("--metrics-bind-address 127.0.0.1:0", "there is no --kubeconfig, and this is no pod"),
    ] {
        let seen = cluster.run(&format!("fairlead loadbalancer {flags}"), "", 60);
        assert!(!seen.success && seen.output.contains(part), "{flags}: {}", seen.output);
    }
}
