//! The chains that are there without any Service, and the jumps into them from the built-in ones.

use std::fmt::{Display, Formatter};
use std::net::{IpAddr, Ipv4Addr};

use ipnet::{IpNet, Ipv4Net};
use linux::iptables::{Part, Rule, Table, Target};

use super::names::{
    EXTERNAL_SERVICES, FORWARD, KUBELET_FIREWALL, MARK_MASQ, NODE_PORTS, POSTROUTING, PROXY_FIREWALL, SERVICES,
};
use crate::NodeView;

const NODE_PORTS_COMMENT: &str = "kubernetes service nodeports; NOTE: this must be the last rule in this chain";

/// What does not depend on Services, for one node.
#[derive(Clone, Debug, PartialEq)]
pub struct Base {
    /// Whether the node has IPv4 and IPv6.
    pub families: [bool; 2],
    node_port_addresses: Option<Vec<IpAddr>>,
    /// Node ports answer on 127.0.0.1, which the kernel must be told to route.
    localhost_node_ports: bool,
    /// The bit of a packet's mark that asks for masquerading in postrouting.
    masquerade: u32,
}

fn comment(text: &str) -> Part {
    Part::Comment(text.to_owned())
}

fn jump(parts: impl IntoIterator<Item = Part>, chain: &str) -> Rule {
    Rule { parts: parts.into_iter().collect(), target: Target::Jump(chain.to_owned()) }
}

fn localhost() -> IpNet {
    IpNet::V4(Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8))
}

impl Base {
    pub fn new(node: &NodeView) -> Self {
        let has = |v6: bool| {
            node.addresses.iter().any(|address| address.is_ipv6() == v6) || node.pod_cidrs(v6).next().is_some()
        };
        let families = [has(false), has(true)];
        let loopback = |address: &IpAddr| address.is_ipv4() && address.is_loopback();
        let on_localhost = node.node_port_addresses.as_ref().is_none_or(|all| all.iter().any(loopback));
        Base {
            families,
            node_port_addresses: node.node_port_addresses.clone(),
            localhost_node_ports: node.localhost_node_ports && on_localhost && families[0],
            masquerade: 1 << node.masquerade_bit,
        }
    }

    pub fn has_localhost_node_ports(&self) -> bool {
        self.localhost_node_ports
    }

