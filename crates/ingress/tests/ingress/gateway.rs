//! Plays the cases of Gateway API: objects in, and what the ports of Gateways do, and what is said of each object.
//!
//! As the route cases, with questions to a port: `GET GATEWAY:PORT URL [headers] -> answer`, `TLS GATEWAY:PORT NAME -> answer`,
//! `TCP GATEWAY:PORT -> answer`, `UDP GATEWAY:PORT -> answer`; and with lines of status: `KIND NAME TYPE STATUS REASON`, with
//! `listener NAME` or `of PARENT` behind the name, `attached COUNT`, or `nothing` where nothing is to be said. `Address GATEWAY IP`
//! is the address of its Service.

use std::collections::HashMap;
use std::sync::{Arc, RwLock};

use api::object::Key;
use ingress::gateway::{
    CONTROLLER, CaState, Carries, GatewayCompiler, GatewayObject, ObjectKind, PortKey, PortTable, RouteType, StatusOf,
    StreamRoute, TlsWay, Transport,
};
use ingress::{Action, Ask, HostMap, LoadBalancerIngress, RouteTable};
use serde::de::DeserializeOwned;
use serde_json::Value;
use services::ServiceTable;

use crate::routes::{asked, object, parse, say, secret};

pub const FILES: &[(&str, &str)] = &[
    ("gateway.txt", include_str!("cases/gateway.txt")),
    ("gateway-attach.txt", include_str!("cases/gateway-attach.txt")),
    ("gateway-http.txt", include_str!("cases/gateway-http.txt")),
    ("gateway-more.txt", include_str!("cases/gateway-more.txt")),
];

struct World {
    outcome: HashMap<PortKey, Arc<PortTable>>,
    statuses: Vec<StatusOf>,
}

fn read<T: DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).expect("an object of its kind")
}

pub fn gateway_object(kind: &str, object: Value) -> Option<GatewayObject> {
    Some(match kind {
        "GatewayClass" => GatewayObject::Class(read(object)),
        "Gateway" => GatewayObject::Gateway(Box::new(read(object))),
        "ListenerSet" => GatewayObject::ListenerSet(read(object)),
        "HTTPRoute" => GatewayObject::Route(RouteType::Http, read(object)),
        "GRPCRoute" => GatewayObject::Route(RouteType::Grpc, read(object)),
        "TLSRoute" => GatewayObject::Route(RouteType::Tls, read(object)),
        "TCPRoute" => GatewayObject::Route(RouteType::Tcp, read(object)),
        "UDPRoute" => GatewayObject::Route(RouteType::Udp, read(object)),
        "ReferenceGrant" => GatewayObject::Grant(read(object)),
        "BackendTLSPolicy" => GatewayObject::Policy(read(object)),
        "Namespace" => GatewayObject::Namespace(read(object)),
        _ => return None,
    })
}

fn key(text: &str) -> Key {
    let (namespace, name) = text.split_once('/').expect("a namespace and a name");
    Key::new(namespace, name)
}

