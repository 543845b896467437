//! iptables as values: rules, and what one run of `iptables-restore --noflush` changes.
//!
//! The kernel's legacy interface and the nft one are only reachable through the tools, so this is the one data path that
//! runs programs: [`Tools`]. [`Fake`] applies the same [`Restore`] in memory and walks a packet through it.

mod fake;
mod rule;
mod tools;

pub use fake::Fake;
pub use rule::{Part, Restore, Rule, Table, TableRestore, Target};
pub use tools::Tools;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot run {program}: {source}; install the package iptables, or use --proxy-mode=nftables")]
    Spawn { program: String, source: std::io::Error },
    #[error(
        "{program} failed: {message}{lines}; compare with what `{program}` takes, nothing of this table was applied"
    )]
    Failed { program: String, message: String, lines: String },
    #[error("sysctl {name}: {source}; node ports on localhost need it")]
    Sysctl { name: &'static str, source: std::io::Error },
    #[error(transparent)]
    Nft(#[from] crate::nft::Error),
    #[error("a thread in the network namespace died; retry")]
    Thread,
    #[error("the fake iptables refuses `{0}`")]
    Fake(String),
}

/// What a data path needs of iptables, for one address family (`v6`) at a time.
pub trait Iptables: Send {
    /// The table as `iptables-save` prints it; empty if nobody has used it.
    fn save(&mut self, v6: bool, table: Table) -> Result<String, Error>;
    /// Applies each table of the input whole or not at all.
    fn restore(&mut self, v6: bool, input: &Restore) -> Result<(), Error>;
    /// Lets connections to 127.0.0.1 be translated (`route_localnet`), as node ports on localhost need.
    fn route_localhost(&mut self) -> Result<(), Error>;
    /// Which tools are in use, and how to look at what they hold.
    fn about(&self) -> String;
}
