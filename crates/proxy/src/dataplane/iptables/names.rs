//! kube-proxy's chain names.

use services::PortName;
use sha2::{Digest, Sha256};

pub const SERVICES: &str = "KUBE-SERVICES";
pub const EXTERNAL_SERVICES: &str = "KUBE-EXTERNAL-SERVICES";
pub const NODE_PORTS: &str = "KUBE-NODEPORTS";
pub const POSTROUTING: &str = "KUBE-POSTROUTING";
pub const MARK_MASQ: &str = "KUBE-MARK-MASQ";
pub const FORWARD: &str = "KUBE-FORWARD";
pub const PROXY_FIREWALL: &str = "KUBE-PROXY-FIREWALL";
/// kubelet's; kube-proxy writes the same rule into it.
pub const KUBELET_FIREWALL: &str = "KUBE-FIREWALL";

/// Chains that belong to one Service or endpoint.
const OF_SERVICES: [&str; 5] = ["KUBE-SVC-", "KUBE-SVL-", "KUBE-SEP-", "KUBE-FW-", "KUBE-EXT-"];

pub fn is_of_a_service(chain: &str) -> bool {
    OF_SERVICES.iter().any(|prefix| chain.starts_with(prefix))
}

/// The first 16 characters of the hash's base32 (RFC 4648).
fn hash(text: &str) -> String {
    let digest = Sha256::digest(text);
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let bits = digest.iter().take(10).fold(0u128, |bits, byte| bits << 8 | u128::from(*byte));
    (0..16).rev().map(|place| alphabet[(bits >> (place * 5) & 31) as usize] as char).collect()
}

/// The chains of one Service port.
pub struct Names {
    pub cluster: String,
    pub local: String,
    pub external: String,
    pub firewall: String,
    seed: String,
}

impl Names {
    pub fn new(name: &PortName) -> Self {
        let seed = format!("{name}{}", name.protocol);
        let hash = hash(&seed);
        let chain = |kind: &str| format!("KUBE-{kind}-{hash}");
        Names { cluster: chain("SVC"), local: chain("SVL"), external: chain("EXT"), firewall: chain("FW"), seed }
    }

    pub fn endpoint(&self, address: std::net::SocketAddr) -> String {
        format!("KUBE-SEP-{}", hash(&format!("{}{address}", self.seed)))
    }
}

#[cfg(test)]
mod tests {
    use services::Protocol;

    use super::*;

    #[test]
    fn hashes_are_those_of_kube_proxy() {
        let names = Names::new(&PortName {
            namespace: "default".into(),
            service: "nginx-service".into(),
            port: "".into(),
            protocol: Protocol::Tcp,
        });
        assert_eq!(names.cluster, "KUBE-SVC-V2OKYYMBY3REGZOG");
        assert_eq!(names.external, "KUBE-EXT-V2OKYYMBY3REGZOG");
        let endpoint = |text: &str| names.endpoint(text.parse().expect("address"));
        assert_eq!(endpoint("10.244.1.5:80"), "KUBE-SEP-J2DHXTF62PN2AN4F");
        assert_eq!(endpoint("10.244.2.4:80"), "KUBE-SEP-A4R5AW5RLMEQF7RP");
    }
}
