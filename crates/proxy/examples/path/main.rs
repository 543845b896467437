//! Measures the Service data path in namespaces of its own, and prints one JSON object; `cargo xtask bench proxy` runs it.
//!
//! - `path program --mode M --services N --endpoints E`: a cold start, then single changes, through the proxy's own loop
//! - `path die --mode M --how cut|crash|stop --watch on|off [--first-timeout MS]`: one of three endpoints dies under 200
//!   requests per second
//! - `path connect --rounds R --services A,B,… [--modes M,…] [--unwatched on]`: connections from a pod to random Services,
//!   beside no rule at all and beside one constant translation, which is the least that netfilter can do; with `--unwatched`
//!   each mode once more without its watch
//!
//! M is a proxy mode, or `kube-proxy-nftables` for the rules that kube-proxy's mode of that name makes.

mod connect;
mod die;
mod peer;
mod program;
mod world;

use std::collections::BTreeMap;
use std::fmt::{Display, Formatter};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use linux::netns::Netns;
use proxy::Mode;

#[path = "../../tests/proxy/cgroup.rs"]
mod cgroup;

type Failure = Box<dyn std::error::Error + Send + Sync>;

const NODE: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 1);
const CLIENT: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 11);
const SERVER: Ipv4Addr = Ipv4Addr::new(10, 244, 0, 12);
const PORTS: std::ops::Range<u16> = 8080..8085;
/// Services that a client talks to, however many there are.
const DRAWN: usize = 1_000;

fn main() -> Result<(), Failure> {
    let mut arguments = std::env::args().skip(1);
    let what = arguments.next().unwrap_or_default();
    if what == "serve" {
        return die::answer(arguments.next().unwrap_or_default().parse()?);
    }
    linux::memory::keep_large_apart();
    let mut flags = BTreeMap::new();
    while let (Some(name), Some(value)) = (arguments.next(), arguments.next()) {
        flags.insert(name.trim_start_matches("--").to_owned(), value);
    }
    let flag = |name: &str, default: &str| flags.get(name).cloned().unwrap_or_else(|| default.to_owned());
    let number = |name: &str, default: &str| flag(name, default).parse::<usize>();
    let lab = Lab::new()?;
    let printed = match what.as_str() {
        "program" => {
            let rules = flag("mode", "nftables").parse::<Rules>()?;
            program::program(
                &lab,
                rules,
                number("services", "10000")?,
                number("endpoints", "5")?,
                number("changes", "200")?,
            )?
        }
        "connect" => {
            let sizes: Vec<usize> =
                flag("services", "1000,10000").split(',').map(str::parse).collect::<Result<_, _>>()?;
            let rules: Vec<Rules> =
                flag("modes", "nftables,iptables").split(',').map(str::parse).collect::<Result<_, _>>()?;
            let watches: &[bool] = if flag("unwatched", "off") == "on" { &[true, false] } else { &[true] };
            connect::connect(&lab, number("rounds", "5")?, &sizes, &rules, watches, number("peer-limit", "10000")?)?
        }
        "die" => {
            let first_timeout = flags.get("first-timeout").map(|text| text.parse().map(Duration::from_millis));
            let watching =
                proxy::Watching { first_timeout: first_timeout.transpose()?, ..watched(flag("watch", "on") == "on") };
            die::die(&lab, flag("mode", "nftables").parse::<Mode>()?, &flag("how", "crash"), watching)?
        }
        other => return Err(format!("{other:?} is neither program, die nor connect").into()),
    };
    println!("{printed}");
    Ok(())
}

/// Whose rules are measured.
#[derive(Clone, Copy, PartialEq)]
enum Rules {
    Ours(Mode),
    /// What kube-proxy's mode of that name makes; ours named iptables makes what kube-proxy's does.
    KubeProxyNftables,
}

impl Rules {
    /// Each connection pays for how many there are, or the load takes minutes, or each Service is a socket.
    fn are_few(self) -> bool {
        matches!(self, Rules::KubeProxyNftables | Rules::Ours(Mode::Iptables | Mode::Userspace))
    }
}

impl FromStr for Rules {
    type Err = proxy::Error;

    fn from_str(text: &str) -> Result<Self, proxy::Error> {
        if text == "kube-proxy-nftables" { Ok(Rules::KubeProxyNftables) } else { text.parse().map(Rules::Ours) }
    }
}

impl Display for Rules {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Rules::Ours(mode) => mode.fmt(f),
            Rules::KubeProxyNftables => f.write_str("kube-proxy-nftables"),
        }
    }
}

/// The watch, or none.
fn watched(is_on: bool) -> proxy::Watching {
    match is_on {
        true => proxy::Watching::default(),
        false => proxy::Watching { ejection: false, retry: false, traffic: false, ..proxy::Watching::default() },
    }
}

/// A directory for pins of namespaces; all of them go with it.
struct Lab {
    dir: PathBuf,
}

impl Lab {
    fn new() -> Result<Lab, Failure> {
        let dir = std::env::temp_dir().join(format!("fairlead-path-{}", std::process::id()));
        std::fs::create_dir_all(&dir)?;
        Ok(Lab { dir })
    }

    fn namespace(&self, name: &str) -> Result<Netns, Failure> {
        Ok(Netns::create(&self.dir.join(name))?)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        for pin in std::fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            // What cannot be unpinned now goes with the machine; the figures are what matters here.
            let _ = Netns::remove(&pin.path());
        }
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

/// Numbers that are the same in every run (xorshift64*).
struct Draw(u64);

impl Draw {
    fn new(seed: u64) -> Draw {
        Draw(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn below(&mut self, limit: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 33) as usize % limit
    }
}
