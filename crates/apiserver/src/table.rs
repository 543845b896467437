//! Server-side tables: the columns `kubectl get` shows, per kind.

use crate::catalog::Row;
use api::{ObjectExt, Status, time};
use jiff::Timestamp;
use serde_json::{Map, Value, json};

/// A column: header, type, priority (1: only with `-o wide`), and its cell.
pub struct Column {
    name: &'static str,
    kind: &'static str,
    priority: u8,
    cell: fn(&Value, Timestamp) -> Value,
}

const fn col(name: &'static str, cell: fn(&Value, Timestamp) -> Value) -> Column {
    Column { name, kind: "string", priority: 0, cell }
}

const fn wide(name: &'static str, cell: fn(&Value, Timestamp) -> Value) -> Column {
    Column { name, kind: "string", priority: 1, cell }
}

const fn number(name: &'static str, cell: fn(&Value, Timestamp) -> Value) -> Column {
    Column { name, kind: "integer", priority: 0, cell }
}

const NAME: Column = col("Name", |o, _| json!(o.name()));
const AGE: Column = col("Age", |o, now| json!(age(o.text("/metadata/creationTimestamp"), now)));

pub const NAME_AGE: &[Column] = &[NAME, AGE];
pub const NAME_CREATED: &[Column] = &[NAME, col("Created At", |o, _| json!(o.text("/metadata/creationTimestamp")))];
pub const CONFIG_MAP: &[Column] =
    &[NAME, number("Data", |o, _| json!(count(o, "/data") + count(o, "/binaryData"))), AGE];
pub const SECRET: &[Column] =
    &[NAME, col("Type", |o, _| json!(o.text("/type"))), number("Data", |o, _| json!(count(o, "/data"))), AGE];
