//! LoadBalancer addresses announced by BGP to Debian's bird, which is the nodes' router: clients from outside reach them by the
//! routes that it learns.

use std::net::IpAddr;
use std::time::Duration;

use crate::cluster::{Cluster, kubectls};
use crate::daemon::Daemon;
use crate::death::{expect, until};
use crate::loadbalancer::get;

const NODES: u8 = 3;

/// The router's side of the nodes' network; whoever connects from there is a peer.
const BIRD: &str = r#"
router id 192.168.49.1;
protocol device { }
protocol bfd { interface "*" { min rx interval 200 ms; min tx interval 200 ms; multiplier 5; }; }
protocol kernel kernel4 { merge paths on; ipv4 { export where source = RTS_BGP; }; }
protocol kernel kernel6 { merge paths on; ipv6 { export where source = RTS_BGP; }; }
template bgp node {
    local 192.168.49.1 as 64500;
    direct; passive; bfd on; password "a secret";
    ipv4 { import all; export none; };
    ipv6 { import all; export none; };
}
protocol bgp node1 from node { neighbor 192.168.49.2 as 64501; }
protocol bgp node2 from node { neighbor 192.168.49.3 as 64501; }
protocol bgp node3 from node { neighbor 192.168.49.4 as 64501; }
"#;

const OBJECTS: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec: {containers: [{name: nginx, image: "nginx:test1"}]}
---
apiVersion: v1
kind: Secret
metadata: {name: router, namespace: kube-system}
type: kubernetes.io/basic-auth
stringData: {username: nobody, password: "a secret"}
---
apiVersion: metallb.io/v1beta1
kind: BFDProfile
metadata: {name: quick, namespace: kube-system}
spec: {receiveInterval: 200, transmitInterval: 200, detectMultiplier: 5}
---
apiVersion: metallb.io/v1beta2
kind: BGPPeer
metadata: {name: router, namespace: kube-system}
spec:
  myASN: 64501
  peerASN: 64500
  peerAddress: 192.168.49.1
  connectTime: 1s
  dualStackAddressFamily: true
  passwordSecret: {name: router}
  bfdProfile: quick
---
apiVersion: metallb.io/v1beta1
kind: IPAddressPool
metadata: {name: routed, namespace: kube-system}
spec: {addresses: [198.18.0.0/24, "2001:db8:18::/112"], autoAssign: false, avoidBuggyIPs: true}
---
apiVersion: metallb.io/v1beta1
kind: Community
metadata: {name: names, namespace: kube-system}
spec: {communities: [{name: web, value: "64501:80"}]}
---
apiVersion: metallb.io/v1beta1
kind: BGPAdvertisement
metadata: {name: routed, namespace: kube-system}
spec: {ipAddressPools: [routed], communities: [web]}
---
apiVersion: v1
kind: Service
metadata:
  name: web
  annotations: {metallb.io/address-pool: routed}
spec:
  type: LoadBalancer
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports: [{port: 80}]
"#;

/// The nodes that lead to a prefix, as the router knows.
fn hops(cluster: &Cluster, prefix: &str) -> usize {
    let seen = cluster.run(&format!("birdc -r -s $TMP/bird.ctl show route for {prefix} all"), "", 30).output;
    seen.matches("BGP.as_path: 64501").count()
}

