//! How a machine becomes a node of a cluster: whom it trusts, the certificates it asks for, and how they stay fresh.
//!
//! A bootstrap token buys one thing, the node's client certificate; with that the node asks for everything else: its
//! serving certificate, renewals, and short tokens for the components that run beside the kubelet.
#![allow(clippy::disallowed_methods, reason = "certificates live by the wall clock, and this is the edge")]

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, bail, ensure};
use api::{ObjectExt, kinds};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use http::header::AUTHORIZATION;
use http::{HeaderValue, StatusCode};
use kube::client::Body;
use reconcile::{Api, ApiError, Change, Scope, watch};
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use serde::Deserialize;
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_rustls::TlsConnector;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::kubeconfig::Credentials;
use crate::pki::{self, CertifiedKey, Rotating, San};
use crate::signer::{KUBELET_CLIENT, KUBELET_SERVING, NodeAddresses, REQUESTS, RequestStatus};

/// How long a server may be away before a request that a start depends on is given up.
const SERVER_AWAY: Duration = Duration::from_secs(120);
/// How long a request may wait for a person.
const APPROVAL: Duration = Duration::from_secs(15 * 60);
/// The life of the tokens that the node's components use.
const TOKEN_LIFE: u64 = 3600;

/// How the server is known to be the right one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// The authority's certificate.
    Pem(String),
    /// `sha256:` and the digest of the authority's public key.
    Hash(String),
}

impl Trust {
    /// The same, known to be usable.
    fn checked(self) -> anyhow::Result<Trust> {
        match self {
            Trust::Pem(pem) => {
                pki::certificates(pem.as_bytes()).context("--ca-cert")?;
                Ok(Trust::Pem(pem))
            }
            Trust::Hash(hash) => {
                let digest = hash.strip_prefix("sha256:").unwrap_or_default();
                ensure!(
                    digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit()),
                    "--ca-hash must be sha256: and 64 hexadecimal digits, as the server prints it"
                );
                Ok(Trust::Hash(hash.to_ascii_lowercase()))
            }
        }
    }
}

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

/// What a running node uses; both follow renewals.
pub struct Kept {
    pub client: kube::Client,
    pub serving: Arc<Rotating>,
    /// Ends when the token given to `keep_renewed` is cancelled.
    pub task: JoinHandle<()>,
}

impl NodeIdentity {
    /// A client with the node's certificate as it is now.
    pub fn client(&self, server_url: &str) -> anyhow::Result<kube::Client> {
        let user =
            Credentials::Certificate { cert_pem: self.client_cert_pem.clone(), key_pem: self.client_key_pem.clone() };
        connect(server_url, &self.ca_pem, &user)
    }

    /// Renews the node's certificates at four fifths of their lives, and asks for a serving certificate with the node's
    /// addresses once the Node object has them.
    pub fn keep_renewed(&self, server_url: &str, token: CancellationToken) -> anyhow::Result<Kept> {
        let current = Arc::new(Mutex::new(self.client(server_url)?));
        let client = switching(current.clone());
        let serving = Rotating::new(&self.serving)?;
        let mut sans = vec![San::Name(self.node.clone())];
        sans.extend(self.addresses.iter().copied().map(San::from));
        let keeper = Keeper {
            node: self.node.clone(),
            server_url: server_url.to_string(),
            ca_pem: self.ca_pem.clone(),
            files: Files::of(&self.dir),
            sans,
            current,
            client: client.clone(),
            held: CertifiedKey::from_pem(self.client_cert_pem.as_bytes(), self.client_key_pem.as_bytes())?,
            serving: self.serving.clone(),
            rotating: serving.clone(),
        };
        let task = tokio::spawn(async move {
            tokio::select! {
                () = keeper.run() => {}
                () = token.cancelled() => {}
            }
        });
        Ok(Kept { client, serving, task })
    }
}