pub const SERVICE_ACCOUNT: &[Column] = &[NAME, number("Secrets", |o, _| json!(list(o, "/secrets").len())), AGE];
pub const NAMESPACE: &[Column] = &[NAME, col("Status", |o, _| json!(o.text("/status/phase"))), AGE];
pub const ENDPOINTS: &[Column] = &[NAME, col("Endpoints", |o, _| json!(endpoints(o))), AGE];
pub const SLICE: &[Column] = &[
    NAME,
    col("AddressType", |o, _| json!(o.text("/addressType"))),
    col("Ports", |o, _| {
        let ports: Vec<String> = list(o, "/ports").iter().map(|p| plain(p.get("port"))).collect();
        json!(or_unset(truncated(&ports)))
    }),
    col("Endpoints", |o, _| {
        let all: Vec<String> =
            list(o, "/endpoints").iter().flat_map(|e| list(e, "/addresses")).map(|a| plain(Some(a))).collect();
        json!(or_unset(truncated(&all)))
    }),
    AGE,
];
pub const EVENT: &[Column] = &[
    col("Last Seen", |o, now| {
        let last = [
            o.text("/lastTimestamp"),
            o.text("/series/lastObservedTime"),
            o.text("/eventTime"),
            o.text("/metadata/creationTimestamp"),
        ];
        json!(age(last.into_iter().find(|t| !t.is_empty()).unwrap_or(""), now))
    }),
    col("Type", |o, _| json!(o.text("/type"))),
    col("Reason", |o, _| json!(o.text("/reason"))),
    col("Object", |o, _| {
        json!(format!("{}/{}", o.text("/involvedObject/kind").to_lowercase(), o.text("/involvedObject/name")))
    }),
    wide("Subobject", |o, _| json!(o.text("/involvedObject/fieldPath"))),
    wide("Source", |o, _| {
        let (component, host) = (o.text("/source/component"), o.text("/source/host"));
        json!(if host.is_empty() { component.to_string() } else { format!("{component}, {host}") })
    }),
    col("Message", |o, _| json!(o.text("/message").trim())),
    wide("First Seen", |o, now| json!(age(o.text("/firstTimestamp"), now))),
    wide("Count", |o, _| json!(o.get("count").and_then(Value::as_i64).unwrap_or(1).to_string())),
    wide("Name", |o, _| json!(o.name())),
];
pub const NODE: &[Column] = &[
    NAME,
    col("Status", |o, _| json!(node_status(o))),
    col("Roles", |o, _| {
        let labels = o.pointer("/metadata/labels").and_then(Value::as_object);
        let roles: Vec<String> = labels
            .into_iter()
            .flatten()
            .filter_map(|(k, _)| k.strip_prefix("node-role.kubernetes.io/").map(str::to_string))
            .collect();
        json!(if roles.is_empty() { "<none>".into() } else { roles.join(",") })
    }),
    AGE,
    col("Version", |o, _| json!(o.text("/status/nodeInfo/kubeletVersion"))),
    wide("Internal-IP", |o, _| json!(node_address(o, "InternalIP"))),
    wide("External-IP", |o, _| json!(node_address(o, "ExternalIP"))),
    wide("OS-Image", |o, _| json!(or_unknown(o.text("/status/nodeInfo/osImage")))),
    wide("Kernel-Version", |o, _| json!(or_unknown(o.text("/status/nodeInfo/kernelVersion")))),
    wide("Container-Runtime", |o, _| json!(or_unknown(o.text("/status/nodeInfo/containerRuntimeVersion")))),
];
pub const POD: &[Column] = &[
    NAME,
    col("Ready", |o, _| {
        let statuses = list(o, "/status/containerStatuses");
        let ready = statuses.iter().filter(|s| s.get("ready") == Some(&json!(true))).count();
        json!(format!("{ready}/{}", list(o, "/spec/containers").len()))
    }),
    col("Status", |o, _| json!(pod_status(o))),
    col("Restarts", |o, now| json!(pod_restarts(o, now))),
    AGE,
    wide("IP", |o, _| json!(or_none(o.text("/status/podIP")))),
    wide("Node", |o, _| json!(or_none(o.text("/spec/nodeName")))),
    wide("Nominated Node", |o, _| json!(or_none(o.text("/status/nominatedNodeName")))),
    wide("Readiness Gates", |o, _| {
        let gates = list(o, "/spec/readinessGates");
        if gates.is_empty() {
            return json!("<none>");
        }
        let met = gates.iter().filter(|g| condition(o, g.text("/conditionType")) == "True").count();
        json!(format!("{met}/{}", gates.len()))
    }),
];
pub const SERVICE: &[Column] = &[
    NAME,
    col("Type", |o, _| json!(o.text("/spec/type"))),
    col("Cluster-IP", |o, _| json!(or_none(o.text("/spec/clusterIP")))),
    col("External-IP", |o, _| json!(external_ip(o))),
    col("Port(s)", |o, _| json!(service_ports(o))),
    AGE,
    wide("Selector", |o, _| json!(or_none(&pairs(o.pointer("/spec/selector"))))),
];
pub const SERVICE_CIDR: &[Column] = &[
    NAME,
    col("CIDRs", |o, _| {
        let cidrs: Vec<String> = list(o, "/spec/cidrs").iter().map(|cidr| plain(Some(cidr))).collect();
        json!(cidrs.join(","))
    }),
    AGE,
];
pub const IP_ADDRESS: &[Column] = &[
    NAME,
    col("ParentRef", |o, _| {
        let text = |field: &str| o.text(&format!("/spec/parentRef/{field}"));
        if text("resource").is_empty() {
            return json!("<none>");
        }
        let resource = [text("resource"), text("group")];
        let resource: Vec<&str> = resource.into_iter().filter(|part| !part.is_empty()).collect();
        let parts = [resource.join(".").to_lowercase(), text("namespace").into(), text("name").into()];
        let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        json!(parts.join("/"))
    }),
    AGE,
];
pub const DEPLOYMENT: &[Column] = &[
    NAME,
    col("Ready", |o, _| json!(format!("{}/{}", int(o, "/status/readyReplicas"), int(o, "/spec/replicas")))),
    number("Up-to-date", |o, _| json!(int(o, "/status/updatedReplicas"))),
    number("Available", |o, _| json!(int(o, "/status/availableReplicas"))),
    AGE,
    wide("Containers", |o, _| json!(containers(o, "/spec/template/spec/containers", "/name"))),
    wide("Images", |o, _| json!(containers(o, "/spec/template/spec/containers", "/image"))),
    wide("Selector", |o, _| json!(selector(o))),
];
pub const REPLICA_SET: &[Column] = &[
    NAME,
    number("Desired", |o, _| json!(int(o, "/spec/replicas"))),
    number("Current", |o, _| json!(int(o, "/status/replicas"))),
    number("Ready", |o, _| json!(int(o, "/status/readyReplicas"))),
    AGE,
    wide("Containers", |o, _| json!(containers(o, "/spec/template/spec/containers", "/name"))),
    wide("Images", |o, _| json!(containers(o, "/spec/template/spec/containers", "/image"))),
    wide("Selector", |o, _| json!(selector(o))),
];
pub const STATEFUL_SET: &[Column] = &[
    NAME,
    col("Ready", |o, _| json!(format!("{}/{}", int(o, "/status/readyReplicas"), int(o, "/spec/replicas")))),
    AGE,
    wide("Containers", |o, _| json!(containers(o, "/spec/template/spec/containers", "/name"))),
    wide("Images", |o, _| json!(containers(o, "/spec/template/spec/containers", "/image"))),
];
pub const DAEMON_SET: &[Column] = &[
    NAME,
    number("Desired", |o, _| json!(int(o, "/status/desiredNumberScheduled"))),
    number("Current", |o, _| json!(int(o, "/status/currentNumberScheduled"))),
    number("Ready", |o, _| json!(int(o, "/status/numberReady"))),
    number("Up-to-date", |o, _| json!(int(o, "/status/updatedNumberScheduled"))),
    number("Available", |o, _| json!(int(o, "/status/numberAvailable"))),
    col("Node Selector", |o, _| json!(or_none(&pairs(o.pointer("/spec/template/spec/nodeSelector"))))),
    AGE,
    wide("Containers", |o, _| json!(containers(o, "/spec/template/spec/containers", "/name"))),
    wide("Images", |o, _| json!(containers(o, "/spec/template/spec/containers", "/image"))),
    wide("Selector", |o, _| json!(selector(o))),
];
pub const JOB: &[Column] = &[
    NAME,
    col("Status", |o, _| {
        json!(if condition(o, "Complete") == "True" {
            "Complete"
        } else if condition(o, "Failed") == "True" {
            "Failed"
        } else if condition(o, "Suspended") == "True" {
            "Suspended"
        } else {
            "Running"
        })
    }),
    col("Completions", |o, _| {
        let done = int(o, "/status/succeeded");
        match o.pointer("/spec/completions").and_then(Value::as_i64) {
            Some(wanted) => json!(format!("{done}/{wanted}")),
            None => json!(format!("{done}/1 of {}", int(o, "/spec/parallelism"))),
        }
    }),
    col("Duration", |o, now| {
        let Some(start) = time::parse(o.text("/status/startTime")) else { return json!("") };
        let end = time::parse(o.text("/status/completionTime")).unwrap_or(now);
        json!(time::age(start, end))
    }),
    AGE,
    wide("Containers", |o, _| json!(containers(o, "/spec/template/spec/containers", "/name"))),
    wide("Images", |o, _| json!(containers(o, "/spec/template/spec/containers", "/image"))),
    wide("Selector", |o, _| json!(selector(o))),
];
pub const CRON_JOB: &[Column] = &[
    NAME,
    col("Schedule", |o, _| json!(o.text("/spec/schedule"))),
    col("Timezone", |o, _| json!(or_none(o.text("/spec/timeZone")))),
    col("Suspend", |o, _| json!(if o.pointer("/spec/suspend") == Some(&json!(true)) { "True" } else { "False" })),
    number("Active", |o, _| json!(list(o, "/status/active").len())),
    col("Last Schedule", |o, now| {
        let last = o.text("/status/lastScheduleTime");
        json!(if last.is_empty() { "<none>".into() } else { age(last, now) })
    }),
    AGE,
];
pub const INGRESS: &[Column] = &[
    NAME,
    col("Class", |o, _| json!(or_none(o.text("/spec/ingressClassName")))),
    col("Hosts", |o, _| {
        let hosts: Vec<String> =
            list(o, "/spec/rules").iter().map(|r| r.text("/host").to_string()).filter(|h| !h.is_empty()).collect();
        json!(if hosts.is_empty() { "*".into() } else { hosts.join(",") })
    }),
    col("Address", |o, _| json!(load_balancer(o).join(","))),
    col("Ports", |o, _| json!(if list(o, "/spec/tls").is_empty() { "80" } else { "80, 443" })),
    AGE,
];
// Those of custom resources are what their definitions say, which is why some have no age and lists are JSON.
pub const GATEWAY_CLASS: &[Column] = &[
    NAME,
    col("Controller", |o, _| json!(o.text("/spec/controllerName"))),
    col("Accepted", |o, _| json!(condition(o, "Accepted"))),
    AGE,
    wide("Description", |o, _| json!(o.text("/spec/description"))),
];
pub const GATEWAY: &[Column] = &[
    NAME,
    col("Class", |o, _| json!(o.text("/spec/gatewayClassName"))),
    col("Address", |o, _| {
        let values: Vec<&str> = list(o, "/status/addresses").iter().map(|address| address.text("/value")).collect();
        json!(values.join(","))
    }),
    col("Programmed", |o, _| json!(condition(o, "Programmed"))),
    AGE,
];
pub const HOSTNAMES: &[Column] = &[NAME, col("Hostnames", |o, _| json_cell(o, "/spec/hostnames")), AGE];
pub const ADDRESS_POOL: &[Column] = &[
    NAME,
    col("Auto Assign", |o, _| json_cell(o, "/spec/autoAssign")),
    col("Avoid Buggy IPs", |o, _| json_cell(o, "/spec/avoidBuggyIPs")),
    col("Addresses", |o, _| json_cell(o, "/spec/addresses")),
];
pub const ADVERTISEMENT: &[Column] = &[
    NAME,
    col("IPAddressPools", |o, _| json_cell(o, "/spec/ipAddressPools")),
    col("IPAddressPool Selectors", |o, _| json_cell(o, "/spec/ipAddressPoolSelectors")),
    col("Peers", |o, _| json_cell(o, "/spec/peers")),
    col("Interfaces", |o, _| json_cell(o, "/spec/interfaces")),
    wide("Node Selectors", |o, _| json_cell(o, "/spec/nodeSelectors")),
];
pub const BGP_PEER: &[Column] = &[
    NAME,
    col("Address", |o, _| json_cell(o, "/spec/peerAddress")),
    col("ASN", |o, _| json_cell(o, "/spec/peerASN")),
    col("BFD Profile", |o, _| json_cell(o, "/spec/bfdProfile")),
    col("Multi Hops", |o, _| json_cell(o, "/spec/ebgpMultiHop")),
];
pub const BINDING: &[Column] = &[
    NAME,
    col("Role", |o, _| json!(format!("{}/{}", o.text("/roleRef/kind"), o.text("/roleRef/name")))),
    AGE,
    wide("Users", |o, _| json!(subjects(o, "User"))),
    wide("Groups", |o, _| json!(subjects(o, "Group"))),
    wide("ServiceAccounts", |o, _| json!(subjects(o, "ServiceAccount"))),
];
pub const DISRUPTION_BUDGET: &[Column] = &[
    NAME,
    col("Min Available", |o, _| json!(or_not_available(o.pointer("/spec/minAvailable")))),
    col("Max Unavailable", |o, _| json!(or_not_available(o.pointer("/spec/maxUnavailable")))),
    number("Allowed Disruptions", |o, _| json!(int(o, "/status/disruptionsAllowed"))),
    AGE,
];
pub const PRIORITY_CLASS: &[Column] = &[
    NAME,
    number("Value", |o, _| json!(int(o, "/value"))),
    col("Global-Default", |o, _| json!((o.get("globalDefault") == Some(&json!(true))).to_string())),
    AGE,
];
pub const LEASE: &[Column] = &[NAME, col("Holder", |o, _| json!(o.text("/spec/holderIdentity"))), AGE];
pub const CSR: &[Column] = &[
    NAME,
    AGE,
    col("SignerName", |o, _| json!(o.text("/spec/signerName"))),
    col("Requestor", |o, _| json!(o.text("/spec/username"))),
    col("Condition", |o, _| {
        let mut words: Vec<&str> = list(o, "/status/conditions").iter().map(|c| c.text("/type")).collect();
        if !o.text("/status/certificate").is_empty() {
            words.push("Issued");
        }
        json!(if words.is_empty() { "Pending".into() } else { words.join(",") })
    }),
];

