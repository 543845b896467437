//! Case files: objects in, packets out. This is how they are written and read; `cases` traces them through plans, `ring`
//! sends real packets.
//!
//! ```text
//! # Why this matters.
//! -- objects --
//! service web 10.96.0.10 80/TCP nodePort=30080 external=Local
//! endpoint web 10.244.2.5:8080 node-2
//! -- trace --
//! 203.0.113.9 -> 192.168.49.2:30080   DROP
//! 10.244.0.7 -> 10.96.0.10:80         10.244.2.5:8080
//! 10.244.0.7 -> 10.96.0.10:81         REJECT
//!   no-catch-all in iptables          PASS
//! ```
//! Outcomes are DROP, REJECT, PASS (left alone), or all places a packet may go to (each equally likely), with `masq` if its
//! source changes. An indented line excepts modes from the outcome above it; its first word is a row of
//! `docs/mode-differences.md`. A second `-- objects --` replaces the first one's, as later events would. The node is
//! `node-1` in zone `a`; a line `node …` changes that.
//!
//! - `service NAME CLUSTER-IPS PORTS OPTION…`: cluster IPs `10.96.0.10,fd00:10:96::10` or `None`; ports `80/TCP` or
//!   `http=80/TCP,dns=53/UDP`
//! - `externalName NAME TARGET`
//! - `endpoint NAME[:PORT-NAME] ADDRESS NODE OPTION…`: one slice per Service, family, port and `slice=`; its protocol is that
//!   of the Service's port, or `over=`
//! - `fqdn NAME HOST PORT`: a slice of names
//! - `node OPTION…`

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use linux::nft::Packet;
use proxy::{Mode, NodeView};
use serde_json::{Value, json};
use services::{Changes, DSR_ANNOTATION, Place, Protocol, Selection, ServiceTable};

pub struct Case {
    pub title: String,
    /// The name of its file, without `.txt`.
    pub file: String,
    pub steps: Vec<Step>,
}

/// A state of the cluster, and what becomes of packets in it.
#[derive(Default)]
pub struct Step {
    pub objects: Vec<String>,
    pub traces: Vec<Trace>,
}

pub struct Trace {
    /// As written.
    pub line: String,
    pub packet: Packet,
    outcome: Outcome,
    pub exceptions: Vec<Exception>,
}

/// Modes in which another socket sends what the client sent: its source is always the node's. One row of the document for
/// all their packets, `relayed-source`, instead of an exception for each.
pub const RELAYED: &[Mode] = &[Mode::Userspace];

/// Modes in which a socket of the cluster is sent to its endpoint when it connects: its packets are never masqueraded. One
/// row of the document for all, `connected-source`.
pub const CONNECTED: &[Mode] = &[Mode::Ebpf];

/// Whether a socket of this node sends the packet.
pub fn is_own(packet: &Packet, node: &NodeView) -> bool {
    let from = packet.from.ip();
    node.addresses.contains(&from)
        || from.is_loopback()
        || node.pods.cidrs(from.is_ipv6()).any(|cidr| cidr.contains(&from))
}

pub struct Exception {
    pub difference: String,
    pub modes: Vec<Mode>,
    outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Drop,
    Reject,
    Pass,
    /// Each place is equally likely.
    To {
        places: Vec<SocketAddr>,
        masqueraded: bool,
    },
}

impl Outcome {
    fn parse(words: &[&str]) -> Self {
        match words {
            ["DROP"] => Outcome::Drop,
            ["REJECT"] => Outcome::Reject,
            ["PASS"] => Outcome::Pass,
            [] => panic!("a trace without an outcome"),
            words => {
                let masqueraded = words.last() == Some(&"masq");
                let places = words.iter().filter(|word| **word != "|" && **word != "masq");
                Outcome::To { places: places.map(|place| place.parse().expect("a place")).collect(), masqueraded }
            }
        }
    }
}

impl Trace {
    fn parse(line: &str) -> Self {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [from, "->", to, ref expected @ ..] = words[..] else { panic!("not a trace: {line}") };
        let (to, protocol) = to.split_once('/').unwrap_or((to, "TCP"));
        let packet = Packet {
            from: SocketAddr::new(from.parse().expect("a source"), 40_000),
            to: to.parse().expect("a destination"),
            protocol: Protocol::parse(protocol).expect("a protocol").number(),
        };
        Trace { line: line.to_owned(), packet, outcome: Outcome::parse(expected), exceptions: Vec::new() }
    }