#[test]
fn a_router_learns_addresses_and_leads_clients_there() {
    let cluster = Cluster::up(&kubectls()[0], NODES);
    let cluster = &cluster;
    let id = lab::id_of(cluster.data_dir().as_ref()).expect("the cluster has an id");
    let lab = lab::Lab::open(&id).expect("the cluster is a lab");
    let (config, control) = (cluster.dir().join("bird.conf"), cluster.dir().join("bird.ctl"));
    std::fs::write(&config, BIRD).expect("a file");
    let words = [
        "nsenter".to_owned(),
        format!("--net={}", lab.netns("lab").display()),
        "bird".into(),
        "-f".into(),
        "-c".into(),
        config.display().to_string(),
        "-s".into(),
        control.display().to_string(),
    ];
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let _bird = Daemon::start(&words, &cluster.dir().join("bird.log"));
    let applied = cluster.run("kubectl apply -f -", OBJECTS, 60);
    assert!(applied.success, "{}", applied.output);
    expect(cluster, "kubectl rollout status deployment/web --timeout=100s");
    let status = "kubectl get service web -o jsonpath='{.status.loadBalancer.ingress[*].ip}'";
    until("the Service has two addresses", || expect(cluster, status).trim().split(' ').count() == 2);
    let addresses: Vec<IpAddr> =
        expect(cluster, status).split(' ').map(|text| text.trim().parse().expect("an address")).collect();
    let prefix = |address: &IpAddr| format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 });
    let outside = lab.outside().expect("the outside is there");
    for address in &addresses {
        until("every node leads there", || hops(cluster, &prefix(address)) == usize::from(NODES));
        until("outside reaches it", || get(&outside, *address, Duration::from_secs(1)).is_some());
    }
    let web = prefix(&addresses[0]);
    let seen = expect(cluster, &format!("birdc -r -s $TMP/bird.ctl show route for {web} all"));
    assert!(seen.contains("(64501,80)"), "{seen}");
    for (about, reason) in [("web", "nodeAssigned"), ("router", "SessionUp")] {
        let line = format!(
            "kubectl get events -A --field-selector reason={reason},involvedObject.name={about} -o jsonpath='{{.items[*].message}}'"
        );
        until("events tell", || (1..=NODES).all(|node| expect(cluster, &line).contains(&format!("node-{node}"))));
    }

    // Only nodes with endpoints lead there, and a node that is to be removed turns away first.
    expect(cluster, "kubectl patch service web -p '{\"spec\":{\"externalTrafficPolicy\":\"Local\"}}'");
    expect(cluster, "kubectl scale deployment/web --replicas=1");
    until("one node leads there", || hops(cluster, &web) == 1);
    expect(cluster, "kubectl patch service web -p '{\"spec\":{\"externalTrafficPolicy\":\"Cluster\"}}'");
    until("every node leads there again", || hops(cluster, &web) == usize::from(NODES));
    expect(cluster, "kubectl taint node node-1 ToBeDeletedByClusterAutoscaler=now:NoSchedule");
    until("node-1 has turned away", || hops(cluster, &web) == usize::from(NODES) - 1);
    expect(cluster, "kubectl taint node node-1 ToBeDeletedByClusterAutoscaler-");
    until("node-1 is back", || hops(cluster, &web) == usize::from(NODES));

    // A node dies, one without a pod, and its kernel with it: its cable is pulled. BFD tells, long before the hold time of 90
    // seconds ends.
    let home = expect(cluster, "kubectl get pods -l app=web -o jsonpath='{.items[*].spec.nodeName}'");
    let names: Vec<String> = lab.nodes().iter().map(|node| node.name.clone()).collect();
    let victim = names.iter().find(|name| !home.contains(name.as_str())).expect("a node without a pod");
    let node = lab.node(victim).expect("a node");
    let links = linux::link::Links::open(&node.namespace().expect("its namespace"));
    let held = links.expect("its links").addresses().expect("listed");
    let link = held.into_iter().find(|one| one.address.addr() == node.addresses()[0]).expect("its address").link;
    expect(cluster, &format!("nsenter --net={} ip link set {link} down", lab.netns(victim).display()));
    let dead = std::time::Instant::now();
    node.kill().expect("it can be killed");
    until("two nodes lead there", || hops(cluster, &web) == usize::from(NODES) - 1);
    println!("the router has forgotten {victim} {:?} after its death", dead.elapsed());
    until("outside reaches it", || get(&outside, addresses[0], Duration::from_secs(1)).is_some());

    // What cannot be meant is said.
    expect(
        cluster,
        "kubectl -n kube-system patch bgppeer router --type=merge -p '{\"spec\":{\"bfdProfile\":\"nowhere\"}}'",
    );
    let line =
        "kubectl -n kube-system get events --field-selector reason=PeerNotUsed,involvedObject.name=router -o name";
    until("an event tells", || !expect(cluster, line).trim().is_empty());
    until("nobody leads there", || hops(cluster, &web) == 0);
}