/// What a table's rows carry of their objects: the request's `includeObject`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Include {
    Metadata,
    Object,
    Nothing,
}

impl Include {
    /// # Errors
    /// 400 for a word that is none of Metadata, Object and None.
    pub fn parse(text: &str) -> Result<Include, Status> {
        match text {
            "" | "Metadata" => Ok(Include::Metadata),
            "Object" => Ok(Include::Object),
            "None" => Ok(Include::Nothing),
            other => Err(Status::bad_request(format!("unrecognized includeObject value: {other:?}"))),
        }
    }
}

pub fn many<'a>(row: &Row, objects: impl Iterator<Item = &'a Value>, now: Timestamp, include: Include) -> Value {
    let columns: Vec<Value> = row
        .columns
        .iter()
        .map(|c| {
            let format = if c.name == "Name" { "name" } else { "" };
            json!({"name": c.name, "type": c.kind, "format": format, "description": c.name, "priority": c.priority})
        })
        .collect();
    let rows: Vec<Value> = objects
        .map(|o| {
            let cells: Vec<Value> = row.columns.iter().map(|c| (c.cell)(o, now)).collect();
            // Nobody reads the managers in a table, and they would be most of it.
            let metadata = o.get("metadata").and_then(Value::as_object).into_iter().flatten();
            let metadata: Map<String, Value> =
                metadata.filter(|(k, _)| *k != "managedFields").map(|(k, v)| (k.clone(), v.clone())).collect();
            let object = match include {
                Include::Metadata => partial_of(Value::Object(metadata)),
                Include::Object => o.clone(),
                Include::Nothing => Value::Null,
            };
            json!({"cells": cells, "object": object})
        })
        .collect();
    json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {}, "columnDefinitions": columns, "rows": rows})
}