/// With the objects all at once, or one after the other with everything compiled in between, the Services last.
fn world(lines: &[&String], is_stepwise: bool) -> World {
    let mut table = ServiceTable::new();
    let (mut secrets, mut authorities, mut addresses) = (HashMap::new(), HashMap::new(), Vec::new());
    let mut rest = Vec::new();
    for line in lines {
        let (kind, words) = line.split_once(' ').expect("a kind");
        match kind {
            "Secret" => {
                let (name, what) = words.split_once(' ').expect("a Secret and what is in it");
                secrets.insert(key(name), secret(what).0);
            }
            "ConfigMap" => {
                let (name, what) = words.split_once(' ').expect("a ConfigMap and what is in it");
                let made = rcgen::KeyPair::generate().expect("a key");
                let params = rcgen::CertificateParams::new(vec!["ca".to_owned()]).expect("a name");
                let pem = params.self_signed(&made).expect("a certificate").pem();
                let data = match what {
                    "ca" => HashMap::from([("ca.crt".to_owned(), pem)]),
                    other => HashMap::from([("ca.crt".to_owned(), other.to_owned())]),
                };
                authorities.insert(key(name), CaState::of(Some(&data)));
            }
            "Address" => {
                let (name, ip) = words.split_once(' ').expect("a Gateway and an address");
                addresses.push((key(name), ip.to_owned()));
            }
            "Service" => {
                let mut object = object(line);
                if object.pointer("/spec/type").is_none() {
                    object["spec"]["clusterIPs"] = serde_json::json!(["10.96.0.9"]);
                }
                table.upsert_service(object.to_string().as_bytes()).expect("a Service");
            }
            "EndpointSlice" => drop(table.upsert_slice(object(line).to_string().as_bytes()).expect("a slice")),
            kind => {
                rest.push(gateway_object(kind, object(line)).unwrap_or_else(|| panic!("{kind} is no kind of a case")))
            }
        }
    }
    let names: Vec<(String, String)> =
        table.services().map(|service| (service.namespace.to_string(), service.name.to_string())).collect();
    let held = Arc::new(RwLock::new(if is_stepwise { ServiceTable::new() } else { std::mem::take(&mut table) }));
    let mut compiler = GatewayCompiler::new(CONTROLLER, held.clone());
    let mut outcome = None;
    for object in rest {
        compiler.set(object);
        if is_stepwise {
            outcome = compiler.compile().or(outcome);
            compiler.unwritten("2026-01-01T00:00:00Z");
        }
    }
    if is_stepwise {
        *held.write().expect("unpoisoned") = table;
        names.iter().for_each(|(namespace, name)| compiler.service_changed(namespace, name));
    }
    for (gateway, ip) in addresses {
        compiler.set_addresses(&gateway, Some(vec![LoadBalancerIngress { ip, hostname: String::new() }]));
    }
    let mut outcome = compiler.compile().or(outcome).expect("something changed");
    let (wanted, wanted_authorities) = compiler.wanted();
    let (wanted, wanted_authorities) = (wanted.clone(), wanted_authorities.clone());
    for key in wanted {
        let state = secrets.remove(&key).unwrap_or(ingress::SecretState::Missing);
        compiler.set_secret(&key, state);
    }
    for key in wanted_authorities {
        compiler.set_authority(&key, authorities.remove(&key).unwrap_or(CaState::Missing));
    }
    if let Some(after) = compiler.compile() {
        outcome = after;
    }
    assert!(compiler.compile().is_none(), "nothing has changed since");
    World { outcome: outcome.ports.into_iter().collect(), statuses: compiler.unwritten("2026-01-01T00:00:00Z") }
}

fn stream(route: &StreamRoute) -> String {
    let all = route.backends.list().iter().map(|one| {
        let endpoints: Vec<String> = one.upstream.targets().endpoints.iter().map(|e| e.address.to_string()).collect();
        let share = if route.backends.list().len() > 1 { format!("{}*", one.weight) } else { String::new() };
        let answer = if one.instead.is_some() { "refused".to_owned() } else { endpoints.join(",") };
        format!("{share}{} {answer}", one.upstream.key)
    });
    all.collect::<Vec<_>>().join(" + ")
}

fn http(hosts: &HostMap<Arc<RouteTable>>, ask: &Ask<'_>) -> String {
    let route = hosts.find(ask.host).and_then(|table| table.find(ask));
    route.map_or("404".to_owned(), |route| {
        let mut text = say(route);
        if let Action::Redirect(redirect) = &route.action {
            let path = redirect.path.as_ref().map(|path| format!(" {path:?}")).unwrap_or_default();
            let (scheme, port) = (redirect.scheme.unwrap_or_default(), redirect.port.unwrap_or_default());
            text.push_str(&format!(" {scheme} {port}{path}"));
        }
        if let Some(limit) = route.policy.request_timeout {
            text.push_str(&format!(" within {limit:?}"));
        }
        text
    })
}

fn is_count(held: &Value, wanted: &str) -> bool {
    held.as_u64().is_some_and(|held| wanted.parse() == Ok(held))
}

impl World {
    fn port(&self, place: &str, transport: Transport) -> Option<&Arc<PortTable>> {
        let (gateway, port) = place.split_once(':').expect("a Gateway and a port");
        self.outcome.get(&PortKey { gateway: key(gateway), port: port.parse().expect("a port"), transport })
    }

