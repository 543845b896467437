//! eBPF maps, programs and links, kept alive by pins: whoever starts again finds them as they were, and no packet notices.
//!
//! [`Kernel`] is what a data path needs: maps by name, as bytes. [`Pinned`] is the kernel's own, [`Fake`] one of memory.
//! The programs themselves, and what the bytes mean, belong to the data path.

mod call;
mod devices;
mod fake;
mod pinned;
mod ring;

use std::io;
use std::path::PathBuf;

pub use call::{now, tick};
pub use fake::{Fake, Layout};
pub use pinned::{Hooks, Pinned, is_kept, remove};
pub use ring::Ring;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "this kernel cannot {what}: {cause}; the ebpf mode needs Linux 6.6 and CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN: use --proxy-mode=nftables"
    )]
    Missing { what: String, cause: String },
    #[error(
        "{path} is no directory of a cgroup2 file system: {cause}; mount one at /sys/fs/cgroup, or use --proxy-mode=nftables"
    )]
    Cgroup { path: PathBuf, cause: io::Error },
    #[error("cannot keep eBPF objects in {path}: {cause}; it must be a directory where bpffs can be mounted")]
    Pins { path: PathBuf, cause: io::Error },
    #[error(
        "the eBPF map {map} is full at {limit} entries; use fewer Services and endpoints, or --proxy-mode=nftables"
    )]
    Full { map: String, limit: u32 },
    #[error("the eBPF map {map}: {cause}; look at it with `bpftool map`")]
    Map { map: String, cause: io::Error },
    #[error("cannot list the links of the node: {0}")]
    Links(#[from] crate::link::LinkError),
    #[error(transparent)]
    Namespace(#[from] crate::netns::NetnsError),
}

/// Keys, and values where there are any, one after the other; every map has its own lengths.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Entries {
    pub keys: Vec<u8>,
    pub values: Vec<u8>,
}

/// Maps and programs of one data path.
pub trait Kernel: Send {
    /// What holds the entries, and how a person looks at them.
    fn about(&self) -> String;

    /// Makes sure that the maps exist and that the programs are the running ones wherever they belong.
    fn attach(&mut self) -> Result<(), Error>;

    /// The number by which programs know the node's own network namespace.
    fn namespace_cookie(&self) -> Result<u64, Error>;

    /// The largest packet, in bytes with its IP header, that every device with programs takes.
    fn mtu(&self) -> Result<u32, Error>;

    /// Everything a map holds, in no order; empty if the map does not exist yet.
    fn entries(&mut self, map: &str) -> Result<Entries, Error>;

    /// Adds or replaces. After an error some of them may be there.
    fn put(&mut self, map: &str, entries: &Entries) -> Result<(), Error>;

    /// Removes; what is absent stays absent. After an error some of them may be gone.
    fn remove(&mut self, map: &str, keys: &[u8]) -> Result<(), Error>;
}