    fn except(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        let [difference, "in", modes, ref outcome @ ..] = words[..] else { panic!("not an exception: {line}") };
        let modes = modes.split(',').map(|mode| mode.parse().expect("a mode")).collect();
        let outcome = Outcome::parse(outcome);
        assert_ne!(outcome, self.outcome, "{line}: this is no difference");
        self.exceptions.push(Exception { difference: difference.to_owned(), modes, outcome });
    }

    pub fn outcome(&self, mode: Mode) -> Outcome {
        let excepted = self.exceptions.iter().find(|exception| exception.modes.contains(&mode));
        let outcome = excepted.map_or(&self.outcome, |exception| &exception.outcome);
        match outcome.clone() {
            Outcome::To { places, masqueraded: _ } if RELAYED.contains(&mode) => {
                Outcome::To { places, masqueraded: true }
            }
            outcome => outcome,
        }
    }

    /// As it is seen where the packet arrives.
    pub fn outcome_on(&self, mode: Mode, node: &NodeView) -> Outcome {
        match self.outcome(mode) {
            Outcome::To { places, .. } if CONNECTED.contains(&mode) && is_own(&self.packet, node) => {
                Outcome::To { places, masqueraded: false }
            }
            outcome => outcome,
        }
    }

    /// Whether it is another packet where sockets are sent to their endpoints.
    pub fn is_otherwise_if_connected(&self) -> bool {
        matches!(self.outcome, Outcome::To { masqueraded: true, .. }) && is_own(&self.packet, &node())
    }

    /// Whether relays make it another packet than the other modes do.
    pub fn is_otherwise_if_relayed(&self) -> bool {
        matches!(self.outcome, Outcome::To { masqueraded: false, .. })
    }
}

/// All cases of `tests/cases`, in order.
pub fn all() -> Vec<Case> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/cases");
    let mut files: Vec<_> = std::fs::read_dir(folder).expect("cases").map(|file| file.expect("file").path()).collect();
    files.sort();
    let read = |path: &std::path::PathBuf| {
        let name = path.file_stem().and_then(|name| name.to_str()).expect("a name");
        cases(name, &std::fs::read_to_string(path).expect("readable"))
    };
    files.iter().flat_map(read).collect()
}

fn cases(file: &str, text: &str) -> Vec<Case> {
    let mut cases: Vec<Case> = Vec::new();
    let mut in_traces = false;
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        if let Some(title) = line.strip_prefix("# ") {
            cases.push(Case { title: title.to_owned(), file: file.to_owned(), steps: Vec::new() });
            continue;
        }
        let case = cases.last_mut().expect("a file starts with a title");
        match line.trim() {
            "-- objects --" => {
                in_traces = false;
                case.steps.push(Step::default());
                continue;
            }
            "-- trace --" => {
                in_traces = true;
                continue;
            }
            _ => {}
        }
        let step = case.steps.last_mut().expect("a case starts with its objects");
        match (in_traces, line.starts_with(' ')) {
            (false, _) => step.objects.push(line.to_owned()),
            (true, true) => step.traces.last_mut().expect("an exception from something").except(line),
            (true, false) => step.traces.push(Trace::parse(line)),
        }
    }
    cases
}

pub fn node() -> NodeView {
    let parse = |text: &str| text.parse::<IpAddr>().expect("address");
    NodeView::new(
        Place { node: "node-1".into(), zone: Some("a".into()) },
        vec![parse("192.168.49.2"), parse("fd00:c0a8:31::2")],
        ["10.244.0.0/16", "fd00:10:244::/56"].map(|cidr| cidr.parse().expect("cidr")).to_vec(),
        ["10.96.0.0/12", "fd00:10:96::/112"].map(|cidr| cidr.parse().expect("cidr")).to_vec(),
    )
}

/// The API objects of lines, and the node.
pub struct Objects {
    pub services: Vec<Value>,
    pub slices: Vec<Value>,
    pub node: NodeView,
}