pub fn one(row: &Row, object: &Value, now: Timestamp, include: Include) -> Value {
    let mut table = many(row, std::iter::once(object), now, include);
    table["metadata"] = json!({"resourceVersion": object.resource_version()});
    table
}

/// The object's metadata alone.
pub fn partial(object: &Value) -> Value {
    let metadata = object.get("metadata").cloned().unwrap_or(json!({}));
    partial_of(metadata)
}

fn partial_of(metadata: Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": metadata})
}

fn age(text: &str, now: Timestamp) -> String {
    time::parse(text).map_or("<unknown>".into(), |t| time::age(t, now))
}

fn list<'a>(object: &'a Value, pointer: &str) -> &'a [Value] {
    object.pointer(pointer).and_then(Value::as_array).map_or(&[], Vec::as_slice)
}

fn count(object: &Value, pointer: &str) -> usize {
    object.pointer(pointer).and_then(Value::as_object).map_or(0, serde_json::Map::len)
}

fn int(object: &Value, pointer: &str) -> i64 {
    object.pointer(pointer).and_then(Value::as_i64).unwrap_or(0)
}

fn plain(value: Option<&Value>) -> String {
    match value {
        Some(Value::String(text)) => text.clone(),
        Some(other) => other.to_string(),
        None => String::new(),
    }
}

