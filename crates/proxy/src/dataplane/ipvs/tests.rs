//! What the plan cannot show: connections, failures half way, other people's servers.

use std::net::SocketAddr;

use linux::ipvs::{self, Connections, Ipvs as _, Key, Op, Scheduler, Service};
use linux::nft;
use services::{Place, ServiceTable};

use super::{Ipvs, Retired};
use crate::NodeView;
use crate::dataplane::{Change, Dataplane};

type Fake = Ipvs<ipvs::Fake, nft::Fake>;

fn node() -> NodeView {
    let cidr = |text: &str| vec![text.parse().expect("cidr")];
    let place = Place { node: "node-1".into(), zone: None };
    let addresses = vec!["192.168.49.2".parse().expect("address")];
    NodeView::new(place, addresses, cidr("10.244.0.0/16"), cidr("10.96.0.0/12"))
}

fn service(protocol: &str) -> String {
    format!(
        r#"{{"metadata": {{"namespace": "default", "name": "web"}}, "spec": {{"clusterIP": "10.96.0.10",
        "clusterIPs": ["10.96.0.10"], "ports": [{{"port": 80, "protocol": "{protocol}"}}]}}}}"#
    )
}

fn slice(protocol: &str, pods: &[&str]) -> String {
    let endpoints: Vec<String> =
        pods.iter().map(|pod| format!(r#"{{"addresses": ["{pod}"], "nodeName": "node-2"}}"#)).collect();
    format!(
        r#"{{"metadata": {{"namespace": "default", "name": "web-1", "labels": {{"kubernetes.io/service-name": "web"}}}},
        "addressType": "IPv4", "ports": [{{"port": 80, "protocol": "{protocol}"}}], "endpoints": [{}]}}"#,
        endpoints.join(", ")
    )
}

fn commit(dataplane: &mut Fake, protocol: &str, pods: &[&str]) {
    let mut table = ServiceTable::new();
    table.upsert_service(service(protocol).as_bytes()).expect("service");
    table.upsert_slice(slice(protocol, pods).as_bytes()).expect("slice");
    let node = node();
    let changes: Vec<_> = table
        .frontends()
        .map(|frontend| Change { id: frontend.id, before: None, after: Some(Fake::entries(frontend, &node)) })
        .collect();
    dataplane.commit(Some(&Fake::base(&node)), &changes).expect("commit");
}

fn key(protocol: u8) -> Key {
    Key { address: "10.96.0.10:80".parse().expect("address"), protocol }
}

fn weights(dataplane: &mut Fake, of: Key) -> Vec<(String, u32)> {
    let all = dataplane.kernel().0.destinations(&of).expect("destinations").into_iter();
    all.map(|(held, _)| (held.address.to_string(), held.weight)).collect()
}

fn fake() -> Fake {
    Ipvs::new(ipvs::Fake::default(), nft::Fake::default())
}

#[test]
fn an_endpoint_goes_with_its_last_connection() {
    let mut dataplane = fake();
    let old: SocketAddr = "10.244.1.1:80".parse().expect("address");
    commit(&mut dataplane, "TCP", &["10.244.1.1"]);
    dataplane.kernel().0.connect(&key(6), old, Connections { active: 1, inactive: 0, persistent: 0 });
    commit(&mut dataplane, "TCP", &["10.244.1.2"]);
    let both = [("10.244.1.1:80".to_owned(), 0), ("10.244.1.2:80".to_owned(), 1)];
    assert_eq!(weights(&mut dataplane, key(6)), both);
    assert!(dataplane.tend().expect("tend").is_some());
    // A new start drains it, too.
    dataplane.read().expect("read");
    commit(&mut dataplane, "TCP", &["10.244.1.2"]);
    assert!(dataplane.tend().expect("tend").is_some());
    assert_eq!(weights(&mut dataplane, key(6)), both);
    dataplane.kernel().0.connect(&key(6), old, Connections { active: 0, inactive: 1, persistent: 0 });
    assert!(dataplane.tend().expect("tend").is_some(), "it closes, but is not closed");
    dataplane.kernel().0.connect(&key(6), old, Connections::default());
    assert_eq!(dataplane.tend().expect("tend"), None);
    assert_eq!(weights(&mut dataplane, key(6)), both[1..]);
}

#[test]
fn an_endpoint_that_comes_back_is_no_longer_drained() {
    let mut dataplane = fake();
    let old: SocketAddr = "10.244.1.1:80".parse().expect("address");
    commit(&mut dataplane, "TCP", &["10.244.1.1"]);
    dataplane.kernel().0.connect(&key(6), old, Connections { active: 1, inactive: 0, persistent: 0 });
    commit(&mut dataplane, "TCP", &[]);
    commit(&mut dataplane, "TCP", &["10.244.1.1"]);
    dataplane.kernel().0.connect(&key(6), old, Connections::default());
    assert_eq!(dataplane.tend().expect("tend"), None);
    assert_eq!(weights(&mut dataplane, key(6)), [("10.244.1.1:80".to_owned(), 1)]);
}

/// A UDP flow never closes: waiting for it would send its datagrams to nobody.
#[test]
fn an_endpoint_over_udp_goes_at_once() {
    let mut dataplane = fake();
    commit(&mut dataplane, "UDP", &["10.244.1.1"]);
    let old = "10.244.1.1:80".parse().expect("address");
    dataplane.kernel().0.connect(&key(17), old, Connections { active: 0, inactive: 1, persistent: 0 });
    commit(&mut dataplane, "UDP", &["10.244.1.2"]);
    assert_eq!(weights(&mut dataplane, key(17)), [("10.244.1.2:80".to_owned(), 1)]);
}

