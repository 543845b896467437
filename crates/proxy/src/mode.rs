//! The data paths there are, and those there will be.

use std::fmt::{Display, Formatter};
use std::str::FromStr;

use crate::Error;

/// How Services reach the kernel, as `--proxy-mode` names it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mode {
    #[default]
    Nftables,
    Iptables,
    Ipvs,
    Ebpf,
    Userspace,
}

impl Mode {
    /// Whether its connections can be watched: conntrack knows that the kernel translates them, or programs of our own
    /// count them.
    pub(crate) fn is_watched(self) -> bool {
        matches!(self, Mode::Nftables | Mode::Iptables | Mode::Ebpf)
    }

    /// Whether connections that it makes are translated by netfilter for as long as they live.
    pub(crate) fn is_translated_by_netfilter(self) -> bool {
        match self {
            Mode::Nftables | Mode::Iptables | Mode::Ipvs | Mode::Userspace => true,
            Mode::Ebpf => false,
        }
    }
}

impl FromStr for Mode {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        match text {
            "nftables" => Ok(Mode::Nftables),
            "iptables" => Ok(Mode::Iptables),
            "ipvs" => Ok(Mode::Ipvs),
            "ebpf" => Ok(Mode::Ebpf),
            "userspace" => Ok(Mode::Userspace),
            other => Err(Error::UnknownMode(other.to_owned())),
        }
    }
}

impl Display for Mode {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Mode::Nftables => "nftables",
            Mode::Iptables => "iptables",
            Mode::Ipvs => "ipvs",
            Mode::Ebpf => "ebpf",
            Mode::Userspace => "userspace",
        })
    }
}
