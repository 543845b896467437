//! How a machine becomes a node of a cluster: whom it trusts, the certificates it asks for, and how they stay fresh.
//!
//! A bootstrap token buys one thing, the node's client certificate; with that the node asks for everything else: its
//! serving certificate, renewals, and short tokens for the components that run beside the kubelet.
#![allow(clippy::disallowed_methods, reason = "certificates live by the wall clock, and this is the edge")]

mod keep;
mod tokens;
mod trust;

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail, ensure};
use api::ObjectExt;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use reconcile::{Api, ApiError, Change, Scope, watch};
use serde::Deserialize;
use serde_json::{Value, json};
use tracing::{info, warn};

use crate::kubeconfig::Credentials;
use crate::pki::{self, CertifiedKey, San};
use crate::signer::{KUBELET_CLIENT, KUBELET_SERVING, REQUESTS, RequestStatus};

pub use tokens::component_client;
pub use trust::Trust;
use trust::{discover, hash_of};

/// How long a server may be away before a request that a start depends on is given up.
const SERVER_AWAY: Duration = Duration::from_secs(120);
/// How long a request may wait for a person.
const APPROVAL: Duration = Duration::from_secs(15 * 60);

/// What a node is known by.
#[derive(Clone)]
pub struct NodeIdentity {
    pub node: String,
    pub client_cert_pem: String,
    pub client_key_pem: String,
    pub ca_pem: String,
    /// At first for the node's name only.
    pub serving: CertifiedKey,
    addresses: Vec<IpAddr>,
    dir: PathBuf,
}

/// The files of an identity; a certificate and its key share one, so that they change together.
struct Files {
    ca: PathBuf,
    client: PathBuf,
    serving: PathBuf,
}

impl Files {
    fn of(dir: &Path) -> Files {
        Files {
            ca: dir.join("ca.crt"),
            client: dir.join("kubelet-client.pem"),
            serving: dir.join("kubelet-serving.pem"),
        }
    }
}

/// Gives this machine its identity as `node`: the one kept in `dir` while it is good, else a new one.
pub async fn join(
    server_url: &str,
    trust: Trust,
    token: &str,
    node: &str,
    addresses: &[IpAddr],
    dir: &Path,
) -> anyhow::Result<NodeIdentity> {
    let trust = trust.checked()?;
    pki::private_directory(dir)?;
    let files = Files::of(dir);
    let now = SystemTime::now();
    let stored_ca = pki::read(&files.ca)?;
    let ca_pem = match (&trust, &stored_ca) {
        (Trust::Pem(pem), _) => pem.clone(),
        (Trust::Hash(hash), Some(pem)) if hash_of(pem).as_ref() == Some(hash) => pem.clone(),
        (Trust::Hash(hash), _) => discover(server_url, hash).await?,
    };
    // Certificates of another cluster, or of this one before its authority was replaced, are worth nothing.
    let same_cluster = stored_ca.as_ref() == Some(&ca_pem);
    // A server and an agent may share a directory; what the server signs with must not be lost to another cluster's authority.
    ensure!(
        same_cluster || !dir.join("ca.key").exists(),
        "{} holds the authority of another cluster's server; choose another --data-dir for this node",
        dir.display()
    );
    let kept = |path: &Path| if same_cluster { load(path) } else { None };
    if !same_cluster {
        pki::write_private(&files.ca, ca_pem.as_bytes())?;
    }
    let held = kept(&files.client).filter(|held| is_of(held, node) && is_valid(held, now));
    let client = match held {
        Some(held) if held.is_fresh(now) => held,
        held => {
            let renewed = match held {
                Some(old) => {
                    let asker = connect(server_url, &ca_pem, &user(&old))?;
                    let asked = obtain(&asker, node, KUBELET_CLIENT, &[]).await;
                    asked.inspect_err(|error| warn!(%error, "the node's own certificate did not buy a new one")).ok()
                }
                None => None,
            };
            let new = match renewed {
                Some(new) => new,
                None => {
                    let asker = connect(server_url, &ca_pem, &Credentials::Token(token.to_string()))?;
                    obtain(&asker, node, KUBELET_CLIENT, &[]).await.context("join with the bootstrap token")?
                }
            };
            save(&files.client, &new)?;
            new
        }
    };
    let serving = match kept(&files.serving).filter(|kept| is_of(kept, node) && kept.is_fresh(now)) {
        Some(kept) => kept,
        None => {
            // The name is the node's from the first day; addresses follow when the Node object has them.
            let asker = connect(server_url, &ca_pem, &user(&client))?;
            let new = obtain(&asker, node, KUBELET_SERVING, &[San::Name(node.to_string())]).await?;
            save(&files.serving, &new)?;
            new
        }
    };
    Ok(NodeIdentity {
        node: node.to_string(),
        client_cert_pem: client.chain_pem(),
        client_key_pem: client.key_pem(),
        ca_pem,
        serving,
        addresses: addresses.to_vec(),
        dir: dir.to_path_buf(),
    })
}

