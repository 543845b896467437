//! What a new cluster begins with: namespaces, roles, the accounts of our own components, and `default/kubernetes`.
//!
//! Runs at every start; what is there and right is left alone.

use crate::auth::{Identity, MASTERS};
use crate::server::ApiServer;
use api::kinds::SERVICE_CIDRS;
use api::{ObjectExt, Status};
use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Full};
use ipnet::IpNet;
use serde_json::{Value, json};
use std::net::IpAddr;
use std::time::Duration;

/// The role of one of our own components: a service account in `kube-system` (or a user) with a cluster role of its own.
#[derive(Debug, Clone)]
pub struct Component {
    pub account: String,
    pub rules: Value,
}

/// Makes the cluster's first objects true.
///
/// # Errors
/// A write is refused; says which.
pub async fn run(server: &ApiServer, components: &[Component]) -> Result<(), String> {
    let master = server.as_identity(Identity::user("system:apiserver", &[MASTERS]));
    for name in ["default", "kube-system", "kube-public", "kube-node-lease"] {
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}});
        ensure(&master, "/api/v1/namespaces", &namespace, false).await?;
    }
    let wanted: Vec<IpNet> = server.registry().allocation.service_cidrs.iter().map(IpNet::trunc).collect();
    let range = json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": "kubernetes"},
        "spec": {"cidrs": wanted},
    });
    ensure(&master, &SERVICE_CIDRS.path(""), &range, false).await?;
    let held = server.registry().read(&SERVICE_CIDRS, "", "kubernetes").map(|held| held.parse());
    if let Some(held) = held.filter(|held| held["spec"]["cidrs"] != json!(wanted)) {
        tracing::warn!(
            "cluster IPs are taken from {} as the ServiceCIDR `kubernetes` says, not from {}; to change it, add a \
             ServiceCIDR with the new ranges and delete this one",
            held["spec"]["cidrs"],
            json!(wanted)
        );
    }
    for (name, rules, groups) in roles() {
        role(
            &master,
            name,
            &rules,
            &groups.iter().map(|g| json!({"apiGroup": RBAC, "kind": "Group", "name": g})).collect::<Vec<_>>(),
        )
        .await?;
    }
    // What a proxy of another make needs, kube-proxy for one; a user of that name has it already.
    let proxy = json!({"apiGroup": RBAC, "kind": "User", "name": "system:kube-proxy"});
    role(&master, "system:node-proxier", &node_proxier(), &[proxy]).await?;
    for component in components {
        let account = json!({
            "apiVersion": "v1", "kind": "ServiceAccount",
            "metadata": {"name": component.account, "namespace": "kube-system"},
        });
        ensure(&master, "/api/v1/namespaces/kube-system/serviceaccounts", &account, false).await?;
        let subject = json!({"kind": "ServiceAccount", "name": component.account, "namespace": "kube-system"});
        role(&master, &format!("system:{}", component.account), &component.rules, &[subject]).await?;
    }
    Ok(())
}

const RBAC: &str = "rbac.authorization.k8s.io";

async fn role(server: &ApiServer, name: &str, rules: &Value, subjects: &[Value]) -> Result<(), String> {
    let meta = json!({"name": name, "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"}});
    let role = json!({"apiVersion": format!("{RBAC}/v1"), "kind": "ClusterRole", "metadata": meta, "rules": rules});
    ensure(server, &format!("/apis/{RBAC}/v1/clusterroles"), &role, true).await?;
    if subjects.is_empty() {
        return Ok(());
    }
    let binding = json!({
        "apiVersion": format!("{RBAC}/v1"), "kind": "ClusterRoleBinding", "metadata": meta,
        "roleRef": {"apiGroup": RBAC, "kind": "ClusterRole", "name": name}, "subjects": subjects,
    });
    ensure(server, &format!("/apis/{RBAC}/v1/clusterrolebindings"), &binding, true).await
}

fn rule(groups: &[&str], resources: &[&str], verbs: &[&str]) -> Value {
    json!({"apiGroups": groups, "resources": resources, "verbs": verbs})
}

const READ: &[&str] = &["get", "list", "watch"];
const WRITE: &[&str] = &["create", "delete", "deletecollection", "patch", "update"];

fn node_proxier() -> Value {
    const FOLLOW: &[&str] = &["list", "watch"];
    json!([
        rule(&[""], &["endpoints", "services"], FOLLOW),
        rule(&[""], &["nodes"], READ),
        rule(&["", "events.k8s.io"], &["events"], &["create", "patch", "update"]),
        rule(&["discovery.k8s.io"], &["endpointslices"], FOLLOW),
        rule(&["networking.k8s.io"], &["servicecidrs"], FOLLOW),
    ])
}