    fn answer(&self, ask: &str) -> String {
        let (verb, rest) = ask.split_once(' ').expect("a question");
        let (place, rest) = rest.split_once(' ').unwrap_or((rest, ""));
        let transport = if verb == "UDP" { Transport::Udp } else { Transport::Tcp };
        let Some(table) = self.port(place, transport) else { return "closed".to_owned() };
        match (verb, &table.carries) {
            ("TCP", Carries::Tcp(route)) | ("UDP", Carries::Udp(route)) => {
                route.as_ref().map_or("nothing".to_owned(), |route| stream(route))
            }
            ("TLS", Carries::Tls(tls)) => match tls.ways.find(rest) {
                None => "refused".to_owned(),
                Some(TlsWay::Https) => "https".to_owned(),
                Some(TlsWay::Terminate(route)) => format!("ends {}", stream(route)),
                Some(TlsWay::Passthrough(route)) => format!("passes {}", stream(route)),
            },
            ("TCP" | "UDP" | "TLS", other) => panic!("{place} carries {other:?}"),
            (method, Carries::Http(hosts)) => asked(&format!("{method} {rest}"), |ask| http(hosts, ask)),
            (method, Carries::Tls(tls)) => asked(&format!("{method} {rest}"), |ask| http(&tls.http, ask)),
            (_, other) => panic!("{place} carries {other:?}"),
        }
    }

    /// Whether a line of status is true.
    fn holds(&self, line: &str) -> Result<(), String> {
        let words: Vec<&str> = line.split(' ').collect();
        let kind = match words[0] {
            "GatewayClass" => ObjectKind::Class,
            "Gateway" => ObjectKind::Gateway,
            "ListenerSet" => ObjectKind::ListenerSet,
            "BackendTLSPolicy" => ObjectKind::Policy,
            other => ObjectKind::Route(
                *RouteType::ALL.iter().find(|kind| kind.kind() == other).unwrap_or_else(|| panic!("{other}?")),
            ),
        };
        let name = if words[1].contains('/') { key(words[1]) } else { Key::new("", words[1]) };
        let held = self.statuses.iter().find(|one| one.kind == kind && one.key == name);
        if words.get(2) == Some(&"nothing") {
            return held.map_or(Ok(()), |held| Err(format!("{line}: {}", held.patch["status"])));
        }
        let Some(held) = held else { return Err(format!("{line}: there is no status")) };
        let status = &held.patch["status"];
        let (place, rest) = match words[2] {
            "listener" => {
                let all = status["listeners"].as_array().cloned().unwrap_or_default();
                (all.into_iter().find(|one| one["name"] == words[3]), &words[4..])
            }
            "of" => {
                let list = if kind == ObjectKind::Policy { &status["ancestors"] } else { &status["parents"] };
                let reference = if kind == ObjectKind::Policy { "ancestorRef" } else { "parentRef" };
                let all = list.as_array().cloned().unwrap_or_default();
                let told = |one: &&Value| {
                    let (name, section) = (&one[reference]["name"], one[reference]["sectionName"].as_str());
                    let named = section.map_or(name.as_str().unwrap_or_default().to_owned(), |section| {
                        format!("{}#{section}", name.as_str().unwrap_or_default())
                    });
                    named == words[3]
                };
                (all.iter().find(told).cloned(), &words[4..])
            }
            _ => (Some(status.clone()), &words[2..]),
        };
        let Some(place) = place else { return Err(format!("{line}: not there in {status}")) };
        match rest {
            ["attached", count] if is_count(&place["attachedRoutes"], count) => Ok(()),
            ["kinds", kinds] => {
                let all = place["supportedKinds"].as_array().cloned().unwrap_or_default();
                let seen: Vec<&str> = all.iter().filter_map(|kind| kind["kind"].as_str()).collect();
                if seen.join(",") == *kinds { Ok(()) } else { Err(format!("{line}: {seen:?}")) }
            }
            ["address", address] if place["addresses"][0]["value"] == **address => Ok(()),
            ["sets", count] if is_count(&place["attachedListenerSets"], count) => Ok(()),
            [condition, wanted, reason] => {
                let all = place["conditions"].as_array().cloned().unwrap_or_default();
                let seen = all.iter().find(|one| one["type"] == **condition);
                let good = seen.is_some_and(|one| one["status"] == **wanted && one["reason"] == **reason);
                let timed = seen.is_none_or(|one| one["lastTransitionTime"] == "2026-01-01T00:00:00Z");
                if good && timed { Ok(()) } else { Err(format!("{line}: {place}")) }
            }
            _ => Err(format!("{line}: {place}")),
        }
    }
}

