//! Approves and signs certificate signing requests of nodes; signs those of others once a person has approved them.
//!
//! A node may have the certificate that says it is this node, and a serving certificate for its own name and addresses.
//! Whatever else is asked waits for `kubectl certificate approve`. What can never be signed is marked Failed, with the reason.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use api::{ObjectExt, Resource, kinds, time};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use reconcile::{Api, ApiError, Change, Outcome, Queue, Scope, run_queue, watch};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;
use tracing::info;

use crate::pki::{LEAF_LIFE, Pki, Request, San};

pub const REQUESTS: Resource = Resource {
    group: "certificates.k8s.io",
    version: "v1",
    plural: "certificatesigningrequests",
    kind: "CertificateSigningRequest",
    namespaced: false,
};
/// Clients of the API, whoever they are.
const CLIENT: &str = "kubernetes.io/kube-apiserver-client";
/// The identity of a kubelet.
pub const KUBELET_CLIENT: &str = "kubernetes.io/kube-apiserver-client-kubelet";
/// What a kubelet serves with.
pub const KUBELET_SERVING: &str = "kubernetes.io/kubelet-serving";

/// Runs until `token` is cancelled.
pub async fn run(client: kube::Client, pki: Arc<Pki>, token: CancellationToken) {
    let queue = Queue::default();
    let feed = feed(client.clone(), queue.clone(), token.clone());
    let work = run_queue("signer", queue, 1, token, move |name: String| {
        let (client, pki) = (client.clone(), pki.clone());
        async move { work(&client, &pki, &name).await }
    });
    tokio::join!(feed, work);
}

#[derive(Deserialize)]
struct Named {
    name: String,
}

#[derive(Deserialize)]
struct OpenRequest {
    metadata: Named,
    #[serde(default)]
    status: RequestStatus,
}

/// What has been said about a request.
#[derive(Deserialize, Default, Debug, Clone)]
pub struct RequestStatus {
    /// Base64 of PEM.
    #[serde(default)]
    pub certificate: String,
    #[serde(default)]
    pub conditions: Vec<Condition>,
}

#[derive(Deserialize, Debug, Clone)]
pub struct Condition {
    pub r#type: String,
    #[serde(default)]
    pub reason: String,
    #[serde(default)]
    pub message: String,
}