/// As a cell of a custom resource says it: text as it is, the rest as JSON, nothing where there is nothing.
fn json_cell(object: &Value, pointer: &str) -> Value {
    match object.pointer(pointer) {
        None => json!(""),
        Some(Value::String(text)) => json!(text),
        Some(value) => json!(value.to_string()),
    }
}

fn or_none(text: &str) -> String {
    if text.is_empty() { "<none>".into() } else { text.into() }
}

fn or_not_available(value: Option<&Value>) -> String {
    value.map_or("N/A".into(), |v| plain(Some(v)))
}

fn or_unknown(text: &str) -> String {
    if text.is_empty() { "<unknown>".into() } else { text.into() }
}

fn or_unset(text: String) -> String {
    if text.is_empty() { "<unset>".into() } else { text }
}

/// Three, and how many more.
fn truncated(items: &[String]) -> String {
    if items.len() > 3 { format!("{} + {} more...", items[..3].join(","), items.len() - 3) } else { items.join(",") }
}

fn pairs(map: Option<&Value>) -> String {
    let map = map.and_then(Value::as_object);
    let pairs: Vec<String> = map.into_iter().flatten().map(|(k, v)| format!("{k}={}", plain(Some(v)))).collect();
    pairs.join(",")
}

fn selector(object: &Value) -> String {
    let mut parts: Vec<String> = vec![pairs(object.pointer("/spec/selector/matchLabels"))];
    for expression in list(object, "/spec/selector/matchExpressions") {
        let values: Vec<String> = list(expression, "/values").iter().map(|v| plain(Some(v))).collect();
        let key = expression.text("/key");
        parts.push(match expression.text("/operator") {
            "In" => format!("{key} in ({})", values.join(",")),
            "NotIn" => format!("{key} notin ({})", values.join(",")),
            "Exists" => key.to_string(),
            _ => format!("!{key}"),
        });
    }
    parts.retain(|p| !p.is_empty());
    or_none(&parts.join(","))
}

