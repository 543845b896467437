//! The control plane: store, API server, controllers, scheduler, signer, in one process.

use crate::config::Publish;
use crate::connector::LabConnector;
use crate::pki::{Pki, San};
use crate::{cli, components, ingress, kubeconfig, publish, serve, signer};
use anyhow::{Context, bail};
use api::kinds::{GATEWAY_CLASSES, INGRESS_CLASSES, SERVICES};
use apiserver::auth::token::TokenKey;
use apiserver::bootstrap::{self, Advertise};
use apiserver::{Allocation, ApiServer, Connector, Identity};
use base64::Engine;
use clap::Args;
use ipnet::IpNet;
use lab::Lab;
use serde_json::json;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;
use store::{EtcdOptions, EtcdStore, EtcdTls, LogOptions, LogStore, Store};
use tokio_util::sync::CancellationToken;
use tracing::info;

/// Where kubelets, proxies and people reach the API server on real hosts.
const API_PORT: u16 = 6443;
pub const DNS_PORT: u16 = 10053;
pub const DNS_METRICS_PORT: u16 = 9153;
pub const DOMAIN: &str = "cluster.local";

#[derive(Args, Debug, Clone)]
pub struct ServerArgs {
    #[command(flatten)]
    pub data: cli::DataDir,
    /// Where to listen; may be repeated.
    #[arg(long, value_name = "ADDR:PORT", default_value = "0.0.0.0:6443")]
    pub listen: Vec<SocketAddr>,
    /// The address under which nodes and pods reach this server; by default the first that is listened on.
    #[arg(long, value_name = "ADDR")]
    pub advertise_address: Vec<IpAddr>,
    /// Ranges of cluster IPs: one, or one of each family; the first is the primary one.
    #[arg(long, value_delimiter = ',', default_value = "10.96.0.0/12")]
    pub service_cidr: Vec<IpNet>,
    /// Ranges of pod addresses, of which each node gets a share.
    #[arg(long, value_delimiter = ',', default_value = "10.244.0.0/16")]
    pub pod_cidr: Vec<IpNet>,
    /// Where objects are kept: `log` (in the data directory) or `etcd=URL[,URL…]`.
    #[arg(long, default_value = "log")]
    pub store: String,
    /// CA of etcd's server certificates, PEM.
    #[arg(long, value_name = "FILE")]
    pub etcd_ca: Option<PathBuf>,
    /// Client certificate for etcd, PEM.
    #[arg(long, value_name = "FILE", requires = "etcd_key")]
    pub etcd_cert: Option<PathBuf>,
    /// Key of the client certificate for etcd, PEM.
    #[arg(long, value_name = "FILE", requires = "etcd_cert")]
    pub etcd_key: Option<PathBuf>,
    /// More names and addresses for the serving certificate.
    #[arg(long, value_name = "NAME")]
    pub tls_san: Vec<String>,
    #[command(flatten)]
    pub load_balancer: crate::loadbalancer::LoadBalancerOptions,
    /// Serve the cluster that `up` made with this id.
    #[arg(long, hide = true)]
    pub lab: Option<String>,
    /// Loopback ports that lead to node ports.
    #[arg(long, hide = true)]
    pub publish: Vec<Publish>,
    /// Write a line to standard output when ready, and leave the terminal.
    #[arg(long, hide = true)]
    pub announce: bool,
}

pub fn run(args: ServerArgs) -> anyhow::Result<ExitCode> {
    cli::start_logging();
    if args.announce {
        // The terminal's signals are for the one who waits there.
        nix::unistd::setsid().ok();
    }
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?.block_on(serve(args))
}

async fn open_store(args: &ServerArgs) -> anyhow::Result<Arc<dyn Store>> {
    if args.store == "log" {
        let dir = args.data.data_dir.join("store");
        let store = tokio::task::spawn_blocking(move || LogStore::open(&dir, LogOptions::default())).await??;
        return Ok(Arc::new(store));
    }
    let Some(urls) = args.store.strip_prefix("etcd=") else {
        bail!("--store {:?} is not known: use log or etcd=URL[,URL…]", args.store);
    };
    let mut options = EtcdOptions::new(urls.split(',').map(str::to_string));
    if let Some(ca) = &args.etcd_ca {
        let read = |path: &PathBuf| std::fs::read(path).with_context(|| format!("read {}", path.display()));
        let client = match (&args.etcd_cert, &args.etcd_key) {
            (Some(cert), Some(key)) => Some((read(cert)?, read(key)?)),
            _ => None,
        };
        options.tls = Some(EtcdTls { ca: read(ca)?, client });
    }
    Ok(Arc::new(EtcdStore::connect(options).await?))
}