    /// Chains of a table that every commit writes anew.
    pub fn chains(&self, table: Table, v6: bool) -> Vec<&'static str> {
        match table {
            Table::Nat => vec![SERVICES, NODE_PORTS, POSTROUTING, MARK_MASQ],
            Table::Filter => {
                let mut chains = vec![SERVICES, EXTERNAL_SERVICES, FORWARD, NODE_PORTS, PROXY_FIREWALL];
                if !v6 && self.has_localhost_node_ports() {
                    chains.push(KUBELET_FIREWALL);
                }
                chains
            }
        }
    }

    /// Jumps from built-in chains, in the order in which kube-proxy puts each at the head.
    pub fn jumps(&self, table: Table, v6: bool) -> Vec<(&'static str, Rule)> {
        let new = || Part::CtState { states: "NEW", not: false };
        let external = "kubernetes externally-visible service portals";
        let portals = "kubernetes service portals";
        let firewall = "kubernetes load balancer firewall";
        match table {
            Table::Nat => vec![
                ("OUTPUT", jump([comment(portals)], SERVICES)),
                ("PREROUTING", jump([comment(portals)], SERVICES)),
                ("POSTROUTING", jump([comment("kubernetes postrouting rules")], POSTROUTING)),
            ],
            Table::Filter => {
                let mut jumps = vec![
                    ("INPUT", jump([new(), comment(external)], EXTERNAL_SERVICES)),
                    ("FORWARD", jump([new(), comment(external)], EXTERNAL_SERVICES)),
                    ("INPUT", jump([comment("kubernetes health check service ports")], NODE_PORTS)),
                    ("FORWARD", jump([new(), comment(portals)], SERVICES)),
                    ("OUTPUT", jump([new(), comment(portals)], SERVICES)),
                    ("FORWARD", jump([comment("kubernetes forwarding rules")], FORWARD)),
                    ("INPUT", jump([new(), comment(firewall)], PROXY_FIREWALL)),
                    ("OUTPUT", jump([new(), comment(firewall)], PROXY_FIREWALL)),
                    ("FORWARD", jump([new(), comment(firewall)], PROXY_FIREWALL)),
                ];
                if !v6 && self.has_localhost_node_ports() {
                    jumps.push(("INPUT", jump([], KUBELET_FIREWALL)));
                    jumps.push(("OUTPUT", jump([], KUBELET_FIREWALL)));
                }
                jumps
            }
        }
    }

    /// Rules before those of the Services.
    pub fn first(&self, table: Table, v6: bool) -> Vec<(&'static str, Rule)> {
        let rule = |parts: Vec<Part>, target| Rule { parts, target };
        match table {
            Table::Nat => vec![
                (POSTROUTING, rule(vec![Part::Mark { bits: self.masquerade, not: true }], Target::Return)),
                // The packet may come by again, and must not be masqueraded twice.
                (POSTROUTING, rule(vec![], Target::MarkXor(self.masquerade))),
                (
                    POSTROUTING,
                    rule(
                        vec![comment("kubernetes service traffic requiring SNAT")],
                        Target::Masquerade { random_fully: true },
                    ),
                ),
                (MARK_MASQ, rule(vec![], Target::MarkOr(self.masquerade))),
            ],
            Table::Filter if !v6 && self.has_localhost_node_ports() => {
                // Routing 127.0.0.0/8 would let neighbours reach what listens on localhost only.
                let parts = vec![
                    comment("block incoming localnet connections"),
                    Part::Destination { net: localhost(), not: false },
                    Part::Source { net: localhost(), not: true },
                    Part::CtState { states: "RELATED,ESTABLISHED,DNAT", not: true },
                ];
                vec![(KUBELET_FIREWALL, rule(parts, Target::Drop))]
            }
            Table::Filter => Vec::new(),
        }
    }

    /// Rules after those of the Services.
    pub fn last(&self, table: Table, v6: bool) -> Vec<(&'static str, Rule)> {
        match (table, &self.node_port_addresses) {
            (Table::Nat, None) => {
                let mut parts = vec![comment(NODE_PORTS_COMMENT), Part::DestinationTypeLocal];
                if v6 {
                    parts.push(Part::Destination { net: IpAddr::V6(std::net::Ipv6Addr::LOCALHOST).into(), not: true });
                } else if !self.localhost_node_ports {
                    parts.push(Part::Destination { net: localhost(), not: true });
                }
                vec![(SERVICES, jump(parts, NODE_PORTS))]
            }
            (Table::Nat, Some(addresses)) => {
                // The kernel routes no packet from ::1.
                let usable = |address: &IpAddr| !address.is_loopback() || (!v6 && self.localhost_node_ports);
                let mine = addresses.iter().filter(|address| address.is_ipv6() == v6 && usable(address));
                let to = |address: &IpAddr| Part::Destination { net: (*address).into(), not: false };
                mine.map(|address| (SERVICES, jump([comment(NODE_PORTS_COMMENT), to(address)], NODE_PORTS))).collect()
            }
            (Table::Filter, _) => vec![
                (FORWARD, Rule { parts: vec![Part::CtState { states: "INVALID", not: false }], target: Target::Drop }),
                (
                    FORWARD,
                    Rule {
                        parts: vec![
                            comment("kubernetes forwarding rules"),
                            Part::Mark { bits: self.masquerade, not: false },
                        ],
                        target: Target::Accept,
                    },
                ),
                (
                    FORWARD,
                    Rule {
                        parts: vec![
                            comment("kubernetes forwarding conntrack rule"),
                            Part::CtState { states: "RELATED,ESTABLISHED", not: false },
                        ],
                        target: Target::Accept,
                    },
                ),
            ],
        }
    }
}

impl Display for Base {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        for (v6, _) in [false, true].into_iter().zip(self.families).filter(|(_, used)| *used) {
            writeln!(f, "# {}", if v6 { "IPv6" } else { "IPv4" })?;
            for table in [Table::Filter, Table::Nat] {
                writeln!(f, "*{table}")?;
                let rules = [self.jumps(table, v6), self.first(table, v6), self.last(table, v6)].concat();
                for (chain, rule) in rules {
                    writeln!(f, "-A {chain} {rule}")?;
                }
            }
        }
        Ok(())
    }
}
