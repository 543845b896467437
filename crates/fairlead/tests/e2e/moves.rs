//! Load balancer addresses that move as planned while they are used: connections that were made before go on, and none that is
//! made meanwhile fails.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use lab::Lab;
use linux::link::Mac;

use crate::cluster::{Cluster, kubectls};
use crate::death::{expect, until};
use crate::load::{Load, Manner, PATIENCE};
use crate::loadbalancer::get;

const NODES: u8 = 3;
/// What an owner that has an address for good is used for before something else happens.
const WHILE: Duration = Duration::from_secs(2);
/// New connections a second: to the addresses of both families together.
const RATE: u32 = 200;

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
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: LoadBalancer
  ipFamilyPolicy: RequireDualStack
  selector: {app: web}
  ports: [{port: 80}]
"#;

/// The node to which the router sends packets for an address.
fn owner(cluster: &Cluster, lab: &Lab, address: IpAddr) -> Option<String> {
    let line = format!("nsenter --net={} -- ip neighbour show {address}", lab.netns("lab").display());
    let known = expect(cluster, &line);
    let is_it = |node: &&lab::LabNode| known.contains(&Mac::of(node.addresses()[0]).to_string());
    lab.nodes().iter().find(is_it).map(|node| node.name.clone())
}

#[test]
fn connections_outlive_a_planned_move_and_none_fails() {
    let cluster = Cluster::up(&kubectls()[0], NODES);
    let cluster = &cluster;
    let applied = cluster.run("kubectl apply -f -", OBJECTS, 60);
    assert!(applied.success, "{}", applied.output);
    expect(cluster, "kubectl rollout status daemonset/web --timeout=100s");
    let status = "kubectl get service web -o jsonpath='{.status.loadBalancer.ingress[*].ip}'";
    until("the Service has two addresses", || expect(cluster, status).trim().split(' ').count() == 2);
    let addresses: Vec<IpAddr> =
        expect(cluster, status).split(' ').map(|text| text.trim().parse().expect("an address")).collect();
    let id = lab::id_of(cluster.data_dir().as_ref()).expect("the cluster has an id");
    let lab = Lab::open(&id).expect("the cluster is a lab");
    let outside = || lab.outside().expect("the outside is there");
    let (mut fresh, mut kept) = (Load::start(), Load::start());
    for address in &addresses {
        until("outside reaches it", || get(&outside(), *address, Duration::from_secs(1)).is_some());
        let target = SocketAddr::new(*address, 80);
        fresh.add(outside(), target, Manner::Fresh, RATE / 2);
        // Several, as each goes to an endpoint of its own; and slow enough that none reaches nginx's 1,000 requests.
        (0..4).for_each(|_| kept.add(outside(), target, Manner::KeepAlive, 5));
    }
    std::thread::sleep(WHILE);

    let owner = |address| owner(cluster, &lab, address);
    let moves_away = |address: IpAddr, from: &str, why: &str| {
        until(why, || owner(address).is_some_and(|now| now != from));
        // Nobody waits for an answer as long as this: a connection that stood still would be seen.
        std::thread::sleep(PATIENCE + WHILE);
    };
    let [one, other] = addresses[..] else { panic!("two addresses: {addresses:?}") };
    let first = owner(one).expect("an owner");
    expect(cluster, &format!("kubectl taint node {first} ToBeDeletedByClusterAutoscaler=now:NoSchedule"));
    moves_away(one, &first, "a node that is to be removed turns away");
    expect(cluster, &format!("kubectl taint node {first} ToBeDeletedByClusterAutoscaler-"));
    until("the address comes back", || owner(one).as_ref() == Some(&first));
    // An agent ends, and its node's kernel goes on serving.
    let second = owner(other).expect("an owner");
    expect(cluster, &format!("fairlead node stop --data-dir $DIR {second}"));
    moves_away(other, &second, "an agent that ends gives up");
    expect(cluster, &format!("fairlead node start --data-dir $DIR {second}"));
    until("the address comes back", || owner(other).as_ref() == Some(&second));
    std::thread::sleep(WHILE);

    let (fresh, kept) = (fresh.end(), kept.end());
    println!("{} connections made, {} requests on those that were there; {fresh}; {kept}", fresh.answers, kept.answers);
    assert!(fresh.answers > 100 && fresh.failures.is_empty(), "{:?}", fresh.failures);
    assert!(kept.answers > 100 && kept.failures.is_empty() && kept.repeats == 0, "{kept}: {:?}", kept.failures);
}