#[test]
fn other_people_s_servers_are_left_alone() {
    let mut dataplane = fake();
    let theirs = Key { address: "198.51.100.1:443".parse().expect("address"), protocol: 6 };
    let service = Service { key: theirs, scheduler: Scheduler::SourceHash, persistence: None, flags: 0 };
    dataplane.kernel().0.apply(&Op::AddService(service.clone())).expect("added");
    dataplane.read().expect("read");
    commit(&mut dataplane, "TCP", &["10.244.1.1"]);
    let base = Fake::base(&node());
    dataplane.commit(Some(&base), &[]).expect("commit");
    assert_eq!(dataplane.kernel().0.services().expect("services"), std::slice::from_ref(&service));
    let (ipvs, nft) = dataplane.kernel();
    assert!(super::remove(ipvs, nft).expect("removed"));
    assert!(!super::remove(ipvs, nft).expect("nothing is left to remove"));
    assert_eq!(ipvs.services().expect("services"), [service]);
}

/// Another mode has taken over: only what has connections stays, without weight, and a return of the mode finds it.
#[test]
fn what_has_connections_stays_without_weight() {
    let mut dataplane = fake();
    let theirs = Key { address: "198.51.100.1:443".parse().expect("address"), protocol: 6 };
    let service = Service { key: theirs, scheduler: Scheduler::SourceHash, persistence: None, flags: 0 };
    dataplane.kernel().0.apply(&Op::AddService(service.clone())).expect("added");
    dataplane.read().expect("read");
    commit(&mut dataplane, "TCP", &["10.244.1.1", "10.244.1.2"]);
    let busy: SocketAddr = "10.244.1.1:80".parse().expect("address");
    dataplane.kernel().0.connect(&key(6), busy, Connections { active: 1, inactive: 0, persistent: 0 });
    let retire = |dataplane: &mut Fake, in_use: &[&str]| {
        let in_use = in_use.iter().map(|address| address.parse().expect("address")).collect();
        let (ipvs, nft) = dataplane.kernel();
        super::retire(ipvs, nft, &in_use).expect("retired")
    };
    for _ in 0..2 {
        assert_eq!(retire(&mut dataplane, &[]), Retired::Serving { servers: 1 });
        assert_eq!(weights(&mut dataplane, key(6)), [("10.244.1.1:80".to_owned(), 0)]);
    }
    dataplane.read().expect("read");
    commit(&mut dataplane, "TCP", &["10.244.1.1", "10.244.1.2"]);
    let both = [("10.244.1.1:80".to_owned(), 1), ("10.244.1.2:80".to_owned(), 1)];
    assert_eq!(weights(&mut dataplane, key(6)), both);
    dataplane.kernel().0.connect(&key(6), busy, Connections::default());
    // A socket of the node still has the address.
    assert_eq!(retire(&mut dataplane, &["10.96.0.10"]), Retired::Serving { servers: 0 });
    assert_eq!(retire(&mut dataplane, &[]), Retired::Gone);
    assert_eq!(retire(&mut dataplane, &[]), Retired::Nothing);
    assert_eq!(dataplane.kernel().0.services().expect("services"), [service]);
}

/// Wherever an attempt fails, the next one ends where one without failure does.
#[test]
fn a_commit_that_fails_half_way_is_finished_by_the_next() {
    let mut whole = fake();
    commit(&mut whole, "TCP", &["10.244.1.1"]);
    commit(&mut whole, "TCP", &["10.244.1.2", "10.244.1.3"]);
    let (ipvs, nft) = whole.kernel();
    let expected = ipvs.dump() + &nft.dump();
    for fail_at in 1..12 {
        for nft_fails in [false, true] {
            let ipvs = if nft_fails { ipvs::Fake::default() } else { ipvs::Fake::failing(fail_at + 5) };
            let nft = if nft_fails { nft::Fake::failing(2 + fail_at % 3) } else { nft::Fake::default() };
            let mut dataplane = Ipvs::new(ipvs, nft);
            let node = node();
            let mut table = ServiceTable::new();
            table.upsert_service(service("TCP").as_bytes()).expect("service");
            let base = Fake::base(&node);
            while dataplane.commit(Some(&base), &[]).is_err() {}
            let mut step = |table: &mut ServiceTable, pods: &[&str]| {
                table.upsert_slice(slice("TCP", pods).as_bytes()).expect("slice");
                let changes: Vec<_> = table
                    .frontends()
                    .map(|frontend| Change {
                        id: frontend.id,
                        before: None,
                        after: Some(Fake::entries(frontend, &node)),
                    })
                    .collect();
                let mut tries = 0;
                while dataplane.commit(None, &changes).is_err() {
                    tries += 1;
                    assert!(tries < 20, "it never succeeds");
                }
            };
            step(&mut table, &["10.244.1.1"]);
            step(&mut table, &["10.244.1.2", "10.244.1.3"]);
            let (ipvs, nft) = dataplane.kernel();
            assert_eq!(ipvs.dump() + &nft.dump(), expected, "failing at {fail_at}, nft {nft_fails}");
        }
    }
}
