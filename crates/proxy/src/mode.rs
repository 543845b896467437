//! The data paths there are, and those there will be.

use std::fmt::{Display, Formatter};
use std::str::FromStr;

use linux::conntrack::Translator;
use services::Selection;

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
        self == Mode::Ebpf || self.translator().is_some()
    }

    /// What shows in the connection table whom the kernel has sent elsewhere; `None`: nothing does.
    pub(crate) fn translator(self) -> Option<Translator> {
        match self {
            Mode::Nftables | Mode::Iptables => Some(Translator::Nat),
            Mode::Ipvs => Some(Translator::Ipvs),
            Mode::Ebpf | Mode::Userspace => None,
        }
    }

    /// What becomes of a Service that says how its endpoints are chosen, where it is not as it says.
    pub(crate) fn ignores(self, selection: Option<Selection>) -> Option<&'static str> {
        match (self, selection?) {
            (Mode::Ebpf, _) => None,
            (Mode::Ipvs, _) => Some(
                "its annotation fairlead.io/endpoint-selection has no effect in the ipvs mode, whose scheduler is that of all Services; \
                 take it away, or use --proxy-mode=ebpf",
            ),
            (_, Selection::Random) => None,
            _ => Some(
                "its annotation fairlead.io/endpoint-selection has no effect in this mode, which has one way to choose; take it away, \
                 or use --proxy-mode=ebpf",
            ),
        }
    }

    /// What becomes of a Service whose endpoints are to answer past the node, where they cannot.
    pub(crate) fn ignores_direct_return(self, asked: Option<bool>) -> Option<&'static str> {
        (self != Mode::Ebpf && asked == Some(true)).then_some(
            "its annotation fairlead.io/dsr has no effect in this mode, whose endpoints answer through the node that was asked; take it \
             away, or use --proxy-mode=ebpf",
        )
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