impl NodeIdentity {
    /// A client with the node's certificate as it is now.
    pub fn client(&self, server_url: &str) -> anyhow::Result<kube::Client> {
        let user =
            Credentials::Certificate { cert_pem: self.client_cert_pem.clone(), key_pem: self.client_key_pem.clone() };
        connect(server_url, &self.ca_pem, &user)
    }
}

fn user(pair: &CertifiedKey) -> Credentials {
    Credentials::Certificate { cert_pem: pair.chain_pem(), key_pem: pair.key_pem() }
}

/// A client of the API server.
fn connect(server_url: &str, ca_pem: &str, who: &Credentials) -> anyhow::Result<kube::Client> {
    connect_with(server_url, ca_pem, &who.user())
}

fn connect_with(server_url: &str, ca_pem: &str, user: &Value) -> anyhow::Result<kube::Client> {
    let mut config = kube::Config::new(parse_url(server_url)?);
    config.root_cert = Some(pki::certificates(ca_pem.as_bytes())?.iter().map(|c| c.to_vec()).collect());
    config.auth_info = serde_json::from_value(user.clone()).context("prepare credentials")?;
    kube::Client::try_from(config).with_context(|| format!("prepare a client of {server_url}"))
}

fn parse_url(server_url: &str) -> anyhow::Result<http::Uri> {
    let url: http::Uri = server_url.parse().with_context(|| format!("{server_url:?} is not a URL"))?;
    ensure!(
        url.scheme_str() == Some("https") && url.host().is_some(),
        "{server_url:?} is not the URL of a server, such as https://192.168.49.1:6443"
    );
    Ok(url)
}

/// Asks for a certificate and waits until it is there.
async fn obtain(client: &kube::Client, node: &str, signer: &str, sans: &[San]) -> anyhow::Result<CertifiedKey> {
    let (key, request) = pki::request(&format!("system:node:{node}"), "system:nodes", sans)?;
    let usage = if signer == KUBELET_SERVING { "server auth" } else { "client auth" };
    let object = json!({
        "apiVersion": REQUESTS.api_version(), "kind": REQUESTS.kind,
        "metadata": {"generateName": "node-csr-"},
        "spec": {"request": BASE64.encode(request), "signerName": signer, "usages": ["digital signature", usage]},
    });
    let created = create(&Api::new(client, &REQUESTS), &object).await?;
    let name = created.name();
    let late = || {
        format!(
            "certificate signing request {name} is not answered; look at it with `kubectl get csr {name}` and `kubectl certificate approve {name}`"
        )
    };
    let pem = tokio::time::timeout(APPROVAL, issued(client, name)).await.ok().with_context(late)??;
    CertifiedKey::from_pem(&pem, key.as_bytes()).context("the server's certificate cannot be used")
}

/// Creates the object, waiting for a server that is not up yet.
async fn create(requests: &Api, object: &Value) -> anyhow::Result<Value> {
    let deadline = tokio::time::Instant::now() + SERVER_AWAY;
    let mut pause = Duration::from_millis(50);
    loop {
        match requests.create("", object).await {
            Err(ApiError::Transport(error)) if tokio::time::Instant::now() < deadline => {
                info!(error, "the server does not answer yet");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(5));
            }
            Err(ApiError::Status(status)) if status.code == 401 => {
                bail!("the server does not take this token ({status}); a new one is printed by `fairlead server`")
            }
            other => return other.context("ask for a certificate"),
        }
    }
}