/// The `n`th address of a range, counted from its network address.
fn nth(cidr: &IpNet, n: u32) -> anyhow::Result<IpAddr> {
    let address = match cidr {
        IpNet::V4(net) => IpAddr::from((u32::from(net.network()).wrapping_add(n)).to_be_bytes()),
        IpNet::V6(net) => IpAddr::from((u128::from(net.network()).wrapping_add(n.into())).to_be_bytes()),
    };
    if !cidr.contains(&address) {
        bail!("range {cidr} has no {n}th address; give a larger one");
    }
    Ok(address)
}

pub fn dns_addresses(service_cidrs: &[IpNet]) -> anyhow::Result<Vec<IpAddr>> {
    service_cidrs.iter().map(|c| nth(c, 10)).collect()
}

async fn serve(args: ServerArgs) -> anyhow::Result<ExitCode> {
    let token = CancellationToken::new();
    let lab = args.lab.as_deref().map(Lab::open).transpose()?;
    if let Some(lab) = &lab {
        lab.server_cgroup()?.enter(0)?;
        lab.record("server", std::process::id())?;
    }
    let dir = args.data.data_dir.clone();
    let pki = Arc::new(Pki::open_or_create(&dir)?);
    let store = open_store(&args).await?;
    let switch: Vec<IpAddr> =
        lab.as_ref().map(|l| l.plan().switch.iter().map(IpNet::addr).collect()).unwrap_or_default();
    let connector: Arc<dyn Connector> = match &lab {
        Some(lab) => Arc::new(LabConnector::new(Some(lab.switch()?), &pki)?),
        None => Arc::new(LabConnector::new(None, &pki)?),
    };
    let advertised: Vec<IpAddr> = if !switch.is_empty() {
        switch.clone()
    } else if !args.advertise_address.is_empty() {
        args.advertise_address.clone()
    } else {
        args.listen.iter().map(SocketAddr::ip).filter(|ip| !ip.is_unspecified()).take(1).collect()
    };
    if advertised.is_empty() {
        bail!("nodes must know where this server is: give --advertise-address, or --listen with an address");
    }
    let api = ApiServer::start(apiserver::Config {
        store: store.clone(),
        allocation: Allocation {
            service_cidrs: args.service_cidr.clone(),
            node_ports: 30000..=32767,
            pod_cidrs: args.pod_cidr.clone(),
        },
        tokens: TokenKey::from_pkcs8(pki.token_key_pkcs8(), "https://kubernetes.default.svc.cluster.local")?,
        connector: Some(connector),
        token: token.clone(),
    })
    .await?;
    let fail = |e: String| anyhow::anyhow!("the cluster's first objects cannot be made: {e}");
    bootstrap::run(&api, &components::all()).await.map_err(fail)?;

    // Listeners, and the certificate that names them all.
    let mut sans: Vec<San> =
        ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"].map(San::from).to_vec();
    sans.push(San::from(format!("kubernetes.default.svc.{DOMAIN}").as_str()));
    sans.extend(["127.0.0.1", "::1"].iter().filter_map(|t| t.parse::<IpAddr>().ok()).map(San::from));
    sans.extend(advertised.iter().copied().map(San::from));
    sans.extend(args.listen.iter().map(SocketAddr::ip).filter(|ip| !ip.is_unspecified()).map(San::from));
    for name in &args.tls_san {
        sans.push(name.parse::<IpAddr>().map_or_else(|_| San::from(name.as_str()), San::from));
    }
    for cidr in &args.service_cidr {
        sans.push(San::from(nth(cidr, 1)?));
    }
    let tls = serve::api_tls(&pki.server_certificate(&sans)?, pki.ca_pem())?;
    let mut tasks = tokio::task::JoinSet::new();
    let mut first: Option<SocketAddr> = None;
    let mut port = API_PORT;
    for address in &args.listen {
        let listener = tokio::net::TcpListener::bind(address)
            .await
            .with_context(|| format!("listen on {address}; is another server running?"))?;
        let bound = listener.local_addr()?;
        first.get_or_insert(bound);
        if lab.is_none() {
            port = bound.port();
        }
        tasks.spawn(serve::serve_api(listener, tls.clone(), api.clone(), token.clone()));
    }
    if let Some(lab) = &lab {
        let namespace = lab.switch()?;
        for ip in &switch {
            let listener = namespace.tcp_listen(SocketAddr::new(*ip, API_PORT))?;
            let listener = tokio::net::TcpListener::from_std(listener)?;
            tasks.spawn(serve::serve_api(listener, tls.clone(), api.clone(), token.clone()));
        }
        let nodes: Vec<IpAddr> = lab.nodes().iter().filter_map(|n| n.addresses().first().copied()).collect();
        for published in &args.publish {
            let listener = tokio::net::TcpListener::bind(published.listen)
                .await
                .with_context(|| format!("listen on {} for --publish; choose another port", published.listen))?;
            tasks.spawn(publish::forward(
                listener,
                namespace.clone(),
                nodes.clone(),
                published.node_port,
                token.clone(),
            ));
        }
    }
    let service_addresses = args.service_cidr.iter().map(|c| nth(c, 1)).collect::<anyhow::Result<Vec<_>>>()?;
    bootstrap::kubernetes_service(&api, &Advertise { addresses: advertised.clone(), port, service_addresses })
        .await
        .map_err(fail)?;
    cluster_objects(&api, &args, &dir).await?;
    if let Some(lab) = &lab {
        let master = api.as_identity(Identity::user("system:apiserver", &[apiserver::auth::MASTERS]));
        for (collection, object) in crate::loadbalancer::first_objects(&lab.config().node_cidrs) {
            bootstrap::ensure(&master, &collection, &object, false).await.map_err(fail)?;
        }
    }

    let local = first.context("no address to listen on; give --listen")?;
    let host = if local.ip().is_unspecified() { IpAddr::from([127, 0, 0, 1]) } else { local.ip() };
    let url = format!("https://{}", SocketAddr::new(host, local.port()));
    let (cert, key) = pki.client_certificate("kubernetes-admin", &["system:masters"], YEAR)?;
    kubeconfig::write(
        &dir.join("kubeconfig"),
        &url,
        pki.ca_pem(),
        &kubeconfig::Credentials::Certificate { cert_pem: cert, key_pem: key },
    )?;

    // Controllers, scheduler and signer: clients like any other, without a socket.
    for descriptor in controllers::ALL {
        let context = controllers::Context {
            client: client(&api, &format!("{}-controller", descriptor.name)),
            token: token.clone(),
            ca_pem: pki.ca_pem().to_string(),
        };
        tasks.spawn((descriptor.run)(context));
    }
    tasks.spawn(scheduler::run(client(&api, "fairlead-scheduler"), token.clone()));
    if args.load_balancer.is_on() {
        let balancer = client(&api, "fairlead-loadbalancer");
        let own_name = nix::unistd::gethostname()?.to_string_lossy().to_lowercase();
        let classless = args.load_balancer.serves_classless();
        tasks.spawn(crate::loadbalancer::allocate(balancer, own_name, classless, Arc::default(), token.clone()));
    }
    tasks.spawn(signer::run(client(&api, "fairlead-signer"), pki.clone(), token.clone()));

    info!(%url, advertised = ?advertised, "the control plane is ready");
    if args.announce {
        crate::local::announce(&json!({"url": url}).to_string())?;
    } else {
        println!("API server: {url}");
        println!("kubeconfig: {}", dir.join("kubeconfig").display());
        println!(
            "join a node: fairlead agent --server https://{} --token {} --ca-hash {}",
            SocketAddr::new(advertised[0], port),
            join_token(&dir)?,
            pki.ca_hash()
        );
    }
    crate::local::wait_for_end().await?;
    info!("ending");
    token.cancel();
    let drained = tokio::time::timeout(Duration::from_secs(5), async { while tasks.join_next().await.is_some() {} });
    if drained.await.is_err() {
        tracing::warn!("some connections did not end in time");
    }
    Ok(ExitCode::SUCCESS)
}

