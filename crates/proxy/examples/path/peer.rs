//! The rules that kube-proxy's nftables mode makes, for figures beside ours: a chain for each Service port, one for each of
//! its endpoints, and an anonymous map that picks. Loaded by `nft -f`, as kube-proxy does.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::process::{Command, Stdio};

use linux::netns::Netns;

use crate::Failure;

/// One Service port with its endpoints, all of IPv4.
pub struct Service {
    pub number: usize,
    pub address: IpAddr,
    pub port: u16,
    pub endpoints: Vec<Ipv4Addr>,
}

impl Service {
    /// kube-proxy puts a hash before the readable name.
    fn chain(&self) -> String {
        format!("service-{:08X}-default/s{}/tcp/", hash(self.number as u64), self.number)
    }

    fn endpoint_chain(&self, endpoint: Ipv4Addr) -> String {
        let hash = hash(self.number as u64 ^ (u64::from(u32::from(endpoint)) << 20));
        format!("endpoint-{hash:08X}-default/s{}/tcp/__{endpoint}/{}", self.number, self.port)
    }

    /// Its chains must be there, and those of its endpoints, before a rule names them.
    fn chains(&self, text: &mut String) {
        let _ = writeln!(text, "add chain ip kube-proxy {}", self.chain());
        for endpoint in &self.endpoints {
            let _ = writeln!(text, "add chain ip kube-proxy {}", self.endpoint_chain(*endpoint));
        }
    }

    fn pick(&self, text: &mut String) {
        let (chain, address) = (self.chain(), self.address);
        let _ = writeln!(
            text,
            "add rule ip kube-proxy {chain} ip daddr {address} tcp dport 80 ip saddr != 10.244.0.0/14 jump mark-for-masquerade"
        );
        let targets: Vec<String> = self.endpoints.iter().map(|endpoint| self.endpoint_chain(*endpoint)).collect();
        let targets: Vec<String> =
            targets.iter().enumerate().map(|(at, chain)| format!("{at} : goto {chain}")).collect();
        let _ = writeln!(
            text,
            "add rule ip kube-proxy {chain} numgen random mod {} vmap {{ {} }}",
            targets.len(),
            targets.join(", ")
        );
    }

    fn translate(&self, endpoint: Ipv4Addr, text: &mut String) {
        let chain = self.endpoint_chain(endpoint);
        let _ = writeln!(text, "add rule ip kube-proxy {chain} ip saddr {endpoint} jump mark-for-masquerade");
        let _ = writeln!(text, "add rule ip kube-proxy {chain} meta l4proto tcp dnat to {endpoint}:{}", self.port);
    }

    /// Everything of it, for a table that does not have it yet.
    fn whole(&self, text: &mut String) {
        self.chains(text);
        self.pick(text);
        for endpoint in &self.endpoints {
            self.translate(*endpoint, text);
        }
        let (address, chain) = (self.address, self.chain());
        let _ = writeln!(text, "add element ip kube-proxy service-ips {{ {address} . tcp . 80 : goto {chain} }}");
        let _ = writeln!(text, "add element ip kube-proxy cluster-ips {{ {address} }}");
    }
}

/// The table of all of them, as at a start.
pub fn load(namespace: &Netns, services: &[Service]) -> Result<(), Failure> {
    let mut text = String::from(FRAME);
    for service in services {
        service.whole(&mut text);
    }
    nft(namespace, &text)
}

/// One endpoint more, or one less: only what the Service's chains say is made anew.
pub fn change(namespace: &Netns, before: &Service, after: &Service) -> Result<(), Failure> {
    let mut text = String::new();
    after.chains(&mut text);
    let _ = writeln!(text, "flush chain ip kube-proxy {}", after.chain());
    after.pick(&mut text);
    for endpoint in after.endpoints.iter().filter(|endpoint| !before.endpoints.contains(endpoint)) {
        after.translate(*endpoint, &mut text);
    }
    for endpoint in before.endpoints.iter().filter(|endpoint| !after.endpoints.contains(endpoint)) {
        let chain = before.endpoint_chain(*endpoint);
        let _ = writeln!(text, "flush chain ip kube-proxy {chain}\ndelete chain ip kube-proxy {chain}");
    }
    nft(namespace, &text)
}

/// What there is once, without what only node ports and load balancers need.
const FRAME: &str = "\
add table ip kube-proxy
add set ip kube-proxy cluster-ips { type ipv4_addr; }
add map ip kube-proxy no-endpoint-services { type ipv4_addr . inet_proto . inet_service : verdict; }
add map ip kube-proxy service-ips { type ipv4_addr . inet_proto . inet_service : verdict; }
add chain ip kube-proxy mark-for-masquerade
add rule ip kube-proxy mark-for-masquerade mark set mark or 0x4000
add chain ip kube-proxy masquerading
add rule ip kube-proxy masquerading mark and 0x4000 == 0 return
add rule ip kube-proxy masquerading mark set mark xor 0x4000
add rule ip kube-proxy masquerading masquerade fully-random
add chain ip kube-proxy services
add rule ip kube-proxy services ip daddr . meta l4proto . th dport vmap @service-ips
add chain ip kube-proxy nat-prerouting { type nat hook prerouting priority dstnat; }
add rule ip kube-proxy nat-prerouting jump services
add chain ip kube-proxy nat-output { type nat hook output priority -100; }
add rule ip kube-proxy nat-output jump services
add chain ip kube-proxy nat-postrouting { type nat hook postrouting priority srcnat; }
add rule ip kube-proxy nat-postrouting jump masquerading
add chain ip kube-proxy service-endpoints-check
add rule ip kube-proxy service-endpoints-check ip daddr . meta l4proto . th dport vmap @no-endpoint-services
add chain ip kube-proxy filter-forward { type filter hook forward priority -110; }
add rule ip kube-proxy filter-forward ct state new jump service-endpoints-check
add chain ip kube-proxy filter-output { type filter hook output priority -110; }
add rule ip kube-proxy filter-output ct state new jump service-endpoints-check
add chain ip kube-proxy cluster-ips-check
add rule ip kube-proxy cluster-ips-check ip daddr @cluster-ips reject
add rule ip kube-proxy filter-forward ct state new jump cluster-ips-check
";

fn nft(namespace: &Netns, text: &str) -> Result<(), Failure> {
    let mut child = namespace
        .run(|| Command::new("nft").args(["-f", "-"]).stdin(Stdio::piped()).stderr(Stdio::piped()).spawn())??;
    child.stdin.take().ok_or("no input")?.write_all(text.as_bytes())?;
    let output = child.wait_with_output()?;
    if output.status.success() {
        Ok(())
    } else {
        Err(format!("nft: {}", String::from_utf8_lossy(&output.stderr).lines().take(5).collect::<String>()).into())
    }
}

/// Spreads names as a hash of them would (splitmix64), so that their order in the kernel's tables is none.
fn hash(number: u64) -> u32 {
    let mut mixed = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ (mixed >> 31)) as u32
}
