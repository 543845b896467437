//! The pod network of one node: addresses and cables for sandboxes, ways to other nodes.

use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use futures::future::BoxFuture;
use ipnet::IpNet;
use linux::link::{Link, Links};
use linux::netns::Netns;
use runtime::{NetworkError, PodNetwork, PortMapping, SandboxNetwork};
use tokio::sync::watch;

use crate::ipam::{Holding, Ipam, IpamFile};
use crate::overlay::{HostGateway, Overlay, OverlayKind, PeerNode, Vxlan, apply};
use crate::plan::{host_items, node_items, node_settings, pod_items, pod_settings, veth_name, way_items};
use crate::{PodNetConfig, PodnetError};

/// A port of the node that leads to a pod; [`crate::rules`] makes it true.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPort {
    pub sandbox: String,
    pub pod_addresses: Vec<IpAddr>,
    pub mapping: PortMapping,
}

/// Which packets leave the node with the node's own address; [`crate::rules`] makes it true.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Masquerade {
    /// Packets from here …
    pub from: Vec<IpNet>,
    /// … unless they go there.
    pub except: Vec<IpNet>,
}

/// A node's pod network, in the namespace it was started in.
pub struct PodNet {
    inner: Arc<Inner>,
}

struct Inner {
    config: PodNetConfig,
    links: Links,
    overlay: Box<dyn Overlay>,
    mtu: u32,
    ipam: Mutex<IpamFile>,
    ports: watch::Sender<Vec<HostPort>>,
}

impl PodNet {
    /// In the calling thread's namespace.
    pub fn start(config: PodNetConfig) -> Result<Self, PodnetError> {
        Self::start_in(config, &Netns::current()?)
    }

    /// Makes the node's part: bridge, gateways, settings. What an earlier process made is kept, pods included. Blocking.
    pub fn start_in(config: PodNetConfig, namespace: &Netns) -> Result<Self, PodnetError> {
        let links = Links::open(namespace)?;
        let local = *config.node_addresses.first().ok_or(PodnetError::NoAddress)?;
        let uplink = uplink(&links, local)?;
        let overlay: Box<dyn Overlay> = match config.overlay {
            OverlayKind::HostGateway => Box::new(HostGateway { node: config.node.clone() }),
            OverlayKind::Vxlan => Box::new(Vxlan {
                node: config.node.clone(),
                local,
                pod_cidrs: config.pod_cidrs.clone(),
                uplink_mtu: uplink.mtu,
            }),
        };
        let mtu = config.mtu.unwrap_or_else(|| uplink.mtu.saturating_sub(overlay.overhead()));
        links.ensure_all(&node_items(&config.pod_cidrs, mtu))?;
        let has_ipv6 = config.pod_cidrs.iter().any(|cidr| cidr.addr().is_ipv6());
        if has_ipv6 {
            // A router ignores router advertisements unless told otherwise; the node may have its own default route from one.
            let accepts = format!("net/ipv6/conf/{}/accept_ra", uplink.name);
            if namespace.read_sysctl(&accepts)?.as_deref() == Some("1") {
                namespace.sysctl(&accepts, "2")?;
            }
        }
        let settings = node_settings(&uplink.name, has_ipv6);
        namespace.sysctls(&settings.iter().map(|(name, value)| (name.as_str(), *value)).collect::<Vec<_>>())?;

        let file = IpamFile::open(&config.dir, &config.pod_cidrs)?;
        let ports = watch::Sender::new(host_ports(file.ipam()));
        Ok(Self { inner: Arc::new(Inner { config, links, overlay, mtu, ipam: Mutex::new(file), ports }) })
    }

    /// The ports of the node that lead to pods now, and every later state of them.
    pub fn host_ports(&self) -> watch::Receiver<Vec<HostPort>> {
        self.inner.ports.subscribe()
    }

    pub fn masquerade(&self) -> Masquerade {
        Masquerade { from: self.inner.config.pod_cidrs.clone(), except: self.inner.config.cluster_cidrs.clone() }
    }

    /// The MTU that pods get.
    pub fn mtu(&self) -> u32 {
        self.inner.mtu
    }

    pub fn holdings(&self) -> Vec<Holding> {
        self.inner.ipam().ipam().holdings().cloned().collect()
    }