/// Name, rules, and the groups the role is bound to.
fn roles() -> Vec<(&'static str, Value, &'static [&'static str])> {
    let namespaced_core = &[
        "configmaps",
        "endpoints",
        "events",
        "persistentvolumeclaims",
        "pods",
        "pods/log",
        "pods/status",
        "resourcequotas",
        "serviceaccounts",
        "services",
        "services/status",
    ];
    let apps = &[
        "controllerrevisions",
        "daemonsets",
        "deployments",
        "deployments/scale",
        "replicasets",
        "replicasets/scale",
        "statefulsets",
        "statefulsets/scale",
    ];
    let view = vec![
        rule(&[""], namespaced_core, READ),
        rule(&[""], &["namespaces"], READ),
        rule(&["apps"], apps, READ),
        rule(&["batch"], &["cronjobs", "jobs"], READ),
        rule(&["networking.k8s.io"], &["ingresses"], READ),
        rule(&["policy"], &["poddisruptionbudgets"], READ),
        rule(&["discovery.k8s.io"], &["endpointslices"], READ),
    ];
    let mut edit = view.clone();
    edit.extend([
        rule(&[""], &["secrets", "pods/attach", "pods/exec", "pods/portforward"], READ),
        rule(
            &[""],
            &[
                "configmaps",
                "endpoints",
                "events",
                "persistentvolumeclaims",
                "pods",
                "pods/attach",
                "pods/exec",
                "pods/portforward",
                "pods/eviction",
                "secrets",
                "serviceaccounts",
                "services",
            ],
            WRITE,
        ),
        rule(&[""], &["serviceaccounts/token"], &["create"]),
        rule(&["apps"], apps, WRITE),
        rule(&["batch"], &["cronjobs", "jobs"], WRITE),
        rule(&["networking.k8s.io"], &["ingresses"], WRITE),
        rule(&["policy"], &["poddisruptionbudgets"], WRITE),
    ]);
    let mut admin = edit.clone();
    admin.extend([
        rule(&[RBAC], &["rolebindings", "roles"], READ),
        rule(&[RBAC], &["rolebindings", "roles"], WRITE),
        rule(&["authorization.k8s.io"], &["localsubjectaccessreviews"], &["create"]),
    ]);
    let node = json!([
        rule(&[""], &["nodes"], &["create", "get", "list", "watch", "patch", "update"]),
        rule(&[""], &["nodes/status"], &["patch", "update"]),
        rule(&[""], &["pods"], &["get", "list", "watch", "delete"]),
        rule(&[""], &["pods/status"], &["patch", "update"]),
        rule(&[""], &["pods/eviction"], &["create"]),
        rule(&[""], &["services"], READ),
        rule(&[""], &["configmaps", "secrets"], &["get"]),
        rule(&[""], &["serviceaccounts"], &["get"]),
        rule(&[""], &["serviceaccounts/token"], &["create"]),
        rule(&[""], &["events"], &["create", "patch", "update"]),
        rule(&["coordination.k8s.io"], &["leases"], &["create", "get", "patch", "update"]),
        // For the removal barrier: which proxies still send a terminating pod something.
        rule(&["coordination.k8s.io"], &["leases"], &["list", "watch"]),
        rule(&["discovery.k8s.io"], &["endpointslices"], READ),
        rule(&["certificates.k8s.io"], &["certificatesigningrequests"], &["create", "get", "list", "watch"]),
        rule(&["authentication.k8s.io"], &["tokenreviews"], &["create"]),
        rule(&["authorization.k8s.io"], &["subjectaccessreviews"], &["create"]),
    ]);
    vec![
        (
            "cluster-admin",
            json!([rule(&["*"], &["*"], &["*"]), {"nonResourceURLs": ["*"], "verbs": ["*"]}]),
            &[MASTERS],
        ),
        ("view", json!(view), &[]),
        ("edit", json!(edit), &[]),
        ("admin", json!(admin), &[]),
        (
            "system:discovery",
            json!([{"verbs": ["get"], "nonResourceURLs": ["/api", "/api/*", "/apis", "/apis/*", "/healthz", "/livez", "/openapi", "/openapi/*", "/readyz", "/version", "/version/", "/"]}]),
            &["system:authenticated"],
        ),
        (
            "system:public-info-viewer",
            json!([{"verbs": ["get"], "nonResourceURLs": ["/healthz", "/livez", "/readyz", "/version", "/version/"]}]),
            &["system:authenticated", "system:unauthenticated"],
        ),
        (
            "system:basic-user",
            json!([
                rule(&["authorization.k8s.io"], &["selfsubjectaccessreviews", "selfsubjectrulesreviews"], &["create"]),
                rule(&["authentication.k8s.io"], &["selfsubjectreviews"], &["create"]),
            ]),
            &["system:authenticated"],
        ),
        (
            "system:node-bootstrapper",
            json!([rule(
                &["certificates.k8s.io"],
                &["certificatesigningrequests"],
                &["create", "get", "list", "watch"]
            )]),
            &["system:bootstrappers"],
        ),
        ("system:node", node, &["system:nodes"]),
    ]
}

/// Where the API server is reached from inside the cluster.
#[derive(Debug, Clone)]
pub struct Advertise {
    pub addresses: Vec<IpAddr>,
    pub port: u16,
    /// The first address of the service range, per family.
    pub service_addresses: Vec<IpAddr>,
}

/// Keeps `default/kubernetes`, its Endpoints and its EndpointSlices true.
///
/// # Errors
/// A write is refused; says which.
pub async fn kubernetes_service(server: &ApiServer, advertise: &Advertise) -> Result<(), String> {
    let master = server.as_identity(Identity::user("system:apiserver", &[MASTERS]));
    let ips: Vec<String> = advertise.service_addresses.iter().map(ToString::to_string).take(1).collect();
    let families: Vec<&str> =
        advertise.service_addresses.iter().take(1).map(|ip| if ip.is_ipv4() { "IPv4" } else { "IPv6" }).collect();
    let labels = json!({"component": "apiserver", "provider": "kubernetes"});
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": labels},
        "spec": {"type": "ClusterIP", "clusterIP": ips.first(), "clusterIPs": ips, "ipFamilies": families,
            "ipFamilyPolicy": "SingleStack", "sessionAffinity": "None",
            "ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": advertise.port}]},
    });
    ensure(&master, "/api/v1/namespaces/default/services", &service, true).await?;
    let primary: Vec<&IpAddr> = advertise
        .addresses
        .iter()
        .filter(|ip| ip.is_ipv4() == advertise.service_addresses.first().is_none_or(|s| s.is_ipv4()))
        .collect();
    let addresses: Vec<Value> = primary.iter().map(|ip| json!({"ip": ip})).collect();
    let endpoints = json!({
        "apiVersion": "v1", "kind": "Endpoints",
        "metadata": {"name": "kubernetes", "namespace": "default",
            "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}},
        "subsets": [{"addresses": addresses, "ports": [{"name": "https", "port": advertise.port, "protocol": "TCP"}]}],
    });
    ensure(&master, "/api/v1/namespaces/default/endpoints", &endpoints, true).await?;
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice",
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"kubernetes.io/service-name": "kubernetes"}},
        "addressType": if primary.first().is_none_or(|ip| ip.is_ipv4()) { "IPv4" } else { "IPv6" },
        "endpoints": primary.iter().map(|ip| json!({"addresses": [ip], "conditions": {"ready": true}})).collect::<Vec<_>>(),
        "ports": [{"name": "https", "port": advertise.port, "protocol": "TCP"}],
    });
    ensure(&master, "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices", &slice, true).await
}

