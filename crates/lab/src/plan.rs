//! Who has which address: computed from the ranges alone, so that every part of a cluster agrees without asking.

use std::net::IpAddr;
use std::path::PathBuf;

use ipnet::IpNet;
use serde::{Deserialize, Serialize};

/// A node's share of the pod range, as Kubernetes' `--node-cidr-mask-size` defaults have it.
const NODE_MASK_V4: u8 = 24;
const NODE_MASK_V6: u8 = 64;

/// Where clients from outside the cluster live: TEST-NET-3 and a documentation prefix, which no real network uses.
const OUTSIDE: [&str; 2] = ["203.0.113.0/24", "2001:db8:203::/64"];
const OUTSIDE_CLIENT: u128 = 9;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum PlanError {
    #[error("a cluster needs at least one node; pass --nodes 1 or more")]
    NoNodes,
    #[error("{what} {cidrs:?} has two ranges of one family; give one IPv4 range, one IPv6 range, or one of each")]
    Families { what: &'static str, cidrs: Vec<IpNet> },
    #[error("{what} {cidr} has no node range of its family; add one with --node-cidr")]
    NoNodeRange { what: &'static str, cidr: IpNet },
    #[error("{what} {cidr} is too small for {nodes} nodes; choose a shorter prefix")]
    TooSmall { what: &'static str, cidr: IpNet, nodes: u32 },
    #[error("{first} and {second} overlap; choose ranges that do not")]
    Overlap { first: IpNet, second: IpNet },
}

/// What a lab is made from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LabConfig {
    pub data_dir: PathBuf,
    pub nodes: u32,
    #[serde(with = "as_text")]
    pub node_cidrs: Vec<IpNet>,
    #[serde(with = "as_text")]
    pub pod_cidrs: Vec<IpNet>,
    #[serde(with = "as_text")]
    pub service_cidrs: Vec<IpNet>,
    /// Nodes and pods reach the real network.
    #[serde(default)]
    pub uplink: bool,
}

impl LabConfig {
    /// Dual stack, with the address plan that every document and test of the project uses.
    pub fn new(data_dir: impl Into<PathBuf>, nodes: u32) -> Self {
        let nets = |texts: [&str; 2]| texts.map(|text| text.parse::<IpNet>().expect("a literal range")).to_vec();
        Self {
            data_dir: data_dir.into(),
            nodes,
            node_cidrs: nets(["192.168.49.0/24", "fd00:c0a8:31::/64"]),
            pod_cidrs: nets(["10.244.0.0/16", "fd00:10:244::/56"]),
            service_cidrs: nets(["10.96.0.0/12", "fd00:10:96::/112"]),
            uplink: false,
        }
    }

    pub fn has_ipv6(&self) -> bool {
        self.node_cidrs.iter().any(|cidr| cidr.addr().is_ipv6())
    }
}

/// Addresses carry the length of their network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// The switch, which is also the nodes' router and where the API server listens.
    pub switch: Vec<IpNet>,
    pub nodes: Vec<NodePlan>,
    /// The router's leg towards the outside.
    pub leg: Vec<IpNet>,
    pub outside: Vec<IpNet>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodePlan {
    /// From 1.
    pub index: u32,
    pub name: String,
    pub addresses: Vec<IpNet>,
    pub pod_cidrs: Vec<IpNet>,
}

impl Plan {
    pub fn new(config: &LabConfig) -> Result<Self, PlanError> {
        if config.nodes == 0 {
            return Err(PlanError::NoNodes);
        }
        let outside: Vec<IpNet> = OUTSIDE
            .iter()
            .map(|text| text.parse::<IpNet>().expect("a literal range"))
            .filter(|range| config.node_cidrs.iter().any(|cidr| same_family(cidr, range)))
            .collect();
        check_families(config)?;
        check_overlaps(config, &outside)?;
        let at = |ranges: &[IpNet], n: u128| -> Result<Vec<IpNet>, PlanError> {
            let too_small = |cidr| PlanError::TooSmall { what: "node range", cidr, nodes: config.nodes };
            ranges.iter().map(|cidr| host(cidr, n).ok_or_else(|| too_small(*cidr))).collect()
        };
        let node = |index: u32| -> Result<NodePlan, PlanError> {
            let too_small = |cidr| PlanError::TooSmall { what: "pod range", cidr, nodes: config.nodes };
            let share = |cidr: &IpNet| subnet(cidr, u128::from(index - 1)).ok_or_else(|| too_small(*cidr));
            Ok(NodePlan {
                index,
                name: format!("node-{index}"),
                addresses: at(&config.node_cidrs, u128::from(index) + 1)?,
                pod_cidrs: config.pod_cidrs.iter().map(share).collect::<Result<_, _>>()?,
            })
        };
        Ok(Self {
            switch: at(&config.node_cidrs, 1)?,
            nodes: (1..=config.nodes).map(node).collect::<Result<_, _>>()?,
            leg: at(&outside, 1)?,
            outside: at(&outside, OUTSIDE_CLIENT)?,
        })
    }
}

fn check_families(config: &LabConfig) -> Result<(), PlanError> {
    let ranges = [
        ("node range", &config.node_cidrs),
        ("pod range", &config.pod_cidrs),
        ("service range", &config.service_cidrs),
    ];
    for (what, cidrs) in ranges {
        let fours = cidrs.iter().filter(|cidr| cidr.addr().is_ipv4()).count();
        if fours > 1 || cidrs.len() - fours > 1 {
            return Err(PlanError::Families { what, cidrs: cidrs.clone() });
        }
        if let Some(cidr) = cidrs.iter().find(|cidr| !config.node_cidrs.iter().any(|node| same_family(node, cidr))) {
            return Err(PlanError::NoNodeRange { what, cidr: *cidr });
        }
    }
    Ok(())
}

fn check_overlaps(config: &LabConfig, outside: &[IpNet]) -> Result<(), PlanError> {
    let all: Vec<&IpNet> =
        config.node_cidrs.iter().chain(&config.pod_cidrs).chain(&config.service_cidrs).chain(outside).collect();
    for (position, first) in all.iter().enumerate() {
        if let Some(second) =
            all[position + 1..].iter().find(|second| first.contains(**second) || second.contains(*first))
        {
            return Err(PlanError::Overlap { first: **first, second: **second });
        }
    }
    Ok(())
}

fn same_family(a: &IpNet, b: &IpNet) -> bool {
    a.addr().is_ipv4() == b.addr().is_ipv4()
}

/// The `n`-th address of a range, with the range's length; the last IPv4 address is the broadcast address.
fn host(cidr: &IpNet, n: u128) -> Option<IpNet> {
    let address = match cidr.network() {
        IpAddr::V4(base) => IpAddr::from(u32::try_from(u128::from(u32::from(base)) + n).ok()?.to_be_bytes()),
        IpAddr::V6(base) => IpAddr::from(u128::from(base).checked_add(n)?.to_be_bytes()),
    };
    let is_usable = cidr.contains(&address) && (address.is_ipv6() || address != cidr.broadcast());
    if is_usable { IpNet::new(address, cidr.prefix_len()).ok() } else { None }
}

/// The `n`-th node's share of a pod range.
fn subnet(cidr: &IpNet, n: u128) -> Option<IpNet> {
    let length = if cidr.addr().is_ipv4() { NODE_MASK_V4 } else { NODE_MASK_V6 };
    let free = length.checked_sub(cidr.prefix_len())?;
    if n >> free != 0 {
        return None;
    }
    let base = match cidr.network() {
        IpAddr::V4(base) => {
            let offset = u32::try_from(n).ok()? << (32 - NODE_MASK_V4);
            IpAddr::from((u32::from(base) | offset).to_be_bytes())
        }
        IpAddr::V6(base) => IpAddr::from((u128::from(base) | (n << (128 - NODE_MASK_V6))).to_be_bytes()),
    };
    IpNet::new(base, length).ok()
}

mod as_text {
    //! Ranges as the strings people write.

    use ipnet::IpNet;
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(nets: &[IpNet], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(nets.iter().map(ToString::to_string))
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<IpNet>, D::Error> {
        let texts = Vec::<String>::deserialize(deserializer)?;
        texts.iter().map(|text| text.parse().map_err(serde::de::Error::custom)).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn texts(nets: &[IpNet]) -> Vec<String> {
        nets.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn the_default_plan_is_the_one_of_the_documents() {
        let plan = Plan::new(&LabConfig::new("/tmp/x", 3)).expect("the default plan");
        assert_eq!(texts(&plan.switch), ["192.168.49.1/24", "fd00:c0a8:31::1/64"]);
        assert_eq!(texts(&plan.leg), ["203.0.113.1/24", "2001:db8:203::1/64"]);
        assert_eq!(texts(&plan.outside), ["203.0.113.9/24", "2001:db8:203::9/64"]);
        let last = &plan.nodes[2];
        assert_eq!(last.name, "node-3");
        assert_eq!(texts(&last.addresses), ["192.168.49.4/24", "fd00:c0a8:31::4/64"]);
        assert_eq!(texts(&last.pod_cidrs), ["10.244.2.0/24", "fd00:10:244:2::/64"]);
    }

    #[test]
    fn one_family_alone_has_no_trace_of_the_other() {
        let mut config = LabConfig::new("/tmp/x", 1);
        for ranges in [&mut config.node_cidrs, &mut config.pod_cidrs, &mut config.service_cidrs] {
            ranges.truncate(1);
        }
        let plan = Plan::new(&config).expect("an IPv4 plan");
        assert_eq!(texts(&plan.outside), ["203.0.113.9/24"]);
        assert_eq!(texts(&plan.nodes[0].pod_cidrs), ["10.244.0.0/24"]);
        assert!(!config.has_ipv6());
    }

    #[test]
    fn ranges_that_cannot_work_are_refused_with_the_flag_to_change() {
        let case = |change: fn(&mut LabConfig)| {
            let mut config = LabConfig::new("/tmp/x", 2);
            change(&mut config);
            Plan::new(&config).expect_err("a plan that cannot work").to_string()
        };
        assert!(case(|c| c.nodes = 0).contains("--nodes"));
        assert!(case(|c| c.nodes = 254).contains("node range 192.168.49.0/24 is too small for 254 nodes"));
        assert!(case(|c| c.pod_cidrs = vec!["10.244.0.0/24".parse().unwrap()]).contains("pod range 10.244.0.0/24"));
        assert!(case(|c| c.pod_cidrs = vec!["10.244.0.0/25".parse().unwrap()]).contains("too small"));
        assert!(case(|c| c.pod_cidrs = vec!["10.96.0.0/16".parse().unwrap()]).contains("overlap"));
        assert!(case(|c| c.node_cidrs.truncate(1)).contains("--node-cidr"));
        assert!(case(|c| c.service_cidrs.push("10.200.0.0/16".parse().unwrap())).contains("two ranges"));
    }
}