impl RequestStatus {
    /// The condition after which there will be no certificate.
    pub fn refusal(&self) -> Option<&Condition> {
        self.conditions.iter().find(|c| matches!(c.r#type.as_str(), "Denied" | "Failed"))
    }

    fn is_open(&self) -> bool {
        self.certificate.is_empty() && self.refusal().is_none()
    }

    fn is_approved(&self) -> bool {
        self.conditions.iter().any(|c| c.r#type == "Approved")
    }
}

/// The fields of a node that say where it is.
#[derive(Deserialize)]
pub struct NodeAddresses {
    metadata: Named,
    #[serde(default)]
    status: AddressStatus,
}

#[derive(Deserialize, Default)]
struct AddressStatus {
    #[serde(default)]
    addresses: Vec<Address>,
}

#[derive(Deserialize)]
struct Address {
    address: String,
}

impl NodeAddresses {
    pub fn sans(&self) -> BTreeSet<San> {
        self.status.addresses.iter().map(|a| San::from(a.address.as_str())).collect()
    }
}

/// Queues requests that are open: when they change, and all of them when a node's addresses do.
async fn feed(client: kube::Client, queue: Queue<String>, token: CancellationToken) {
    let mut requests = watch::<OpenRequest>(&client, &REQUESTS, Scope::all());
    let mut nodes = watch::<NodeAddresses>(&client, &kinds::NODES, Scope::all());
    let mut open = BTreeSet::new();
    let mut addresses: BTreeMap<String, BTreeSet<San>> = BTreeMap::new();
    loop {
        tokio::select! {
            () = token.cancelled() => return,
            change = requests.recv() => match change {
                None => return,
                Some(Change::Reset(all)) => {
                    open = all.into_iter().filter(|r| r.status.is_open()).map(|r| r.metadata.name).collect();
                    open.iter().cloned().for_each(|name| queue.add(name));
                }
                Some(Change::Apply(request)) if request.status.is_open() => {
                    open.insert(request.metadata.name.clone());
                    queue.add(request.metadata.name);
                }
                Some(Change::Apply(request) | Change::Delete(request)) => {
                    open.remove(&request.metadata.name);
                }
            },
            change = nodes.recv() => {
                // A heartbeat is no news.
                let news = match change {
                    None => return,
                    Some(Change::Reset(all)) => {
                        addresses = all.into_iter().map(|n| (n.metadata.name.clone(), n.sans())).collect();
                        true
                    }
                    Some(Change::Apply(node)) => {
                        let sans = node.sans();
                        addresses.insert(node.metadata.name, sans.clone()).is_none_or(|before| before != sans)
                    }
                    Some(Change::Delete(node)) => {
                        addresses.remove(&node.metadata.name);
                        false
                    }
                };
                if news {
                    open.iter().cloned().for_each(|name| queue.add(name));
                }
            }
        }
    }
}

/// What the decision is about.
#[derive(Debug, Clone)]
struct Asked {
    signer: String,
    username: String,
    groups: Vec<String>,
    usages: Vec<String>,
    /// Why it cannot be read, if so.
    request: Result<Request, String>,
    is_approved: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Verdict {
    /// For a person, or for another signer.
    Leave,
    Approve(&'static str),
    Sign,
    Fail(String),
}

async fn work(client: &kube::Client, pki: &Pki, name: &str) -> Result<Outcome, ApiError> {
    let requests = Api::new(client, &REQUESTS);
    let Some(mut live) = requests.find("", name).await? else { return Ok(Outcome::Done) };
    loop {
        let status: RequestStatus = live
            .get("status")
            .map_or_else(|| Ok(RequestStatus::default()), RequestStatus::deserialize)
            .map_err(|e| ApiError::Decode(format!("certificate signing request {name}: {e}")))?;
        if !status.is_open() {
            return Ok(Outcome::Done);
        }
        let asked = read(&live, &status);
        let node = match (&asked.request, asked.signer.as_str()) {
            (Ok(request), KUBELET_SERVING) if !asked.is_approved => addresses(client, request).await?,
            _ => None,
        };
        match decide(&asked, node.as_ref(), &pki.server_names()) {
            Verdict::Leave => return Ok(Outcome::Done),
            Verdict::Approve(message) => {
                info!(request = name, user = asked.username, "approved");
                add_condition(&mut live, "Approved", "AutoApproved", message);
                let path = format!("{}/{name}/approval", REQUESTS.path(""));
                live = reconcile::api::request(client, "PUT", &path, "application/json", Some(&live)).await?;
            }
            Verdict::Sign => {
                let pem = BASE64.decode(live.text("/spec/request")).unwrap_or_default();
                let life = live.pointer("/spec/expirationSeconds").and_then(Value::as_u64);
                let life = life.map_or(LEAF_LIFE, |s| Duration::from_secs(s.max(600)).min(LEAF_LIFE));
                match pki.sign_csr(&pem, &asked.usages, life) {
                    Ok(certificate) => {
                        live["status"]["certificate"] = json!(BASE64.encode(certificate));
                        info!(request = name, user = asked.username, "signed");
                    }
                    Err(error) => add_condition(&mut live, "Failed", "SignerValidationFailure", &format!("{error:#}")),
                }
                requests.replace_status(&live).await?;
                return Ok(Outcome::Done);
            }
            Verdict::Fail(message) => {
                info!(request = name, user = asked.username, why = message, "will not be signed");
                add_condition(&mut live, "Failed", "SignerValidationFailure", &message);
                requests.replace_status(&live).await?;
                return Ok(Outcome::Done);
            }
        }
    }
}

/// The addresses of the node that a request is about; `None` while there is no such node.
async fn addresses(client: &kube::Client, request: &Request) -> Result<Option<BTreeSet<San>>, ApiError> {
    let Some(node) = request.common_name.strip_prefix("system:node:") else { return Ok(None) };
    let Some(found) = Api::new(client, &kinds::NODES).find("", node).await? else { return Ok(None) };
    let node = NodeAddresses::deserialize(found).map_err(|e| ApiError::Decode(format!("node {node}: {e}")))?;
    Ok(Some(node.sans()))
}

fn read(live: &Value, status: &RequestStatus) -> Asked {
    let words = |pointer: &str| {
        let list = live.pointer(pointer).and_then(Value::as_array);
        list.into_iter().flatten().filter_map(Value::as_str).map(str::to_string).collect()
    };
    let request = BASE64
        .decode(live.text("/spec/request"))
        .map_err(|e| format!("spec.request is not base64: {e}"))
        .and_then(|pem| Request::parse(&pem).map_err(|e| format!("{e:#}")));
    Asked {
        signer: live.text("/spec/signerName").into(),
        username: live.text("/spec/username").into(),
        groups: words("/spec/groups"),
        usages: words("/spec/usages"),
        request,
        is_approved: status.is_approved(),
    }
}

fn add_condition(live: &mut Value, kind: &str, reason: &str, message: &str) {
    let now = time::seconds(jiff::Timestamp::now());
    let condition = json!({
        "type": kind, "status": "True", "reason": reason, "message": message,
        "lastUpdateTime": now, "lastTransitionTime": now,
    });
    if !live["status"].is_object() {
        live["status"] = json!({});
    }
    match live["status"].get_mut("conditions").and_then(Value::as_array_mut) {
        Some(conditions) => conditions.push(condition),
        None => live["status"]["conditions"] = json!([condition]),
    }
}

/// What becomes of a request that has neither certificate nor refusal. `node` is what its node has for addresses; a node
/// that calls itself by one of the `reserved` names would be taken for the API server.
fn decide(asked: &Asked, node: Option<&BTreeSet<San>>, reserved: &BTreeSet<San>) -> Verdict {
    let rule: fn(&Asked, &Request) -> Result<(), String> = match asked.signer.as_str() {
        CLIENT => client_rule,
        KUBELET_CLIENT => kubelet_client_rule,
        KUBELET_SERVING => kubelet_serving_rule,
        _ => return Verdict::Leave,
    };
    let request = match &asked.request {
        Ok(request) => request,
        Err(why) => return Verdict::Fail(why.clone()),
    };
    if let Err(why) = rule(asked, request) {
        return Verdict::Fail(why);
    }
    if asked.is_approved {
        return Verdict::Sign;
    }
    let in_group = |group: &str| asked.groups.iter().any(|g| g == group);
    let is_the_node = asked.username == request.common_name && in_group("system:nodes");
    match asked.signer.as_str() {
        KUBELET_CLIENT if in_group("system:bootstrappers") => {
            Verdict::Approve("a new node joins with a bootstrap token")
        }
        KUBELET_CLIENT if is_the_node => Verdict::Approve("a node renews its own certificate"),
        KUBELET_SERVING if is_the_node => {
            let name = request.common_name.strip_prefix("system:node:").map(|n| San::Name(n.to_ascii_lowercase()));
            let own = |san: &San| Some(san) == name.as_ref() || node.is_some_and(|addresses| addresses.contains(san));
            if request.sans.iter().all(|san| own(san) && !reserved.contains(san)) {
                Verdict::Approve("a node serves under its own name and addresses")
            } else {
                Verdict::Leave
            }
        }
        _ => Verdict::Leave,
    }
}

fn client_rule(asked: &Asked, request: &Request) -> Result<(), String> {
    if request.organizations.iter().any(|o| o == "system:masters") {
        return Err("certificates for system:masters are not signed on request".into());
    }
    usages(asked, "client auth")
}

fn kubelet_client_rule(asked: &Asked, request: &Request) -> Result<(), String> {
    node_subject(request)?;
    if !request.sans.is_empty() {
        return Err("a kubelet's client certificate has no subject alternative names".into());
    }
    usages(asked, "client auth")
}

fn kubelet_serving_rule(asked: &Asked, request: &Request) -> Result<(), String> {
    node_subject(request)?;
    if request.sans.is_empty() {
        return Err("a serving certificate needs a DNS or IP subject alternative name".into());
    }
    usages(asked, "server auth")
}

fn node_subject(request: &Request) -> Result<(), String> {
    if request.organizations != ["system:nodes"] {
        return Err("the subject's organization must be exactly system:nodes".into());
    }
    match request.common_name.strip_prefix("system:node:") {
        Some(name) if !name.is_empty() => Ok(()),
        _ => Err("the subject's common name must be system:node:NAME".into()),
    }
}

/// `wanted` must be among the usages, and beside it only what keys are for.
fn usages(asked: &Asked, wanted: &str) -> Result<(), String> {
    if !asked.usages.iter().any(|u| u == wanted) {
        return Err(format!("usages must have {wanted:?}"));
    }
    match asked.usages.iter().find(|u| ![wanted, "digital signature", "key encipherment"].contains(&u.as_str())) {
        Some(other) => Err(format!("{} does not sign for usage {other:?}", asked.signer)),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki;

    fn asked(signer: &str, username: &str, group: &str, cn: &str, sans: &[&str]) -> Asked {
        let sans: Vec<San> = sans.iter().map(|s| San::from(*s)).collect();
        let (_, pem) = pki::request(cn, "system:nodes", &sans).expect("a request");
        let usage = if signer == KUBELET_SERVING { "server auth" } else { "client auth" };
        Asked {
            signer: signer.into(),
            username: username.into(),
            groups: vec![group.into(), "system:authenticated".into()],
            usages: vec!["digital signature".into(), usage.into()],
            request: Request::parse(pem.as_bytes()).map_err(|e| e.to_string()),
            is_approved: false,
        }
    }

    const NODE: &str = "system:node:node-1";

    fn reserved() -> BTreeSet<San> {
        [San::from("kubernetes.default"), San::from("127.0.0.1")].into()
    }

    fn is_approved(verdict: &Verdict) -> bool {
        matches!(verdict, Verdict::Approve(_))
    }

    #[test]
    fn a_bootstrap_token_and_the_node_itself_may_have_its_identity_and_nobody_else() {
        let bootstrap = asked(KUBELET_CLIENT, "system:bootstrap:abcdef", "system:bootstrappers", NODE, &[]);
        assert!(is_approved(&decide(&bootstrap, None, &reserved())));
        let renewal = asked(KUBELET_CLIENT, NODE, "system:nodes", NODE, &[]);
        assert!(is_approved(&decide(&renewal, None, &reserved())));
        let other = asked(KUBELET_CLIENT, "system:node:node-2", "system:nodes", NODE, &[]);
        assert_eq!(decide(&other, None, &reserved()), Verdict::Leave);
        let stranger = asked(KUBELET_CLIENT, NODE, "dev", NODE, &[]);
        assert_eq!(decide(&stranger, None, &reserved()), Verdict::Leave);
        let approved = Asked { is_approved: true, ..other };
        assert_eq!(decide(&approved, None, &reserved()), Verdict::Sign);
    }

    #[test]
    fn a_node_serves_under_its_own_name_and_addresses() {
        let addresses: BTreeSet<San> = [San::from("192.168.49.2"), San::from("node-1")].into();
        let own = asked(KUBELET_SERVING, NODE, "system:nodes", NODE, &["node-1", "192.168.49.2"]);
        assert!(is_approved(&decide(&own, Some(&addresses), &reserved())));
        assert_eq!(decide(&own, None, &reserved()), Verdict::Leave, "the node has not said its address yet");
        let by_name = asked(KUBELET_SERVING, NODE, "system:nodes", NODE, &["node-1"]);
        assert!(is_approved(&decide(&by_name, None, &reserved())));
        let foreign = asked(KUBELET_SERVING, NODE, "system:nodes", NODE, &["kubernetes.default"]);
        assert_eq!(decide(&foreign, Some(&addresses), &reserved()), Verdict::Leave);
        let posing = "system:node:kubernetes.default";
        let posing = asked(KUBELET_SERVING, posing, "system:nodes", posing, &["kubernetes.default"]);
        assert_eq!(decide(&posing, None, &reserved()), Verdict::Leave, "the API server's name");
        let bootstrap = asked(KUBELET_SERVING, "system:bootstrap:a", "system:bootstrappers", NODE, &["node-1"]);
        assert_eq!(decide(&bootstrap, Some(&addresses), &reserved()), Verdict::Leave);
    }

    #[test]
    fn what_cannot_be_signed_fails_even_when_approved() {
        let fails =
            |asked: Asked| matches!(decide(&Asked { is_approved: true, ..asked }, None, &reserved()), Verdict::Fail(_));
        assert!(fails(asked(KUBELET_CLIENT, NODE, "system:nodes", "admin", &[])), "not a node's name");
        assert!(fails(asked(KUBELET_CLIENT, NODE, "system:nodes", NODE, &["x"])), "names in an identity");
        assert!(fails(asked(KUBELET_SERVING, NODE, "system:nodes", NODE, &[])), "nothing to serve under");
        let mut wide = asked(KUBELET_CLIENT, NODE, "system:nodes", NODE, &[]);
        wide.usages.push("server auth".into());
        assert!(fails(wide), "more than was asked for");
        let (_, pem) = pki::request("jane", "system:masters", &[]).expect("a request");
        let mut master = asked(CLIENT, "jane", "dev", NODE, &[]);
        master.request = Request::parse(pem.as_bytes()).map_err(|e| e.to_string());
        assert!(fails(master), "a certificate that nobody could take back");
        let unknown = asked("example.com/own", NODE, "system:nodes", NODE, &[]);
        assert_eq!(decide(&unknown, None, &reserved()), Verdict::Leave);
    }
}
