//! What can go wrong between the table and the kernel.

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("--proxy-mode={0:?} is no proxy mode; use nftables, iptables, ipvs, ebpf or userspace")]
    UnknownMode(String),
    #[error(
        "{0:?} is no switch: say NAME=true or NAME=false, where the name is one of EndpointEjection, FirstPacketRetry, \
         ServiceTraffic, EndPolicy, ModeHandOver, RemovalBarrier"
    )]
    Gate(String),
    #[error("Services stay in {from} mode, since {to} mode cannot take over: {cause}")]
    HandOver { from: crate::Mode, to: crate::Mode, cause: String },
    #[error("the proxy has ended; see the agent's log for why")]
    Ended,
    #[error(transparent)]
    Nft(#[from] linux::nft::Error),
    #[error(transparent)]
    Iptables(#[from] linux::iptables::Error),
    #[error(transparent)]
    Bpf(#[from] linux::bpf::Error),
    #[error("the ebpf mode was given no cgroup and no directory of its own; name them, or use --proxy-mode=nftables")]
    NoHooks,
    #[error("the ebpf mode can tell 8 pod networks and 8 Service networks apart, not more; use --proxy-mode=nftables")]
    Networks,
    #[error(transparent)]
    Ipvs(#[from] linux::ipvs::Error),
    #[error(transparent)]
    Conntrack(#[from] linux::conntrack::Error),
    #[error(
        "the frontend classes {0} and {1} have the same number; please report this, --proxy-mode=iptables has no numbers"
    )]
    ClassNumbers(String, String),
    #[error("the iptables mode takes one pod CIDR per family, not {0}; use --proxy-mode=nftables")]
    PodCidrs(String),
    #[error("this mode knows pods by their networks only; use detectLocalMode ClusterCIDR or NodeCIDR")]
    PodsByInterface,
    #[error("{field}: {problem}")]
    Configuration { field: String, problem: String },
    #[error("the configuration cannot be read: {0}")]
    Yaml(Box<serde_saphyr::Error>),
    #[error("what the table of the watch holds is not known; it is written whole next time")]
    WatchUnknown,
    #[error(transparent)]
    Nflog(#[from] linux::nflog::Error),
    #[error(transparent)]
    Sockets(#[from] linux::sock_diag::Error),
    #[error("cannot list processes: {0}; is /proc mounted?")]
    Processes(std::io::Error),
    #[error("no relay for {name} on {address}: {cause}; is that the node's address?")]
    Relay { name: String, address: std::net::SocketAddr, cause: std::io::Error },
    #[error("{service} has no address to ask about: {why}")]
    NoAddress { service: String, why: &'static str },
    #[error(transparent)]
    Netns(#[from] linux::netns::NetnsError),
    #[error("cannot keep the network namespace open: {0}; raise the limit of open files")]
    Namespace(std::io::Error),
    #[error("cannot open a raw socket: {0}; end policies other than keep need CAP_NET_RAW")]
    Provoke(std::io::Error),
    #[error("what ends connections has died; restart the proxy")]
    EndGone,
    #[error("the thread of a commit died: {0}; the commit is repeated")]
    Commit(tokio::task::JoinError),
}