    /// Takes back what sandboxes hold that are not in this list of ids: those that went while nobody was looking.
    pub async fn retain(&self, live: Vec<String>) -> Result<(), PodnetError> {
        self.blocking(move |inner| {
            let holdings: Vec<_> = inner.ipam().ipam().holdings().cloned().collect();
            let gone = holdings.iter().filter(|holding| !live.contains(&holding.pod.id));
            gone.map(|holding| &holding.pod).try_for_each(|pod| inner.remove(pod))
        })
        .await
    }

    /// Makes the ways to other nodes those of this list, in which this node may be, too.
    pub async fn sync(&self, nodes: Vec<PeerNode>) -> Result<(), PodnetError> {
        self.blocking(move |inner| apply(&inner.links, inner.overlay.as_ref(), &nodes)).await
    }

    /// The kernel has one lock over all links, and the disk may be slow: not on a thread that other tasks share.
    async fn blocking<T: Send + 'static>(&self, work: impl FnOnce(&Inner) -> T + Send + 'static) -> T {
        let inner = Arc::clone(&self.inner);
        match tokio::task::spawn_blocking(move || work(&inner)).await {
            Ok(done) => done,
            Err(failed) => std::panic::resume_unwind(failed.into_panic()),
        }
    }
}

impl PodNetwork for PodNet {
    fn add<'a>(&'a self, pod: &'a SandboxNetwork) -> BoxFuture<'a, Result<Vec<IpAddr>, NetworkError>> {
        let pod = pod.clone();
        let work = self.blocking(move |inner| inner.add(&pod));
        Box::pin(async move { work.await.map_err(|error| NetworkError(error.to_string())) })
    }

    fn remove<'a>(&'a self, pod: &'a SandboxNetwork) -> BoxFuture<'a, Result<(), NetworkError>> {
        let pod = pod.clone();
        let work = self.blocking(move |inner| inner.remove(&pod));
        Box::pin(async move { work.await.map_err(|error| NetworkError(error.to_string())) })
    }
}

impl Inner {
    fn add(&self, pod: &SandboxNetwork) -> Result<Vec<IpAddr>, PodnetError> {
        let namespace = Netns::open(&pod.netns)?;
        let addresses = self.change(|ipam| ipam.allocate(pod))?;
        namespace.sysctls(&pod_settings(addresses.iter().any(IpAddr::is_ipv6)))?;
        self.links.ensure_all(&host_items(&pod.id, &namespace, &addresses, self.mtu))?;
        Links::open(&namespace)?.ensure_all(&pod_items(&addresses, &self.config.pod_cidrs))?;
        Ok(addresses)
    }

    fn remove(&self, pod: &SandboxNetwork) -> Result<(), PodnetError> {
        // Addresses last: nobody gets one while a way to its old holder is left.
        let held = self.ipam().ipam().get(&pod.id).map(|holding| holding.addresses.clone());
        for item in way_items(&held.unwrap_or_default()) {
            self.links.remove(&item)?;
        }
        self.links.remove_link(&veth_name(&pod.id))?;
        self.change(|ipam| {
            ipam.release(&pod.id);
            Ok(())
        })
    }

    fn change<T>(&self, change: impl FnOnce(&mut Ipam) -> Result<T, PodnetError>) -> Result<T, PodnetError> {
        let mut file = self.ipam();
        let outcome = file.change(change)?;
        self.ports.send_if_modified(|ports| {
            let now = host_ports(file.ipam());
            let differs = *ports != now;
            *ports = now;
            differs
        });
        Ok(outcome)
    }

    fn ipam(&self) -> MutexGuard<'_, IpamFile> {
        // A change is made to a copy, so a panic leaves the old state whole.
        self.ipam.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn host_ports(ipam: &Ipam) -> Vec<HostPort> {
    let of = |holding: &Holding| {
        let (sandbox, addresses) = (holding.pod.id.clone(), holding.addresses.clone());
        let mappings = holding.pod.port_mappings.clone().into_iter();
        mappings.map(move |mapping| HostPort { sandbox: sandbox.clone(), pod_addresses: addresses.clone(), mapping })
    };
    ipam.holdings().flat_map(of).collect()
}

fn uplink(links: &Links, address: IpAddr) -> Result<Link, PodnetError> {
    let addresses = links.addresses()?;
    let name = addresses.into_iter().find(|held| held.address.addr() == address).map(|held| held.link);
    let link = name.map(|name| links.link(&name)).transpose()?.flatten();
    link.ok_or(PodnetError::NoUplink(address))
}