impl Objects {
    pub fn parse<S: AsRef<str>>(lines: &[S]) -> Self {
        let mut services = Vec::new();
        let mut slices: BTreeMap<String, Value> = BTreeMap::new();
        let mut protocols: BTreeMap<String, String> = BTreeMap::new();
        let mut node = node();
        for line in lines.iter().map(AsRef::as_ref) {
            let words: Vec<&str> = line.split_whitespace().collect();
            match words[..] {
                ["service", name, addresses, ports, ref options @ ..] => {
                    let service = service(name, addresses, ports, options);
                    for port in service["spec"]["ports"].as_array().expect("ports") {
                        let key = match port["name"].as_str() {
                            Some(port) => format!("{name}:{port}"),
                            None => name.to_owned(),
                        };
                        protocols.insert(key, port["protocol"].as_str().expect("protocol").to_owned());
                    }
                    services.push(service);
                }
                ["externalName", name, target] => services.push(json!({
                    "metadata": {"namespace": "default", "name": name},
                    "spec": {"type": "ExternalName", "externalName": target, "ports": [{"port": 80, "protocol": "TCP"}]},
                })),
                ["endpoint", key, address, node, ref options @ ..] => {
                    let address: SocketAddr = address.parse().expect("an endpoint's address");
                    let family = if address.is_ipv6() { "IPv6" } else { "IPv4" };
                    let (name, port_name) = key.split_once(':').unwrap_or((key, ""));
                    let part = options.iter().find_map(|option| option.strip_prefix("slice=")).unwrap_or_default();
                    let protocol = options.iter().find_map(|option| option.strip_prefix("over="));
                    let protocol = protocol.unwrap_or_else(|| &protocols[key]);
                    let slice_name = format!("{name}{port_name}-{family}-{}{part}", address.port());
                    let slice = slices.entry(slice_name.clone()).or_insert_with(|| {
                        let port = json!({"name": port_name, "port": address.port(), "protocol": protocol});
                        slice(name, &slice_name, family, port)
                    });
                    slice["endpoints"].as_array_mut().expect("a list").push(endpoint(address.ip(), node, options));
                }
                ["fqdn", name, host, port] => {
                    let port = json!({"port": port.parse::<u16>().expect("port"), "protocol": "TCP"});
                    let mut slice = slice(name, &format!("{name}-FQDN"), "FQDN", port);
                    slice["endpoints"] = json!([{"addresses": [host]}]);
                    slices.insert(format!("{name}-FQDN"), slice);
                }
                ["node", ref options @ ..] => options.iter().for_each(|option| change_node(&mut node, option)),
                _ => panic!("not an object: {line}"),
            }
        }
        Objects { services, slices: slices.into_values().collect(), node }
    }

    pub fn table(&self) -> ServiceTable {
        let mut table = ServiceTable::new();
        self.apply(&mut table);
        table.set_synced();
        table
    }

    /// Makes the table's objects these, and nothing else.
    pub fn apply(&self, table: &mut ServiceTable) -> Vec<Changes> {
        let names = |objects: &[Value]| -> Vec<String> {
            objects.iter().map(|object| object["metadata"]["name"].as_str().expect("a name").to_owned()).collect()
        };
        let (services, slices) = (names(&self.services), names(&self.slices));
        let mut changes = vec![
            table.retain_services(|_, name| services.iter().any(|kept| kept == name)),
            table.retain_slices(|_, name| slices.iter().any(|kept| kept == name)),
        ];
        for service in &self.services {
            changes.push(table.upsert_service(service.to_string().as_bytes()).expect("a valid Service"));
        }
        for slice in &self.slices {
            changes.push(table.upsert_slice(slice.to_string().as_bytes()).expect("a valid EndpointSlice"));
        }
        changes
    }
}

fn change_node(node: &mut NodeView, option: &str) {
    let addresses = |value: &str| value.split(',').map(|text| text.parse().expect("address")).collect();
    match option.split_once('=') {
        None if option == "masqueradeAll" => node.masquerade_all = true,
        Some(("nodePortAddresses", value)) => node.node_port_addresses = Some(addresses(value)),
        Some(("addresses", value)) => node.addresses = addresses(value),
        Some(("zone", zone)) => node.place.zone = Some(zone.into()),
        Some(("ejected", endpoint)) => {
            let (address, protocol) = endpoint.split_once('/').expect("10.244.0.5:80/TCP");
            let protocol = Protocol::parse(protocol).expect("protocol");
            node.ejected.insert((address.parse().expect("address"), protocol));
        }
        _ => panic!("no such option of the node: {option}"),
    }
}

