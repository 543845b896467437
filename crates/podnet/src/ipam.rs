//! Which sandbox holds which address. [`Ipam`] decides; [`IpamFile`] makes the decision durable before anyone hears of it.
//!
//! An address that was freed is given out again as late as possible: a client that still has the old pod's address in a
//! cache, or a connection in the tracker, should meet nobody rather than a stranger.

use std::collections::{BTreeMap, VecDeque};
use std::fs::{self, File};
use std::io::{self, Write};
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use ipnet::IpNet;
use runtime::SandboxNetwork;
use serde::{Deserialize, Serialize};

use crate::PodnetError;

/// The network's own address (the overlay device has it) and the gateway's.
const RESERVED: u64 = 2;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ipam {
    ranges: Vec<Range>,
    held: BTreeMap<String, Holding>,
}

/// A sandbox and its addresses, one of each range.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holding {
    pub pod: SandboxNetwork,
    pub addresses: Vec<IpAddr>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Range {
    #[serde(with = "as_text")]
    cidr: IpNet,
    /// Offset of the first address that was never given out.
    next: u64,
    /// In the order they were freed.
    freed: VecDeque<IpAddr>,
}

impl Ipam {
    pub fn new(cidrs: &[IpNet]) -> Self {
        Self { ranges: cidrs.iter().map(Range::new).collect(), held: BTreeMap::new() }
    }

    /// The same holdings over these ranges: a range that stays keeps its memory.
    pub fn over(mut self, cidrs: &[IpNet]) -> Self {
        let mut old = std::mem::take(&mut self.ranges);
        for cidr in cidrs {
            let kept = old.iter().position(|range| range.cidr == cidr.trunc()).map(|at| old.swap_remove(at));
            self.ranges.push(kept.unwrap_or_else(|| Range::new(cidr)));
        }
        self
    }

    /// The addresses of a sandbox: those it holds, or new ones, one of each range or none at all.
    pub fn allocate(&mut self, pod: &SandboxNetwork) -> Result<Vec<IpAddr>, PodnetError> {
        if let Some(holding) = self.held.get_mut(&pod.id) {
            holding.pod = pod.clone();
            return Ok(holding.addresses.clone());
        }
        if let Some(range) = self.ranges.iter().find(|range| !range.has_free()) {
            return Err(PodnetError::Exhausted { cidr: range.cidr });
        }
        let addresses: Vec<_> = self.ranges.iter_mut().filter_map(Range::take).collect();
        self.held.insert(pod.id.clone(), Holding { pod: pod.clone(), addresses: addresses.clone() });
        Ok(addresses)
    }

    pub fn release(&mut self, id: &str) -> Option<Holding> {
        let holding = self.held.remove(id)?;
        for address in &holding.addresses {
            if let Some(range) = self.ranges.iter_mut().find(|range| range.cidr.contains(address)) {
                range.freed.push_back(*address);
            }
        }
        Some(holding)
    }

    pub fn get(&self, id: &str) -> Option<&Holding> {
        self.held.get(id)
    }

    pub fn holder(&self, address: IpAddr) -> Option<&Holding> {
        self.held.values().find(|holding| holding.addresses.contains(&address))
    }

    /// In the order of sandbox ids.
    pub fn holdings(&self) -> impl Iterator<Item = &Holding> {
        self.held.values()
    }
}

impl Range {
    fn new(cidr: &IpNet) -> Self {
        Self { cidr: cidr.trunc(), next: RESERVED, freed: VecDeque::new() }
    }

    fn has_free(&self) -> bool {
        !self.freed.is_empty() || nth(&self.cidr, self.next).is_some()
    }

    fn take(&mut self) -> Option<IpAddr> {
        match nth(&self.cidr, self.next) {
            Some(address) => {
                self.next += 1;
                Some(address)
            }
            None => self.freed.pop_front(),
        }
    }
}

/// The `n`-th address of a range that a host may have.
pub(crate) fn nth(cidr: &IpNet, n: u64) -> Option<IpAddr> {
    let address = match cidr.network() {
        IpAddr::V4(base) => IpAddr::from(u32::from(base).checked_add(u32::try_from(n).ok()?)?.to_be_bytes()),
        IpAddr::V6(base) => IpAddr::from(u128::from(base).checked_add(u128::from(n))?.to_be_bytes()),
    };
    let is_usable = cidr.contains(&address) && (address.is_ipv6() || address != cidr.broadcast());
    is_usable.then_some(address)
}

/// An [`Ipam`] on disk: a change is there before its caller learns of it.
#[derive(Debug)]
pub(crate) struct IpamFile {
    path: PathBuf,
    ipam: Ipam,
}