#[test]
fn every_gateway_does_what_it_says() {
    let (mut wrong, mut count) = (Vec::new(), 0);
    for (file, text) in FILES {
        let cases = parse(text);
        let (common, cases) = cases.split_first().expect("a case");
        for case in cases {
            let lines: Vec<&String> = common.objects.iter().chain(&case.objects).collect();
            for is_stepwise in [false, true] {
                let world = world(&lines, is_stepwise);
                let title = format!("{file}: {}{}", case.title, if is_stepwise { " (one by one)" } else { "" });
                for (ask, wanted) in &case.asks {
                    count += 1;
                    let seen = world.answer(ask);
                    if seen != *wanted {
                        wrong.push(format!("{title}\n  {ask}\n    wanted {wanted}\n    seen   {seen}"));
                    }
                }
                for line in &case.status {
                    count += 1;
                    if let Err(seen) = world.holds(line) {
                        wrong.push(format!("{title}\n  {seen}"));
                    }
                }
            }
        }
    }
    assert!(count > 300, "{count} questions were asked");
    assert!(wrong.is_empty(), "{} of {count} differ:\n{}", wrong.len(), wrong.join("\n"));
}

/// Status that is written is not written again, other controllers' entries stay, and times change only with what they are of.
#[test]
fn a_status_is_written_once_and_beside_those_of_others() {
    let lines = [
        "GatewayClass fairlead {controllerName: fairlead.io/gateway-controller}",
        "Gateway edge/gw {gatewayClassName: fairlead, listeners: [{name: web, port: 80, protocol: HTTP, allowedRoutes: {namespaces: {from: All}}}]}",
        "HTTPRoute shop/r {parentRefs: [{name: gw, namespace: edge}, {name: other, namespace: edge}], rules: [{backendRefs: [{name: gone, port: 80}]}]}",
    ]
    .map(str::to_owned);
    let mut compiler = GatewayCompiler::new(CONTROLLER, Arc::default());
    let mut objects: HashMap<String, Value> = HashMap::new();
    for line in &lines {
        let kind = line.split(' ').next().expect("a kind");
        let mut made = object(line);
        if kind == "HTTPRoute" {
            made["status"] = serde_json::json!({"parents": [
                {"parentRef": {"name": "other", "namespace": "edge"}, "controllerName": "elsewhere.example/x", "conditions": []}]});
        }
        objects.insert(kind.to_owned(), made.clone());
        compiler.set(gateway_object(kind, made).expect("a kind"));
    }
    compiler.compile().expect("objects");
    let mut write = |compiler: &mut GatewayCompiler, now: &str| {
        let unwritten = compiler.unwritten(now);
        for one in &unwritten {
            let kind = match one.kind {
                ObjectKind::Class => "GatewayClass",
                ObjectKind::Gateway => "Gateway",
                _ => "HTTPRoute",
            };
            let held = objects.get_mut(kind).expect("one of ours");
            held["status"] = one.patch["status"].clone();
            compiler.set(gateway_object(kind, held.clone()).expect("a kind"));
        }
        (unwritten.len(), objects.clone())
    };
    let (count, after) = write(&mut compiler, "2026-01-01T00:00:00Z");
    assert_eq!(count, 3);
    let parents = after["HTTPRoute"]["status"]["parents"].as_array().expect("parents").clone();
    assert_eq!(parents.len(), 2);
    assert_eq!(parents[0]["controllerName"], "elsewhere.example/x");
    assert!(compiler.compile().is_none(), "a status is no change");
    assert_eq!(write(&mut compiler, "2026-01-01T00:00:01Z").0, 0);
    // The address comes: only what depends on it has a new time.
    let address = LoadBalancerIngress { ip: "192.0.2.1".to_owned(), hostname: String::new() };
    compiler.set_addresses(&Key::new("edge", "gw"), Some(vec![address]));
    assert!(compiler.compile().is_none(), "an address is a matter of status only");
    let (count, after) = write(&mut compiler, "2026-01-01T00:00:02Z");
    assert_eq!(count, 1);
    let conditions = after["Gateway"]["status"]["conditions"].as_array().expect("conditions").clone();
    let times: Vec<&str> = conditions.iter().filter_map(|one| one["lastTransitionTime"].as_str()).collect();
    assert_eq!(times, ["2026-01-01T00:00:00Z", "2026-01-01T00:00:00Z", "2026-01-01T00:00:02Z"]);
}