/// A client for one of the components that run beside the kubelet: with short tokens of `kube-system/ACCOUNT`, which
/// `node`, a client with the node's identity, may ask for.
pub async fn component_client(
    node: &kube::Client,
    server_url: &str,
    identity: &NodeIdentity,
    account: &str,
) -> anyhow::Result<kube::Client> {
    // No credentials of its own: who the caller is stands in the header alone.
    let plain = connect_with(server_url, &identity.ca_pem, &json!({}))?;
    let tokens = Arc::new(AccountTokens {
        accounts: Api::new(node, &kinds::SERVICE_ACCOUNTS),
        account: account.to_string(),
        held: tokio::sync::Mutex::new(None),
    });
    tokens.header().await?;
    let service = tower::service_fn(move |mut request: http::Request<Body>| {
        let (plain, tokens) = (plain.clone(), tokens.clone());
        async move {
            let header = tokens.header().await?;
            request.headers_mut().insert(AUTHORIZATION, header.clone());
            let response = plain.send(request).await?;
            if response.status() == StatusCode::UNAUTHORIZED {
                tokens.forget(&header).await;
            }
            Ok::<_, tower::BoxError>(response)
        }
    });
    Ok(kube::Client::new(service, "default"))
}

/// A client whose inner client may be replaced under it.
fn switching(current: Arc<Mutex<kube::Client>>) -> kube::Client {
    let service = tower::service_fn(move |request: http::Request<Body>| {
        let client = current.lock().unwrap_or_else(PoisonError::into_inner).clone();
        async move { client.send(request).await }
    });
    kube::Client::new(service, "default")
}

/// Owns a running node's certificates.
struct Keeper {
    node: String,
    server_url: String,
    ca_pem: String,
    files: Files,
    sans: Vec<San>,
    current: Arc<Mutex<kube::Client>>,
    client: kube::Client,
    held: CertifiedKey,
    serving: CertifiedKey,
    rotating: Arc<Rotating>,
}

impl Keeper {
    async fn run(mut self) {
        let mut nodes = None;
        loop {
            let names_all = self.names_all();
            if names_all {
                nodes = None;
            } else if nodes.is_none() {
                let scope = Scope::fields(format!("metadata.name={}", self.node));
                nodes = Some(watch::<NodeAddresses>(&self.client, &kinds::NODES, scope));
            }
            let done = tokio::select! {
                () = until(self.held.renew_at()) => self.renew_client().await,
                () = until(self.serving.renew_at()) => self.renew_serving().await,
                change = next(&mut nodes) => match change {
                    Some(node) if self.sans[1..].iter().all(|san| node.sans().contains(san)) => {
                        self.renew_serving().await
                    }
                    _ => Ok(()),
                },
            };
            if let Err(error) = done {
                warn!(error = format!("{error:#}"), "a certificate of this node could not be renewed; will try again");
                tokio::time::sleep(Duration::from_secs(60)).await;
                // The watch is begun anew, and tells the addresses again.
                nodes = None;
            }
        }
    }

    fn names_all(&self) -> bool {
        let named = self.serving.sans();
        self.sans.iter().all(|san| named.contains(san))
    }

    async fn renew_client(&mut self) -> anyhow::Result<()> {
        let new = obtain(&self.client, &self.node, KUBELET_CLIENT, &[]).await?;
        let next = connect(&self.server_url, &self.ca_pem, &user(&new))?;
        save(&self.files.client, &new)?;
        *self.current.lock().unwrap_or_else(PoisonError::into_inner) = next;
        self.held = new;
        info!("the node's client certificate is renewed");
        Ok(())
    }

    async fn renew_serving(&mut self) -> anyhow::Result<()> {
        let new = obtain(&self.client, &self.node, KUBELET_SERVING, &self.sans).await?;
        save(&self.files.serving, &new)?;
        self.rotating.replace(&new)?;
        self.serving = new;
        info!("the node's serving certificate is renewed");
        Ok(())
    }
}

async fn until(at: Option<SystemTime>) {
    match at {
        Some(at) => tokio::time::sleep(at.duration_since(SystemTime::now()).unwrap_or_default()).await,
        None => std::future::pending().await,
    }
}