#[derive(Deserialize)]
struct Waiting {
    #[serde(default)]
    status: RequestStatus,
}

/// The certificate of a request, once there is one.
async fn issued(client: &kube::Client, name: &str) -> anyhow::Result<Vec<u8>> {
    let mut changes = watch::<Waiting>(client, &REQUESTS, Scope::fields(format!("metadata.name={name}")));
    while let Some(change) = changes.recv().await {
        let request = match change {
            Change::Reset(mut all) => match all.pop() {
                Some(request) => request,
                // Not in the server's cache yet.
                None => continue,
            },
            Change::Apply(request) => request,
            Change::Delete(_) => bail!("certificate signing request {name} was deleted before it was signed"),
        };
        if let Some(refusal) = request.status.refusal() {
            bail!(
                "certificate signing request {name} was refused: {} {}: {}",
                refusal.r#type,
                refusal.reason,
                refusal.message
            );
        }
        if !request.status.certificate.is_empty() {
            return BASE64.decode(&request.status.certificate).context("the certificate is not base64");
        }
    }
    bail!("the watch for certificate signing request {name} ended")
}

fn load(path: &Path) -> Option<CertifiedKey> {
    let read = pki::read(path)
        .and_then(|text| text.map(|text| CertifiedKey::from_pem(text.as_bytes(), text.as_bytes())).transpose());
    match read {
        Ok(found) => found,
        Err(error) => {
            warn!(path = %path.display(), error = format!("{error:#}"), "a stored certificate is not usable and will be replaced");
            None
        }
    }
}

fn save(path: &Path, pair: &CertifiedKey) -> anyhow::Result<()> {
    pki::write_private(path, format!("{}{}", pair.key_pem(), pair.chain_pem()).as_bytes())
}

fn is_of(pair: &CertifiedKey, node: &str) -> bool {
    let identity = pair.chain.first().and_then(|leaf| apiserver::auth::authenticate::from_certificate(leaf));
    identity.is_some_and(|identity| identity.node() == Some(node))
}

fn is_valid(pair: &CertifiedKey, now: SystemTime) -> bool {
    pair.chain.first().and_then(|leaf| pki::validity(leaf)).is_some_and(|(from, until)| from <= now && now < until)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::Pki;
    use crate::pki::tests::Scratch;

    #[test]
    fn an_identity_is_stored_whole_and_read_for_its_node_only() {
        let scratch = Scratch::new();
        let pki = Pki::open_or_create(&scratch.0).expect("an authority");
        let pair = pki.kubelet_certificate("node-1", &[]).expect("a pair");
        let path = scratch.0.join("pair.pem");
        save(&path, &pair).expect("saved");
        let read = load(&path).expect("loaded");
        assert_eq!(read.chain, pair.chain);
        assert!(is_of(&read, "node-1") && !is_of(&read, "node-2"));
        assert!(is_valid(&read, SystemTime::now()));
        assert!(load(&scratch.0.join("none.pem")).is_none());
    }

    #[tokio::test]
    async fn a_server_keeps_its_authority_when_an_agent_of_another_cluster_is_given_its_directory() {
        let (scratch, elsewhere) = (Scratch::new(), Scratch::new());
        let pki = Pki::open_or_create(&scratch.0).expect("an authority");
        let other = Pki::open_or_create(&elsewhere.0).expect("another");
        let trust = Trust::Pem(other.ca_pem().to_owned());
        let joined = join("https://127.0.0.1:1", trust, "a.b", "node-1", &[], &scratch.0.join("pki")).await;
        let error = joined.err().expect("it is refused").to_string();
        assert!(error.contains("choose another --data-dir"), "{error}");
        assert_eq!(Pki::open_or_create(&scratch.0).expect("the same authority").ca_pem(), pki.ca_pem());
    }
}
