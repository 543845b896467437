//! MetalLB's objects in, routes or the complaint out.

use std::collections::BTreeMap;
use std::net::IpAddr;

use loadbalancer::bgp::peer::{Peer, PeerObject, ProfileObject};
use loadbalancer::bgp::plan::{BgpAdvertisement, BgpAdvertisementObject, Offer, routes};
use loadbalancer::{Pool, PoolObject};
use serde_json::{Value, json};

fn pool(name: &str, range: &str) -> Pool {
    let object = json!({"metadata": {"name": name, "labels": {"tier": name}}, "spec": {"addresses": [range]}});
    Pool::new(&serde_json::from_value::<PoolObject>(object).expect("a pool")).expect("a good pool")
}

fn advertisement(spec: &Value) -> Result<BgpAdvertisement, String> {
    let object: BgpAdvertisementObject = serde_json::from_value(json!({"spec": spec})).expect("an object");
    let aliases = BTreeMap::from([("no-export".to_owned(), "65535:65281".to_owned())]);
    BgpAdvertisement::new(&object, &aliases).map_err(|error| error.to_string())
}

/// `net preference plain large`, one a line.
fn told(peer: &str, specs: &[Value]) -> String {
    let (four, six) = (pool("four", "192.0.2.0/24"), pool("six", "2001:db8::/64"));
    let labels = BTreeMap::from([("app".to_owned(), "web".to_owned())]);
    let address = |text: &str| text.parse::<IpAddr>().expect("an address");
    let offers = [
        Offer { address: address("192.0.2.1"), pool: &four, service_labels: &labels },
        Offer { address: address("192.0.2.200"), pool: &four, service_labels: &BTreeMap::new() },
        Offer { address: address("2001:db8::7"), pool: &six, service_labels: &labels },
    ];
    let all: Vec<BgpAdvertisement> = specs.iter().map(|spec| advertisement(spec).expect("a good one")).collect();
    let node = BTreeMap::from([("rack".to_owned(), "a".to_owned())]);
    let routes = routes(peer, &node, &all, &offers);
    let line = |(net, path): (&ipnet::IpNet, &loadbalancer::bgp::update::Path)| {
        format!("{net} {:?} {:x?} {:?}", path.local_pref, path.communities, path.large_communities)
    };
    routes.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn advertisements_choose_pools_services_nodes_and_peers() {
    let web = json!([{"matchLabels": {"app": "web"}}]);
    for (title, peer, specs, expected) in [
        (
            "all",
            "r1",
            vec![json!({})],
            "192.0.2.1/32 None {} {}\n192.0.2.200/32 None {} {}\n2001:db8::7/128 None {} {}",
        ),
        ("a pool by name", "r1", vec![json!({"ipAddressPools": ["six"]})], "2001:db8::7/128 None {} {}"),
        (
            "a pool by label",
            "r1",
            vec![json!({"ipAddressPoolSelectors": [{"matchLabels": {"tier": "six"}}]})],
            "2001:db8::7/128 None {} {}",
        ),
        (
            "a Service by label",
            "r1",
            vec![json!({"ipAddressPools": ["four"], "serviceSelectors": web})],
            "192.0.2.1/32 None {} {}",
        ),
        ("another peer", "r1", vec![json!({"peers": ["r2"]})], ""),
        ("another node", "r1", vec![json!({"nodeSelectors": [{"matchLabels": {"rack": "b"}}]})], ""),
        (
            "one route for all of them",
            "r1",
            vec![json!({"aggregationLength": 24, "ipAddressPools": ["four"]})],
            "192.0.2.0/24 None {} {}",
        ),
        (
            "two advertisements of one route",
            "r1",
            vec![
                json!({"ipAddressPools": ["six"], "localPref": 50, "communities": ["65000:100", "no-export"]}),
                json!({"ipAddressPools": ["six"], "localPref": 70, "communities": ["large:4200000000:1:2"]}),
            ],
            "2001:db8::7/128 Some(70) {fde80064, ffffff01} {[4200000000, 1, 2]}",
        ),
    ] {
        assert_eq!(told(peer, &specs), expected, "{title}");
    }
}

#[test]
fn what_cannot_be_meant_is_named() {
    for (spec, part) in [
        (json!({"aggregationLength": 33}), "spec.aggregationLength is 33"),
        (json!({"aggregationLengthV6": 0}), "spec.aggregationLengthV6 is 0"),
        (json!({"localPref": -1}), "spec.localPref"),
        (json!({"communities": ["65536:1"]}), "65536:1"),
        (json!({"communities": ["unheard"]}), "unheard"),
    ] {
        let error = advertisement(&spec).expect_err("not to be meant");
        assert!(error.contains(part), "{spec}: {error}");
    }
    let good = json!({"myASN": 65000, "peerASN": 65001, "peerAddress": "192.0.2.1"});
    for (key, value, part) in [
        ("peerAddress", json!("router"), "spec.peerAddress"),
        ("peerAddress", json!(""), "spec.peerAddress"),
        ("sourceAddress", json!("2001:db8::1"), "family"),
        ("myASN", json!(0), "spec.myASN"),
        ("dynamicASN", json!("internal"), "exactly one"),
        ("holdTime", json!("2s"), "spec.holdTime"),
        ("holdTime", json!("soon"), "spec.holdTime is \"soon\""),
        ("keepaliveTime", json!("-1s"), "spec.keepaliveTime"),
        ("connectTime", json!("5"), "spec.connectTime"),
        ("routerID", json!("2001:db8::1"), "spec.routerID"),
        ("vrf", json!("red"), "spec.vrf is not supported"),
        ("interface", json!("eth0"), "spec.interface is not supported"),
        ("nodeSelectors", json!([{"matchExpressions": [{"key": "a", "operator": "Near"}]}]), "spec.nodeSelectors"),
    ] {
        let mut spec = good.clone();
        spec[key] = value;
        let object: PeerObject = serde_json::from_value(json!({"spec": spec})).expect("an object");
        let error = Peer::new(&object).expect_err("not to be meant").to_string();
        assert!(error.contains(part), "{key}: {error}");
    }
    let object: PeerObject = serde_json::from_value(json!({"spec": good})).expect("an object");
    assert!(Peer::new(&object).is_ok());
    for (spec, part) in [
        (json!({"transmitInterval": 0}), "spec.transmitInterval is \"0\""),
        (json!({"receiveInterval": 60001}), "spec.receiveInterval"),
        (json!({"detectMultiplier": 1}), "spec.detectMultiplier"),
    ] {
        let object: ProfileObject = serde_json::from_value(json!({"spec": spec})).expect("an object");
        let error = object.timing(false).expect_err("not to be meant").to_string();
        assert!(error.contains(part), "{error}");
    }
    // What would be said without a pause is said once a second.
    let mut spec = good.clone();
    spec["keepaliveTime"] = json!("0s");
    let object: PeerObject = serde_json::from_value(json!({"spec": spec})).expect("an object");
    let settings = Peer::new(&object).expect("a peer").settings("node", &[]);
    assert_eq!(settings.keepalive.map(|time| time.as_secs()), Some(1));
    let echo: ProfileObject = serde_json::from_value(json!({"spec": {"echoMode": true}})).expect("an object");
    assert!(echo.timing(false).is_err());
    let slow: ProfileObject = serde_json::from_value(json!({"spec": {"transmitInterval": 50}})).expect("an object");
    assert_eq!(slow.timing(false).map(|timing| timing.transmit.as_millis()), Ok(50));
}