const YEAR: Duration = Duration::from_secs(365 * 24 * 3600);

/// A client with the identity of one of our own service accounts, inside this process.
fn client(api: &ApiServer, account: &str) -> kube::Client {
    kube::Client::new(api.as_identity(Identity::service_account("kube-system", account)), "default")
}

/// The bootstrap token of this cluster: made once, kept in the data directory.
pub fn join_token(dir: &Path) -> anyhow::Result<String> {
    let path = dir.join("token");
    if let Some(found) = crate::pki::read(&path)? {
        return Ok(found.trim().to_string());
    }
    let mut bytes = [0u8; 22];
    getrandom::fill(&mut bytes).map_err(|e| anyhow::anyhow!("no random bytes: {e}"))?;
    const ALPHABET: &[u8] = b"abcdefghijklmnopqrstuvwxyz012345";
    let text: String = bytes.iter().map(|b| char::from(ALPHABET[usize::from(*b) % ALPHABET.len()])).collect();
    let token = format!("{}.{}", &text[..6], &text[6..]);
    crate::pki::write_private(&path, token.as_bytes())?;
    Ok(token)
}

/// What agents and pods need to find: the join token, the cluster's ranges, and the DNS Service.
async fn cluster_objects(api: &ApiServer, args: &ServerArgs, dir: &Path) -> anyhow::Result<()> {
    let master = api.as_identity(Identity::user("system:apiserver", &[apiserver::auth::MASTERS]));
    let fail = |e: String| anyhow::anyhow!("the cluster's first objects cannot be made: {e}");
    let token = join_token(dir)?;
    let (id, secret) = token.split_once('.').context("the token file is damaged; remove it to have a new one made")?;
    let encode = |text: &str| base64::engine::general_purpose::STANDARD.encode(text);
    let bootstrap_secret = json!({
        "apiVersion": "v1", "kind": "Secret", "type": "bootstrap.kubernetes.io/token",
        "metadata": {"name": format!("bootstrap-token-{id}"), "namespace": "kube-system"},
        "data": {"token-id": encode(id), "token-secret": encode(secret), "usage-bootstrap-authentication": encode("true")},
    });
    bootstrap::ensure(&master, "/api/v1/namespaces/kube-system/secrets", &bootstrap_secret, true)
        .await
        .map_err(fail)?;
    let join = |list: &[IpNet]| list.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
    let dns = dns_addresses(&args.service_cidr)?;
    let dns_text = dns.iter().map(ToString::to_string).collect::<Vec<_>>();
    let settings = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "fairlead", "namespace": "kube-system"},
        "data": {"podCIDRs": join(&args.pod_cidr), "serviceCIDRs": join(&args.service_cidr),
            "clusterDNS": dns_text.join(","), "clusterDomain": DOMAIN},
    });
    bootstrap::ensure(&master, "/api/v1/namespaces/kube-system/configmaps", &settings, true).await.map_err(fail)?;
    let families: Vec<&str> = dns.iter().map(|ip| if ip.is_ipv4() { "IPv4" } else { "IPv6" }).collect();
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": "kube-dns", "namespace": "kube-system", "labels": {
            "k8s-app": "kube-dns", "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "CoreDNS"}},
        "spec": {"clusterIP": dns_text[0], "clusterIPs": dns_text, "ipFamilies": families,
            "ipFamilyPolicy": if dns.len() > 1 { "RequireDualStack" } else { "SingleStack" },
            "trafficDistribution": "PreferSameNode",
            "ports": [
                {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": DNS_PORT},
                {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": DNS_PORT},
                {"name": "metrics", "port": DNS_METRICS_PORT, "protocol": "TCP", "targetPort": DNS_METRICS_PORT}]},
    });
    bootstrap::ensure(&master, "/api/v1/namespaces/kube-system/services", &service, true).await.map_err(fail)?;
    ingress_objects(&master).await.map_err(fail)
}

