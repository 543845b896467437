//! LoadBalancer addresses of a virtual router: nodes and Debian's keepalived agree by VRRP who announces them.

use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use linux::link::{Links, Mac};

use crate::cluster::{Cluster, kubectls};
use crate::daemon::Daemon;
use crate::death::{expect, until};
use crate::loadbalancer::{capture, get};

const NODES: u8 = 2;
const ADDRESS: &str = "192.168.49.120";

const OBJECTS: &str = r#"
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: web}
spec:
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: nginx, image: "nginx:test1"}]}
---
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: virtual, namespace: kube-system}
spec: {addresses: [192.168.49.120-192.168.49.121], autoAssign: false}
---
apiVersion: metallb.io/v1beta1
kind: L2Advertisement
metadata:
  name: virtual
  namespace: kube-system
  annotations: {fairlead.io/vrrp-id: "51", fairlead.io/vrrp-interval: 1s}
spec: {ipAddressPools: [virtual]}
---
apiVersion: v1
kind: Service
metadata:
  name: web
  annotations: {metallb.io/loadBalancerIPs: 192.168.49.120}
spec:
  type: LoadBalancer
  selector: {app: web}
  ports: [{port: 80}]
"#;

#[test]
fn a_virtual_router_announces_and_keepalived_follows_it() {
    let cluster = Cluster::up(&kubectls()[0], NODES);
    let cluster = &cluster;
    let id = lab::id_of(cluster.data_dir().as_ref()).expect("the cluster has an id");
    let lab = lab::Lab::open(&id).expect("the cluster is a lab");
    let address: IpAddr = ADDRESS.parse().expect("an address");
    let (stop, switch) = (Arc::new(AtomicBool::new(false)), lab.switch().expect("the switch"));
    let listener = std::thread::spawn({
        let stop = stop.clone();
        move || capture(&switch, address, &stop)
    });
    let applied = cluster.run("kubectl apply -f -", OBJECTS, 60);
    assert!(applied.success, "{}", applied.output);
    expect(cluster, "kubectl rollout status daemonset/web --timeout=100s");
    let outside = lab.outside().expect("the outside is there");
    until("outside reaches it", || get(&outside, address, Duration::from_secs(1)).is_some());
    let message = "kubectl get events --field-selector reason=nodeAssigned,involvedObject.name=web -o jsonpath='{.items[*].message}'";
    until("an event names the owner", || expect(cluster, message).contains("announcing from node"));

    let names: Vec<String> = lab.nodes().iter().map(|node| node.name.clone()).collect();
    let link_of = |name: &str| {
        let node = lab.node(name).expect("a node");
        let links = Links::open(&node.namespace().expect("its namespace")).expect("its links");
        let held = links.addresses().expect("listed");
        let link = held.into_iter().find(|one| one.address.addr() == node.addresses()[0]).expect("its address").link;
        links.link(&link).expect("looked up").expect("a link")
    };
    let macs: Vec<(String, Mac)> =
        names.iter().map(|name| (name.clone(), link_of(name).mac.expect("a hardware address"))).collect();
    let owner = || {
        let line = format!("nsenter --net={} -- ip neighbour show {address}", lab.netns("lab").display());
        let known = expect(cluster, &line);
        macs.iter().find(|(_, mac)| known.contains(&mac.to_string())).map(|(name, _)| name.clone())
    };
    // With Local, a virtual router has no say: it is told so.
    expect(cluster, "kubectl create service loadbalancer local --tcp=80");
    let local = r#"{"metadata":{"annotations":{"metallb.io/address-pool":"virtual"}},"spec":{"externalTrafficPolicy":"Local"}}"#;
    expect(cluster, &format!("kubectl patch service local -p '{local}'"));
    let events = "kubectl get events --field-selector reason=AddressNotAnnounced,involvedObject.name=local -o name";
    until("an event tells", || !expect(cluster, events).trim().is_empty());
    expect(cluster, "kubectl delete service local");

    // The owner dies, and its kernel with it: its cable is pulled.
    // Of two nodes the second has the greater priority in router 51; whoever was first gives way to it.
    let first = "node-2".to_owned();
    until("the greater one has it", || {
        get(&outside, address, Duration::from_secs(1));
        owner().as_ref() == Some(&first)
    });
    let settled = Instant::now();
    let cut = |name: &str| {
        let link = link_of(name).name;
        expect(cluster, &format!("nsenter --net={} -- ip link set dev {link} down", lab.netns(name).display()));
        lab.node(name).expect("a node").kill().expect("it can be killed");
    };
    cut(&first);
    let dead = Instant::now();
    until("outside reaches it again", || get(&outside, address, Duration::from_millis(200)).is_some());
    let second = owner().expect("an owner");
    println!("{address} moved from {first} to {second}: an answer {:?} after the death", dead.elapsed());
    assert_ne!(first, second);
    stop.store(true, Ordering::Relaxed);
    let said = listener.join().expect("the capture ends");
    let known = |mac: Mac| macs.iter().find(|(_, known)| *known == mac).map(|(name, _)| name.clone());
    let mut turns: Vec<Option<String>> =
        said.iter().filter(|(at, _)| *at > settled).map(|(_, mac)| known(*mac)).collect();
    turns.dedup();
    // The first may have had nothing to say since.
    assert!(turns.ends_with(&[Some(second.clone())]) && turns.len() <= 2, "one owner at a time: {turns:?}, {said:?}");

    // keepalived, beside the nodes, comes last: it has the address when no node is left.
    let device = expect(
        cluster,
        &format!("nsenter --net={} -- ip -o -4 address show to 192.168.49.1", lab.netns("lab").display()),
    );
    let device = device.split_whitespace().nth(1).expect("a device").to_owned();
    let config = cluster.dir().join("keepalived.conf");
    let text = format!(
        "global_defs {{ vrrp_version 3\n router_id beside\n }}\nvrrp_instance web {{\n state BACKUP\n interface {device}\n \
         virtual_router_id 51\n priority 100\n advert_int 1\n virtual_ipaddress {{ {ADDRESS}/32 }}\n }}\n"
    );
    std::fs::write(&config, text).expect("a file");
    let (net, dir) = (format!("--net={}", lab.netns("lab").display()), cluster.dir().display());
    let files = [format!("{dir}/k1.pid"), format!("{dir}/k2.pid"), format!("{dir}/k3.pid")];
    let path = config.display().to_string();
    let words = [
        "nsenter",
        &net,
        "keepalived",
        "-n",
        "-l",
        "-P",
        "-f",
        &path,
        "-p",
        &files[0],
        "-r",
        &files[1],
        "-c",
        &files[2],
    ];
    let _keepalived = Daemon::start(&words, &cluster.dir().join("keepalived.log"));
    let has = || {
        let held = Links::open(&lab.switch().expect("the switch")).expect("its links").addresses().expect("listed");
        held.iter().any(|one| one.address.addr() == address)
    };
    let begun = Instant::now();
    until("a while passes", || begun.elapsed() > Duration::from_secs(5));
    assert!(!has(), "{second} has it");
    // Its cable stays: a switch without any link has no carrier, and keepalived would have no part.
    lab.node(&second).expect("a node").kill().expect("it can be killed");
    until("keepalived has it", has);
}