fn containers(object: &Value, pointer: &str, field: &str) -> String {
    let all: Vec<&str> = list(object, pointer).iter().map(|c| c.text(field)).collect();
    all.join(",")
}

fn condition<'a>(object: &'a Value, kind: &str) -> &'a str {
    list(object, "/status/conditions").iter().find(|c| c.text("/type") == kind).map_or("", |c| c.text("/status"))
}

fn subjects(object: &Value, kind: &str) -> String {
    let all: Vec<String> = list(object, "/subjects")
        .iter()
        .filter(|s| s.text("/kind") == kind)
        .map(|s| {
            let namespace = s.text("/namespace");
            if namespace.is_empty() { s.text("/name").into() } else { format!("{namespace}/{}", s.text("/name")) }
        })
        .collect();
    all.join(", ")
}

fn endpoints(object: &Value) -> String {
    let mut all = Vec::new();
    for subset in list(object, "/subsets") {
        let ports = list(subset, "/ports");
        for address in list(subset, "/addresses") {
            let ip = address.text("/ip");
            let ip = if ip.contains(':') { format!("[{ip}]") } else { ip.to_string() };
            if ports.is_empty() {
                all.push(ip.clone());
            }
            for port in ports {
                all.push(format!("{ip}:{}", int(port, "/port")));
            }
        }
    }
    or_none(&truncated(&all))
}

fn node_status(object: &Value) -> String {
    let mut words = vec![match condition(object, "Ready") {
        "True" => "Ready",
        "" => "Unknown",
        _ => "NotReady",
    }];
    if object.pointer("/spec/unschedulable") == Some(&json!(true)) {
        words.push("SchedulingDisabled");
    }
    words.join(",")
}

fn node_address(object: &Value, kind: &str) -> String {
    let found = list(object, "/status/addresses").iter().find(|a| a.text("/type") == kind);
    or_none(found.map_or("", |a| a.text("/address")))
}

fn load_balancer(object: &Value) -> Vec<String> {
    let ingress = list(object, "/status/loadBalancer/ingress");
    ingress
        .iter()
        .map(|i| if i.text("/ip").is_empty() { i.text("/hostname") } else { i.text("/ip") }.to_string())
        .collect()
}

fn external_ip(object: &Value) -> String {
    let mut ips: Vec<String> = list(object, "/spec/externalIPs").iter().map(|v| plain(Some(v))).collect();
    match object.text("/spec/type") {
        "ExternalName" => return object.text("/spec/externalName").into(),
        "LoadBalancer" => {
            let mut all = load_balancer(object);
            all.append(&mut ips);
            return if all.is_empty() { "<pending>".into() } else { all.join(",") };
        }
        _ => {}
    }
    if ips.is_empty() { "<none>".into() } else { ips.join(",") }
}

