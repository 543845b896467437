//! `nodePortAddresses`: on which of the node's addresses node ports answer.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::str::FromStr;

use ipnet::IpNet;

use crate::Mode;

/// One entry of the list: a keyword or a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NodePortAddress {
    /// The first address of each family, of the Node object.
    Primary,
    Localhost,
    All,
    Net(IpNet),
}

impl FromStr for NodePortAddress {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(match text {
            "primary" => NodePortAddress::Primary,
            "localhost" => NodePortAddress::Localhost,
            "all" => NodePortAddress::All,
            _ => {
                let net = text.parse::<IpNet>().map_err(|_| {
                    format!("{text:?} is neither a network such as 192.0.2.0/24 nor primary, localhost or all")
                })?;
                NodePortAddress::Net(net.trunc())
            }
        })
    }
}

impl NodePortAddress {
    fn contains(self, address: IpAddr, primary: &[IpAddr]) -> bool {
        match self {
            NodePortAddress::Primary => primary.contains(&address),
            NodePortAddress::Localhost => address.is_loopback(),
            NodePortAddress::All => true,
            NodePortAddress::Net(net) => net.contains(&address),
        }
    }
}

/// Whether node ports listen everywhere in this mode, localhost included, if nothing is said.
fn listens_everywhere(mode: Mode) -> bool {
    matches!(mode, Mode::Iptables | Mode::Userspace)
}

/// The addresses that a list means on a node whose interfaces hold `held`, in order, the primary ones first. `None`: the
/// mode's default. Modes that listen on the primary addresses by default serve no loopback address.
pub fn node_port_addresses(
    wanted: &[NodePortAddress],
    mode: Mode,
    primary: &[IpAddr],
    held: &[IpAddr],
) -> Option<Vec<IpAddr>> {
    if wanted.is_empty() {
        return None;
    }
    let everywhere = listens_everywhere(mode);
    if (everywhere && wanted.contains(&NodePortAddress::All)) || (!everywhere && wanted == [NodePortAddress::Primary]) {
        return None;
    }
    let others: BTreeSet<IpAddr> = held.iter().filter(|address| !primary.contains(address)).copied().collect();
    let all = primary.iter().copied().chain(others);
    let served = |address: &IpAddr| everywhere || !address.is_loopback();
    let meant = |address: &IpAddr| wanted.iter().any(|entry| entry.contains(*address, primary));
    Some(all.filter(|address| served(address) && meant(address)).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_means_addresses_of_the_node() {
        let parse = |text: &str| text.parse::<IpAddr>().expect(text);
        let primary = ["192.0.2.7", "2001:db8::7"].map(parse);
        let held = ["127.0.0.1", "::1", "198.51.100.4", "192.0.2.7", "192.0.2.8", "2001:db8::7"].map(parse);
        let cases = [
            ("", "default", "default"),
            ("primary", "default", "192.0.2.7 2001:db8::7"),
            ("all", "192.0.2.7 2001:db8::7 192.0.2.8 198.51.100.4", "default"),
            ("0.0.0.0/0", "192.0.2.7 192.0.2.8 198.51.100.4", "192.0.2.7 127.0.0.1 192.0.2.8 198.51.100.4"),
            ("localhost", "", "127.0.0.1 ::1"),
            ("primary localhost", "192.0.2.7 2001:db8::7", "192.0.2.7 2001:db8::7 127.0.0.1 ::1"),
            // No network of a family: none of its addresses, as the list says.
            ("192.0.2.0/24", "192.0.2.7 192.0.2.8", "192.0.2.7 192.0.2.8"),
            ("203.0.113.0/24", "", ""),
        ];
        for (list, nftables, iptables) in cases {
            let wanted: Vec<NodePortAddress> =
                list.split_whitespace().map(|entry| entry.parse().expect("an entry")).collect();
            for (mode, expected) in [(Mode::Nftables, nftables), (Mode::Iptables, iptables)] {
                let found = node_port_addresses(&wanted, mode, &primary, &held);
                let found = found.map_or("default".to_owned(), |all| {
                    all.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
                });
                assert_eq!(found, expected, "{list:?} in {mode}");
            }
        }
        assert!("secondary".parse::<NodePortAddress>().is_err());
    }
}