fn service(name: &str, addresses: &str, ports: &str, options: &[&str]) -> Value {
    let addresses: Vec<&str> = addresses.split(',').collect();
    let port = |text: &str| {
        let (name, port) = text.split_once('=').map_or((None, text), |(name, port)| (Some(name), port));
        let (number, protocol) = port.split_once('/').expect("80/TCP");
        let mut port = json!({"port": number.parse::<u16>().expect("port"), "protocol": protocol});
        if let Some(name) = name {
            port["name"] = json!(name);
        }
        port
    };
    let ports: Vec<Value> = ports.split(',').map(port).collect();
    let mut object = json!({
        "metadata": {"namespace": "default", "name": name},
        "spec": {"type": "NodePort", "clusterIP": addresses[0], "clusterIPs": addresses, "ports": ports},
    });
    for option in options {
        let (key, value) = option.split_once('=').expect("key=value");
        let list = || value.split(',').collect::<Vec<_>>();
        let ports = |object: &mut Value, field: &str, values: Vec<Value>| {
            for (index, value) in values.into_iter().enumerate() {
                object["spec"]["ports"][index][field] = value;
            }
        };
        match key {
            "nodePort" => {
                let numbers = list().into_iter().map(|text| json!(text.parse::<u16>().expect("port")));
                ports(&mut object, "nodePort", numbers.collect());
            }
            "appProtocol" => ports(&mut object, "appProtocol", vec![json!(value)]),
            "external" => object["spec"]["externalTrafficPolicy"] = json!(value),
            "internal" => object["spec"]["internalTrafficPolicy"] = json!(value),
            "externalIPs" => object["spec"]["externalIPs"] = json!(list()),
            "affinity" => {
                object["spec"]["sessionAffinity"] = json!("ClientIP");
                let seconds = value.parse::<u32>().expect("seconds");
                object["spec"]["sessionAffinityConfig"] = json!({"clientIP": {"timeoutSeconds": seconds}});
            }
            "balancer" | "proxied" => {
                object["spec"]["type"] = json!("LoadBalancer");
                let mode = if key == "proxied" { "Proxy" } else { "VIP" };
                let ingress: Vec<Value> = list().iter().map(|ip| json!({"ip": ip, "ipMode": mode})).collect();
                object["status"]["loadBalancer"]["ingress"] = json!(ingress);
            }
            "sources" => object["spec"]["loadBalancerSourceRanges"] = json!(list()),
            "otherProxy" => object["metadata"]["labels"] = json!({"service.kubernetes.io/service-proxy-name": value}),
            "selection" => object["metadata"]["annotations"] = json!({Selection::ANNOTATION: value}),
            "dsr" => object["metadata"]["annotations"] = json!({DSR_ANNOTATION: value}),
            "class" => object["spec"]["loadBalancerClass"] = json!(value),
            "type" => object["spec"]["type"] = json!(value),
            other => panic!("no such option: {other}"),
        }
    }
    object
}

fn slice(service: &str, name: &str, family: &str, port: Value) -> Value {
    json!({"metadata": {"namespace": "default", "name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": family, "ports": [port], "endpoints": []})
}

fn endpoint(address: IpAddr, node: &str, options: &[&str]) -> Value {
    let mut endpoint = json!({"addresses": [address.to_string()], "nodeName": node, "conditions": {}});
    for option in options {
        match option.split_once('=') {
            None if *option == "notReady" => endpoint["conditions"] = json!({"ready": false, "serving": false}),
            None if *option == "terminating" => {
                endpoint["conditions"] = json!({"ready": false, "serving": true, "terminating": true});
            }
            None if *option == "dying" => {
                endpoint["conditions"] = json!({"ready": false, "serving": false, "terminating": true});
            }
            // As publishNotReadyAddresses makes an endpoint that goes away.
            None if *option == "published" => {
                endpoint["conditions"] = json!({"ready": true, "serving": false, "terminating": true});
            }
            None if *option == "unconditional" => drop(endpoint.as_object_mut().expect("a map").remove("conditions")),
            None if *option == "nowhere" => drop(endpoint.as_object_mut().expect("a map").remove("nodeName")),
            Some(("and", address)) => {
                endpoint["addresses"].as_array_mut().expect("a list").push(json!(address));
            }
            Some(("forZone", zone)) => endpoint["hints"]["forZones"] = json!([{"name": zone}]),
            Some(("forNode", node)) => endpoint["hints"]["forNodes"] = json!([{"name": node}]),
            Some(("slice" | "over", _)) => {}
            _ => panic!("no such option: {option}"),
        }
    }
    endpoint
}