/// The class of Ingresses that name none, that of Gateways, and the Service that leads to the nodes that serve them. Both are made once: who
/// wants another default class, or other node ports, may say so.
async fn ingress_objects(master: &ApiServer) -> Result<(), String> {
    let class = json!({
        "apiVersion": INGRESS_CLASSES.api_version(), "kind": INGRESS_CLASSES.kind,
        "metadata": {"name": ::ingress::CLASS,
            "annotations": {"ingressclass.kubernetes.io/is-default-class": "true"}},
        "spec": {"controller": ::ingress::CONTROLLER},
    });
    bootstrap::ensure(master, &INGRESS_CLASSES.path(""), &class, false).await?;
    let class = json!({
        "apiVersion": GATEWAY_CLASSES.api_version(), "kind": GATEWAY_CLASSES.kind,
        "metadata": {"name": ::ingress::gateway::CLASS},
        "spec": {"controllerName": ::ingress::gateway::CONTROLLER},
    });
    bootstrap::ensure(master, &GATEWAY_CLASSES.path(""), &class, false).await?;
    let service = json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": ingress::SERVICE, "namespace": ingress::NAMESPACE,
            "labels": {"app.kubernetes.io/name": ingress::SERVICE}},
        // Local: the client's own address arrives, and load balancers ask only nodes that serve.
        "spec": {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "ipFamilyPolicy": "PreferDualStack",
            "ports": [
                {"name": "http", "port": 80, "protocol": "TCP", "targetPort": ingress::HTTP_PORT},
                {"name": "https", "port": 443, "protocol": "TCP", "targetPort": ingress::HTTPS_PORT}]},
    });
    bootstrap::ensure(master, &SERVICES.path(ingress::NAMESPACE), &service, false).await
}