impl IpamFile {
    pub(crate) fn open(dir: &Path, cidrs: &[IpNet]) -> Result<Self, PodnetError> {
        let path = dir.join("ipam.json");
        let read = || -> io::Result<Ipam> {
            fs::create_dir_all(dir)?;
            match fs::read(&path) {
                Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::other),
                Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Ipam::default()),
                Err(error) => Err(error),
            }
        };
        let ipam = read().map_err(|source| PodnetError::State { path: path.clone(), source })?.over(cidrs);
        Ok(Self { path, ipam })
    }

    pub(crate) fn ipam(&self) -> &Ipam {
        &self.ipam
    }

    /// Either the change is made and written, or neither.
    pub(crate) fn change<T>(
        &mut self,
        change: impl FnOnce(&mut Ipam) -> Result<T, PodnetError>,
    ) -> Result<T, PodnetError> {
        let mut after = self.ipam.clone();
        let outcome = change(&mut after)?;
        if after != self.ipam {
            self.write(&after).map_err(|source| PodnetError::State { path: self.path.clone(), source })?;
            self.ipam = after;
        }
        Ok(outcome)
    }

    fn write(&self, ipam: &Ipam) -> io::Result<()> {
        let new = self.path.with_extension("json.new");
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec(ipam).map_err(io::Error::other)?)?;
        file.sync_data()?;
        fs::rename(&new, &self.path)?;
        // The new name is in the directory only when the directory is on disk, too.
        self.path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
    }
}

mod as_text {
    //! A range as the string people write.

    use ipnet::IpNet;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(net: &IpNet, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(net)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<IpNet, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pod(id: &str) -> SandboxNetwork {
        SandboxNetwork {
            id: id.into(),
            namespace: "default".into(),
            name: id.into(),
            netns: "/proc/1/ns/net".into(),
            port_mappings: Vec::new(),
        }
    }

    fn texts(addresses: &[IpAddr]) -> Vec<String> {
        addresses.iter().map(ToString::to_string).collect()
    }

    fn cidrs(all: &[&str]) -> Vec<IpNet> {
        all.iter().map(|text| text.parse().expect("a range")).collect()
    }

    #[test]
    fn a_pod_gets_one_address_of_each_family_and_the_same_when_asked_again() {
        let mut ipam = Ipam::new(&cidrs(&["10.244.0.0/24", "fd00:10:244::/64"]));
        let first = ipam.allocate(&pod("a")).expect("addresses");
        assert_eq!(texts(&first), ["10.244.0.2", "fd00:10:244::2"]);
        assert_eq!(ipam.allocate(&pod("a")).expect("the same"), first);
        assert_eq!(ipam.holder(first[1]).map(|holding| holding.pod.id.as_str()), Some("a"));
    }

    #[test]
    fn a_freed_address_is_the_last_to_be_given_out_again() {
        let mut ipam = Ipam::new(&cidrs(&["10.0.0.0/29"]));
        let take = |ipam: &mut Ipam, id: &str| ipam.allocate(&pod(id)).map(|all| texts(&all).concat());
        for id in ["a", "b", "c"] {
            take(&mut ipam, id).expect("an address");
        }
        ipam.release("b");
        ipam.release("a");
        assert!(ipam.release("a").is_none());
        let rest: Vec<_> = ["d", "e", "f", "g"].map(|id| take(&mut ipam, id).expect("an address")).into();
        assert_eq!(rest, ["10.0.0.5", "10.0.0.6", "10.0.0.3", "10.0.0.2"]);
        assert!(matches!(take(&mut ipam, "h"), Err(PodnetError::Exhausted { .. })));
    }

    #[test]
    fn a_family_without_a_free_address_costs_the_other_nothing() {
        let mut ipam = Ipam::new(&cidrs(&["fd00::/64", "10.0.0.0/30"]));
        ipam.allocate(&pod("a")).expect("the only pod");
        let before = ipam.clone();
        assert!(ipam.allocate(&pod("b")).is_err());
        assert_eq!(ipam, before);
    }

    #[test]
    fn what_was_given_out_is_known_after_a_restart_also_over_other_ranges() {
        let dir = std::env::temp_dir().join(format!("fairlead-ipam-{}", std::process::id()));
        let ranges = cidrs(&["10.244.0.0/24"]);
        let mut file = IpamFile::open(&dir, &ranges).expect("a new file");
        let held = file.change(|ipam| ipam.allocate(&pod("a"))).expect("an address");
        file.change(|ipam| ipam.allocate(&pod("b"))).expect("an address");
        file.change(|ipam| Ok(ipam.release("b"))).expect("released");
        let again = IpamFile::open(&dir, &ranges).expect("the same file");
        assert_eq!(again.ipam(), file.ipam());
        let mut moved = IpamFile::open(&dir, &cidrs(&["10.244.7.0/24"])).expect("the same file");
        assert_eq!(moved.ipam().get("a").map(|holding| &holding.addresses), Some(&held));
        assert_eq!(texts(&moved.change(|ipam| ipam.allocate(&pod("c"))).expect("an address")), ["10.244.7.2"]);
        fs::remove_dir_all(dir).expect("cleaned up");
    }
}