/// Creates an object, or, with `repair`, makes the one that is there equal in all but metadata and status.
pub async fn ensure(server: &ApiServer, collection: &str, object: &Value, repair: bool) -> Result<(), String> {
    let path = format!("{collection}/{}", object.name());
    let mut tries = 0;
    loop {
        match ensure_once(server, collection, &path, object, repair).await {
            Ok(()) => return Ok(()),
            // A store that is not there yet, and a write by another server that starts as we do.
            Err(status) if matches!(status.code, 503 | 504 | 409) && tries < TRIES => {
                tries += 1;
                tokio::time::sleep(Duration::from_millis(100) * tries).await;
            }
            Err(status) => return Err(format!("{path}: {status}")),
        }
    }
}

/// How often a first object is tried again; in all about five seconds.
const TRIES: u32 = 10;

async fn ensure_once(
    server: &ApiServer,
    collection: &str,
    path: &str,
    object: &Value,
    repair: bool,
) -> Result<(), Status> {
    // Asked first: to create what is there may fail for another reason, as its own address is taken by itself.
    let live = match send(server, "GET", path, None).await {
        Ok(live) => live,
        Err(status) if status.is_not_found() => return send(server, "POST", collection, Some(object)).await.map(drop),
        Err(status) => return Err(status),
    };
    if !repair {
        return Ok(());
    }
    let mut wanted = object.clone();
    wanted.metadata_mut().insert("resourceVersion".into(), json!(live.resource_version()));
    // An unchanged object costs no write: the update finds nothing different.
    send(server, "PUT", path, Some(&wanted)).await.map(drop)
}

async fn send(server: &ApiServer, method: &str, path: &str, object: Option<&Value>) -> Result<Value, Status> {
    let body = object.map(|o| o.to_string()).unwrap_or_default();
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("content-type", "application/json")
        .header("user-agent", "fairlead-apiserver")
        .body(Full::new(Bytes::from(body)))
        .map_err(Status::internal)?;
    let response = server.handle(request).await;
    let good = response.status().is_success();
    let bytes = response.into_body().collect().await.map_err(|e| Status::internal(e.to_string()))?.to_bytes();
    if good {
        serde_json::from_slice(&bytes).map_err(Status::internal)
    } else {
        Err(serde_json::from_slice(&bytes).unwrap_or_else(|_| Status::internal("unreadable status")))
    }
}