fn service_ports(object: &Value) -> String {
    let all: Vec<String> = list(object, "/spec/ports")
        .iter()
        .map(|p| {
            let (port, node_port, protocol) = (int(p, "/port"), int(p, "/nodePort"), p.text("/protocol"));
            if node_port == 0 { format!("{port}/{protocol}") } else { format!("{port}:{node_port}/{protocol}") }
        })
        .collect();
    or_none(&all.join(","))
}

fn pod_restarts(object: &Value, now: Timestamp) -> String {
    let statuses = list(object, "/status/containerStatuses");
    let total: i64 = statuses.iter().map(|s| int(s, "/restartCount")).sum();
    let last = statuses.iter().filter_map(|s| time::parse(s.text("/lastState/terminated/finishedAt"))).max();
    match last {
        Some(at) if total > 0 => format!("{total} ({} ago)", time::age(at, now)),
        _ => total.to_string(),
    }
}

/// The word kubectl shows for a pod; printed as upstream's printers do.
fn pod_status(object: &Value) -> String {
    let mut reason = match object.text("/status/reason") {
        "" => object.text("/status/phase").to_string(),
        reason => reason.to_string(),
    };
    let gated = list(object, "/status/conditions")
        .iter()
        .any(|c| c.text("/type") == "PodScheduled" && c.text("/reason") == "SchedulingGated");
    if gated {
        reason = "SchedulingGated".into();
    }
    let init_containers = list(object, "/spec/initContainers");
    let mut initializing = false;
    for (i, status) in list(object, "/status/initContainerStatuses").iter().enumerate() {
        let sidecar =
            init_containers.iter().any(|c| c.name_of() == status.name_of() && c.text("/restartPolicy") == "Always");
        let terminated = status.pointer("/state/terminated");
        if terminated.is_some_and(|t| int(t, "/exitCode") == 0)
            || sidecar && status.get("started") == Some(&json!(true))
        {
            continue;
        }
        reason = if let Some(terminated) = terminated {
            match (terminated.text("/reason"), int(terminated, "/signal")) {
                ("", 0) => format!("Init:ExitCode:{}", int(terminated, "/exitCode")),
                ("", signal) => format!("Init:Signal:{signal}"),
                (text, _) => format!("Init:{text}"),
            }
        } else {
            match status.text("/state/waiting/reason") {
                "" | "PodInitializing" => format!("Init:{i}/{}", init_containers.len()),
                text => format!("Init:{text}"),
            }
        };
        initializing = true;
        break;
    }
    if !initializing || condition(object, "Initialized") == "True" {
        let mut running = false;
        for status in list(object, "/status/containerStatuses").iter().rev() {
            let (waiting, terminated) = (status.text("/state/waiting/reason"), status.pointer("/state/terminated"));
            if !waiting.is_empty() {
                reason = waiting.to_string();
            } else if let Some(terminated) = terminated {
                reason = match (terminated.text("/reason"), int(terminated, "/signal")) {
                    ("", 0) => format!("ExitCode:{}", int(terminated, "/exitCode")),
                    ("", signal) => format!("Signal:{signal}"),
                    (text, _) => text.to_string(),
                };
            } else if status.get("ready") == Some(&json!(true)) && status.pointer("/state/running").is_some() {
                running = true;
            }
        }
        if reason == "Completed" && running {
            reason = if condition(object, "Ready") == "True" { "Running" } else { "NotReady" }.into();
        }
    }
    if object.is_deleting() {
        reason = match object.text("/status/reason") {
            "NodeLost" => "Unknown".into(),
            _ if matches!(object.text("/status/phase"), "Succeeded" | "Failed") => reason,
            _ => "Terminating".into(),
        };
    }
    reason
}

trait NameOf {
    fn name_of(&self) -> &str;
}

impl NameOf for Value {
    fn name_of(&self) -> &str {
        self.text("/name")
    }
}