/// The node's next state; never, when nobody waits for it.
async fn next(nodes: &mut Option<tokio::sync::mpsc::Receiver<Change<NodeAddresses>>>) -> Option<NodeAddresses> {
    let Some(receiver) = nodes else { return std::future::pending().await };
    match receiver.recv().await {
        Some(Change::Reset(mut all)) => all.pop(),
        Some(Change::Apply(node)) => Some(node),
        Some(Change::Delete(_)) => None,
        None => {
            *nodes = None;
            None
        }
    }
}

/// Tokens of one service account, asked for by the node.
struct AccountTokens {
    accounts: Api,
    account: String,
    held: tokio::sync::Mutex<Option<HeldToken>>,
}

struct HeldToken {
    header: HeaderValue,
    renew_at: SystemTime,
    until: SystemTime,
}

impl AccountTokens {
    /// The token to use now. One that grows old is replaced; while that fails, it is used to its end.
    async fn header(&self) -> anyhow::Result<HeaderValue> {
        let mut held = self.held.lock().await;
        let now = SystemTime::now();
        if let Some(good) = held.as_ref().filter(|h| now < h.renew_at) {
            return Ok(good.header.clone());
        }
        match self.ask(now).await {
            Ok(new) => Ok(held.insert(new).header.clone()),
            Err(error) => match held.as_mut().filter(|h| now < h.until) {
                Some(old) => {
                    warn!(account = self.account, error = format!("{error:#}"), "no new token yet");
                    old.renew_at = now + Duration::from_secs(10);
                    Ok(old.header.clone())
                }
                None => Err(error),
            },
        }
    }

    async fn ask(&self, now: SystemTime) -> anyhow::Result<HeldToken> {
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": TOKEN_LIFE},
        });
        let answer = self
            .accounts
            .post("kube-system", &self.account, "token", &request)
            .await
            .with_context(|| format!("get a token of kube-system/{}", self.account))?;
        let mut header = HeaderValue::from_str(&format!("Bearer {}", answer.text("/status/token")))
            .context("the server's token cannot stand in a header")?;
        header.set_sensitive(true);
        // By our own clock: the server's may differ.
        let life = answer.pointer("/spec/expirationSeconds").and_then(Value::as_u64).unwrap_or(TOKEN_LIFE);
        let life = Duration::from_secs(life);
        Ok(HeldToken { header, renew_at: now + life * 4 / 5, until: now + life })
    }

    /// Drops a token that the server does not take any more, unless a newer one is in its place.
    async fn forget(&self, header: &HeaderValue) {
        let mut held = self.held.lock().await;
        if held.as_ref().is_some_and(|h| h.header == *header) {
            *held = None;
        }
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

fn hash_of(ca_pem: &str) -> Option<String> {
    let authority = pki::certificates(ca_pem.as_bytes()).ok()?;
    authority.first().and_then(|der| pki::public_key_hash(der))
}

/// The authority whose key has this digest: from the chain that the server shows, or, where it does not send its
/// authority along, from the ConfigMap that kubeadm publishes. Nothing but the digest is trusted.
async fn discover(server_url: &str, hash: &str) -> anyhow::Result<String> {
    match shown(server_url, hash).await {
        Ok(pem) => Ok(pem),
        Err(first) => match published(server_url, hash).await {
            Ok(pem) => Ok(pem),
            Err(second) => bail!(
                "the server at {server_url} is not the one of --ca-hash {hash}, or does not show its authority ({first:#}; {second:#}); give --ca-cert FILE"
            ),
        },
    }
}

async fn shown(server_url: &str, hash: &str) -> anyhow::Result<String> {
    let url = parse_url(server_url)?;
    let host = url.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_string();
    let name = ServerName::try_from(host.clone()).context("the server's name")?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let pinned = Arc::new(Pinned { hash: hash.to_string(), provider: provider.clone(), found: Mutex::new(None) });
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("choose TLS versions")?
        .dangerous()
        .with_custom_certificate_verifier(pinned.clone())
        .with_no_client_auth();
    let port = url.port_u16().unwrap_or(443);
    let connect = async {
        let stream = dial(&host, port).await?;
        TlsConnector::from(Arc::new(config)).connect(name, stream).await
    };
    tokio::time::timeout(SERVER_AWAY, connect).await.context("the server does not answer")??;
    let found = pinned.found.lock().unwrap_or_else(PoisonError::into_inner).take();
    let authority = found.context("the server has shown no authority")?;
    Ok(pki::to_pem("CERTIFICATE", &authority))
}

/// Connects, waiting for a server that is not up yet; whoever calls sets the limit.
async fn dial(host: &str, port: u16) -> std::io::Result<TcpStream> {
    let mut pause = Duration::from_millis(50);
    loop {
        match TcpStream::connect((host, port)).await {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(5));
            }
            other => return other,
        }
    }
}

