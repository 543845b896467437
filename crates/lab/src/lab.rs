//! Makes, finds and ends a lab.
//!
//! Every step makes something true that may be true already, and ending looks only at what is there: whichever of the two is
//! killed at whatever moment, calling it again finishes the work.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use ipnet::IpNet;
use linux::cgroup_v1v2::{CgroupTree, TreeError};
use linux::enter::{EnterError, Entry};
use linux::link::{Address, Bridge, Item, LinkError, Links, Mac, Port, Route, Veth};
use linux::mntns;
use linux::netns::{Netns, NetnsError};

use crate::node::LabNode;
use crate::plan::{LabConfig, Plan, PlanError};
use crate::state::{self, Cluster, Process};
use crate::uplink;

#[derive(Debug, thiserror::Error)]
pub enum LabError {
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Namespace(#[from] NetnsError),
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Cgroup(#[from] TreeError),
    #[error(transparent)]
    Enter(#[from] EnterError),
    #[error("{doing}: {source}; a lab needs root, and /run on a file system that takes mounts")]
    Io { doing: String, source: io::Error },
    #[error("no cluster {0} on this machine; `fairlead status` lists those there are")]
    NoSuchCluster(String),
    #[error("{place} is no node of this cluster; there are {known}")]
    NoSuchNode { place: String, known: String },
    #[error("{mine} and {theirs} have the same short id {id}; choose another data directory")]
    Collision { id: String, mine: PathBuf, theirs: PathBuf },
    #[error("{what} of a running cluster cannot change; run `fairlead down` first")]
    Changed { what: &'static str },
    #[error(transparent)]
    Rules(#[from] linux::nft::Error),
    #[error("--uplink needs a machine that forwards; allow it with `sysctl -w net.ipv4.ip_forward=1`")]
    NoForwarding,
    #[error("--uplink found no free range for its cable from {first} on; see `ip route` for who has 100.64.0.0/10")]
    NoRange { first: IpNet },
}

/// A lab whose namespaces, links and cgroups exist.
#[derive(Debug)]
pub struct Lab {
    cluster: Cluster,
    plan: Plan,
    nodes: Vec<LabNode>,
}

impl Lab {
    /// Makes the lab of a data directory, or completes what is there of it. It may have more nodes than before, not fewer.
    pub fn create(mut config: LabConfig) -> Result<Self, LabError> {
        let plan = Plan::new(&config)?;
        fs::create_dir_all(&config.data_dir).map_err(io_at(&config.data_dir))?;
        config.data_dir = state::canonical(&config.data_dir).map_err(io_at(&config.data_dir))?;
        let id = state::id_of(&config.data_dir).map_err(io_at(&config.data_dir))?;
        let run_dir = state::run_dir(&id);
        fs::create_dir_all(&run_dir).map_err(io_at(&run_dir))?;
        let _lock = lock(&run_dir).map_err(io_at(&run_dir))?;

        let processes = match Cluster::read(&id).map_err(io_at(&run_dir))? {
            None => Vec::new(),
            Some(held) => {
                check_same(&id, &held.config, &config)?;
                held.processes
            }
        };
        // Written before anything is made, so that whatever is made can be found.
        let lab = Self::assemble(Cluster { id, config, processes }, plan);
        lab.cluster.write().map_err(io_at(&run_dir))?;
        lab.make()?;
        Ok(lab)
    }

    pub fn open(id: &str) -> Result<Self, LabError> {
        let no_such = || LabError::NoSuchCluster(id.into());
        if !state::is_id(id) {
            return Err(no_such());
        }
        let cluster = Cluster::read(id).map_err(io_at(&state::run_dir(id)))?.ok_or_else(no_such)?;
        let plan = Plan::new(&cluster.config)?;
        Ok(Self::assemble(cluster, plan))
    }

    /// Every cluster of this machine that left a trace: its id, and what is known of it where that was written.
    pub fn list() -> Result<Vec<(String, Option<Cluster>)>, LabError> {
        let ids = state::ids().map_err(io_at(Path::new(state::RUN_ROOT)))?;
        // A description that cannot be read belongs to a cluster that can still be ended.
        Ok(ids.into_iter().map(|id| (id.clone(), Cluster::read(&id).ok().flatten())).collect())
    }

    /// Ends everything of a cluster: processes, cgroups, mounts, namespaces, and its directory in /run. The data directory
    /// stays. What is gone already is fine.
    pub fn destroy(id: &str) -> Result<(), LabError> {
        if !state::is_id(id) {
            return Err(LabError::NoSuchCluster(id.into()));
        }
        let run_dir = state::run_dir(id);
        let failed = || io_at(&run_dir);
        let _lock = match lock(&run_dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            held => Some(held.map_err(failed())?),
        };
        // Processes first, as they hold all the rest; the directory last, as it is how the rest is found.
        let tree = CgroupTree::new(cgroup(id))?;
        tree.kill()?;
        tree.remove()?;
        // Only a lab that was half made or half ended has no pin of the machine's own namespace; and no cable then.
        let host = run_dir.join("ns").join("host");
        if linux::netns::is_pinned(&host) {
            uplink::disconnect(id, &Netns::open(&host)?)?;
        }
        mntns::unmount_below(&run_dir).map_err(failed())?;
        for done in [fs::remove_dir_all(&run_dir), fs::remove_dir(state::RUN_ROOT)] {
            match done {
                // Other clusters live beside this one.
                Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty) => {}
                done => done.map_err(failed())?,
            }
        }
        Ok(())
    }

    pub fn id(&self) -> &str {
        &self.cluster.id
    }

    pub fn config(&self) -> &LabConfig {
        &self.cluster.config
    }

    pub fn plan(&self) -> &Plan {
        &self.plan
    }

    pub fn nodes(&self) -> &[LabNode] {
        &self.nodes
    }

    pub fn node(&self, name: &str) -> Result<&LabNode, LabError> {
        self.nodes.iter().find(|node| node.name == name).ok_or_else(|| self.no_such(name))
    }

    pub fn run_dir(&self) -> PathBuf {
        self.cluster.run_dir()
    }

    /// The namespace of the switch, where the API server has its socket for the nodes and dials nodes and pods.
    pub fn switch(&self) -> Result<Netns, LabError> {
        Ok(Netns::open(&self.netns("lab"))?)
    }

    pub fn outside(&self) -> Result<Netns, LabError> {
        Ok(Netns::open(&self.netns("outside"))?)
    }

    /// The namespace that the lab was made from, where images are pulled and upstream DNS is asked.
    pub fn host(&self) -> Result<Netns, LabError> {
        Ok(Netns::open(&self.netns("host"))?)
    }

    /// The pin of a namespace: `lab`, `outside`, `host` or a node's name.
    pub fn netns(&self, name: &str) -> PathBuf {
        self.run_dir().join("ns").join(name)
    }

    /// How to get into a place: a node by name, or `outside`.
    pub fn entry(&self, place: &str) -> Result<Entry, LabError> {
        match place {
            "outside" => Ok(Entry {
                netns: Some(self.netns("outside")),
                mntns: None,
                cgroup: Some(self.tree()?.child("outside").path().into()),
            }),
            name => Ok(self.node(name)?.entry()),
        }
    }

    /// A command that runs in a place; see [`Lab::entry`]. The running binary has to have the subcommand `enter`.
    pub fn command(
        &self,
        place: &str,
        program: impl AsRef<OsStr>,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Result<Command, LabError> {
        Ok(self.entry(place)?.command(program, arguments)?)
    }

    /// All cgroups of the cluster.
    pub fn tree(&self) -> Result<CgroupTree, LabError> {
        Ok(CgroupTree::new(cgroup(self.id()))?)
    }

    /// Where the processes of no node are: the control plane.
    pub fn server_cgroup(&self) -> Result<CgroupTree, LabError> {
        Ok(self.tree()?.child("server"))
    }

    /// The processes that were recorded, as they are written now: another process of ours may have recorded them.
    pub fn processes(&self) -> Result<Vec<Process>, LabError> {
        let run_dir = self.run_dir();
        Ok(Cluster::read(self.id()).map_err(io_at(&run_dir))?.map(|cluster| cluster.processes).unwrap_or_default())
    }

    /// Writes down which process plays a role (`server`, `node-1`), for `status` and `node stop`.
    pub fn record(&self, role: &str, pid: u32) -> Result<(), LabError> {
        let run_dir = self.run_dir();
        let _lock = lock(&run_dir).map_err(io_at(&run_dir))?;
        let mut cluster = self.cluster.clone();
        cluster.processes = self.processes()?;
        cluster.processes.retain(|process| process.role != role && process.is_alive());
        if let Some(started) = state::start_time(pid) {
            cluster.processes.push(Process { role: role.into(), pid, started });
        }
        cluster.write().map_err(io_at(&run_dir))
    }

    fn assemble(cluster: Cluster, plan: Plan) -> Self {
        let run_dir = cluster.run_dir();
        let subtree = cgroup(&cluster.id);
        let nodes =
            plan.nodes.iter().map(|node| LabNode::new(node, &run_dir, &subtree, &cluster.config.data_dir)).collect();
        Self { cluster, plan, nodes }
    }

    fn make(&self) -> Result<(), LabError> {
        let run_dir = self.run_dir();
        mntns::make_private(&run_dir).map_err(io_at(&run_dir))?;
        for directory in [run_dir.join("ns"), run_dir.join("mnt")].iter().chain(self.nodes.iter().map(|node| &node.dir))
        {
            fs::create_dir_all(directory).map_err(io_at(directory))?;
        }
        Netns::current()?.pin(&self.netns("host"))?;

        let switch = Netns::create(&self.netns("lab"))?;
        switch.sysctls(&self.settings(true))?;
        let links = Links::open(&switch)?;
        links.ensure_all(&self.switch_items())?;
        for node in &self.nodes {
            let namespace = Netns::create(&node.netns)?;
            namespace.sysctls(&self.settings(false))?;
            links.ensure_all(&self.port_items(node, &namespace))?;
            Links::open(&namespace)?
                .ensure_all(&end_items(&self.plan.nodes[node.index as usize - 1].addresses, &self.plan.switch))?;
        }
        let outside = Netns::create(&self.netns("outside"))?;
        outside.sysctls(&self.settings(false))?;
        links.ensure_all(&self.leg_items(&outside))?;
        Links::open(&outside)?.ensure_all(&end_items(&self.plan.outside, &self.plan.leg))?;

        if self.config().uplink {
            let (host, config) = (self.host()?, self.config());
            let inside: Vec<IpNet> = config
                .node_cidrs
                .iter()
                .chain(&config.pod_cidrs)
                .chain(&config.service_cidrs)
                .copied()
                .chain(self.plan.outside.iter().map(IpNet::trunc))
                .collect();
            uplink::connect(self.id(), &switch, &host, &config.node_cidrs, &inside)?;
        }

        let tree = self.tree()?;
        tree.child("server").create()?;
        tree.child("outside").create()?;
        for node in &self.nodes {
            CgroupTree::new(node.process_cgroup())?.create()?;
            // Last, as the copy of the machine's mounts in it is to hold every pin above.
            let reachable = [run_dir.clone(), self.config().data_dir.clone()];
            mntns::create_with_private_run(&node.mntns, &reachable).map_err(io_at(&node.mntns))?;
        }
        Ok(())
    }

    /// A new namespace starts with the machine's own settings for IPv4, so every one that matters is set. Whether a node
    /// forwards is its pod network's business.
    fn settings(&self, forwards: bool) -> Vec<(&'static str, &'static str)> {
        let mut all = vec![
            ("net/ipv4/conf/all/rp_filter", "0"),
            ("net/ipv4/conf/default/rp_filter", "0"),
            ("net/ipv4/conf/all/send_redirects", "0"),
            ("net/ipv4/conf/default/send_redirects", "0"),
        ];
        if forwards {
            all.push(("net/ipv4/ip_forward", "1"));
        }
        if self.config().has_ipv6() {
            all.extend([
                ("net/ipv6/conf/all/disable_ipv6", "0"),
                ("net/ipv6/conf/default/disable_ipv6", "0"),
                ("net/ipv6/conf/all/accept_dad", "0"),
                ("net/ipv6/conf/default/accept_dad", "0"),
                ("net/ipv6/conf/all/accept_ra", "0"),
                ("net/ipv6/conf/default/accept_ra", "0"),
            ]);
            if forwards {
                all.push(("net/ipv6/conf/all/forwarding", "1"));
            }
        }
        all
    }

    fn switch_items(&self) -> Vec<Item> {
        let name = self.bridge();
        let mac = self.plan.switch.first().map(|first| Mac::of(first.addr()));
        let mut items = vec![Item::Bridge(Bridge { name: name.clone(), mac, mtu: None }), Item::Up(name.clone())];
        items.extend(addresses(&name, &self.plan.switch));
        items
    }

    /// The switch's side of a node: a port, and the way to its pods, as a router beside the nodes would have it.
    fn port_items(&self, node: &LabNode, namespace: &Netns) -> Vec<Item> {
        let name = format!("n{}-{}", node.index, self.id());
        let veth = Veth {
            name: name.clone(),
            peer: "eth0".into(),
            peer_netns: namespace.clone(),
            peer_mac: node.addresses().first().map(|address| Mac::of(*address)),
            mtu: None,
        };
        let mut items = vec![
            Item::Veth(veth),
            Item::Port(Port { link: name.clone(), bridge: self.bridge(), hairpin: false }),
            Item::Up(name),
        ];
        for cidr in &node.pod_cidrs {
            let via = node.addresses().into_iter().find(|address| address.is_ipv4() == cidr.addr().is_ipv4());
            items.extend(via.map(|via| Item::Route(Route::network(*cidr).via(via))));
        }
        items
    }

    fn leg_items(&self, outside: &Netns) -> Vec<Item> {
        let name = format!("out-{}", self.id());
        let veth = Veth {
            name: name.clone(),
            peer: "eth0".into(),
            peer_netns: outside.clone(),
            peer_mac: self.plan.outside.first().map(|first| Mac::of(first.addr())),
            mtu: None,
        };
        let mut items = vec![Item::Veth(veth), Item::Up(name.clone())];
        items.extend(addresses(&name, &self.plan.leg));
        items
    }

    fn bridge(&self) -> String {
        format!("sw-{}", self.id())
    }

    fn no_such(&self, place: &str) -> LabError {
        let known: Vec<_> = self.nodes.iter().map(|node| node.name.as_str()).chain(["outside"]).collect();
        LabError::NoSuchNode { place: place.into(), known: known.join(", ") }
    }
}

/// The end of a cable: addresses on eth0, and everything else by way of the router at the other end.
fn end_items(own: &[IpNet], routers: &[IpNet]) -> Vec<Item> {
    let mut items = vec![Item::Up("eth0".into())];
    items.extend(addresses("eth0", own));
    items.extend(routers.iter().map(|router| Item::Route(Route::default_via(router.addr()).link("eth0"))));
    items
}

fn addresses(link: &str, all: &[IpNet]) -> impl Iterator<Item = Item> {
    all.iter().map(move |address| Item::Address(Address { link: link.into(), address: *address }))
}

fn cgroup(id: &str) -> String {
    format!("fairlead-{id}")
}

fn check_same(id: &str, held: &LabConfig, new: &LabConfig) -> Result<(), LabError> {
    if held.data_dir != new.data_dir {
        let (mine, theirs) = (new.data_dir.clone(), held.data_dir.clone());
        return Err(LabError::Collision { id: id.into(), mine, theirs });
    }
    let differs = [
        ("the node range", held.node_cidrs != new.node_cidrs),
        ("the pod range", held.pod_cidrs != new.pod_cidrs),
        ("the service range", held.service_cidrs != new.service_cidrs),
        ("the number of nodes, downwards,", held.nodes > new.nodes),
        ("--uplink", held.uplink != new.uplink),
    ];
    match differs.into_iter().find(|(_, differs)| *differs) {
        Some((what, _)) => Err(LabError::Changed { what }),
        None => Ok(()),
    }
}

/// One at a time: the directory itself is the lock, so that none is left behind.
fn lock(run_dir: &Path) -> io::Result<File> {
    loop {
        let held = File::open(run_dir)?;
        held.lock()?;
        // While this waited, the holder may have removed the directory and somebody made a new one.
        let (mine, now) = (held.metadata()?, fs::metadata(run_dir)?);
        if (mine.dev(), mine.ino()) == (now.dev(), now.ino()) {
            return Ok(held);
        }
    }
}

fn io_at(path: &Path) -> impl FnOnce(io::Error) -> LabError + use<> {
    let doing = path.display().to_string();
    move |source| LabError::Io { doing, source }
}