async fn published(server_url: &str, hash: &str) -> anyhow::Result<String> {
    let mut config = kube::Config::new(parse_url(server_url)?);
    config.accept_invalid_certs = true;
    let client = kube::Client::try_from(config).context("prepare a client")?;
    let info = Api::new(&client, &kinds::CONFIG_MAPS).get("kube-public", "cluster-info").await?;
    let config: Value =
        serde_saphyr::from_str(info.text("/data/kubeconfig")).context("kube-public/cluster-info is not readable")?;
    let encoded = config.text("/clusters/0/cluster/certificate-authority-data");
    let pem = String::from_utf8(BASE64.decode(encoded).context("the published authority is not base64")?)
        .context("the published authority is not PEM")?;
    ensure!(hash_of(&pem).as_deref() == Some(hash), "kube-public/cluster-info names another authority");
    Ok(pem)
}

/// Finds the certificate with the right digest in a server's chain, and then checks the server against it as usual.
#[derive(Debug)]
struct Pinned {
    hash: String,
    provider: Arc<CryptoProvider>,
    found: Mutex<Option<CertificateDer<'static>>>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let refuse = |why: &str| rustls::Error::General(why.to_string());
        let authority = intermediates
            .iter()
            .find(|c| pki::public_key_hash(c).as_ref() == Some(&self.hash))
            .ok_or_else(|| refuse("no certificate in the server's chain has the expected public key"))?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|e| refuse(&e.to_string()))?;
        let verified = verifier.verify_server_cert(certificate, intermediates, name, ocsp, now)?;
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(authority.clone().into_owned());
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::Pki;
    use crate::pki::tests::Scratch;
    use crate::serve::tls_config;
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    #[test]
    fn a_server_is_known_by_its_authority_or_its_digest_and_nothing_less() {
        let hash = format!("sha256:{}", "0A".repeat(32));
        let good = Trust::Hash(hash.clone()).checked().expect("a digest");
        assert_eq!(good, Trust::Hash(hash.to_ascii_lowercase()));
        for bad in [Trust::Hash(String::new()), Trust::Hash("sha256:12".into()), Trust::Pem("x".into())] {
            assert!(bad.checked().is_err());
        }
    }

    #[tokio::test]
    async fn the_authority_is_found_by_its_digest_and_no_other_is_taken() {
        let (scratch, elsewhere) = (Scratch::new(), Scratch::new());
        let pki = Pki::open_or_create(&scratch.0).expect("an authority");
        let other = Pki::open_or_create(&elsewhere.0).expect("another");
        let certificate = pki.server_certificate(&[San::from("127.0.0.1")]).expect("a certificate");
        let tls =
            tls_config(crate::pki::Rotating::new(&certificate).expect("a certificate"), pki.ca_pem()).expect("TLS");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let url = format!("https://{}", listener.local_addr().expect("an address"));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // A client that refuses the chain ends its handshake; the next one is served all the same.
                drop(TlsAcceptor::from(tls.clone()).accept(stream).await);
            }
        });
        let found = shown(&url, &pki.ca_hash()).await.expect("the authority");
        assert_eq!(hash_of(&found), Some(pki.ca_hash()));
        assert!(shown(&url, &other.ca_hash()).await.is_err());
    }

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
