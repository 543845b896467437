//! nftables as values: tables, chains, rules, sets and elements, committed to the kernel in one place.
//!
//! A [`Transaction`] says what should change and prints itself like `nft` would. [`Socket`] sends it as one netlink
//! batch, which the kernel applies whole or not at all; [`Fake`] applies the same value in memory and can walk a
//! [`Packet`] through it. No program is run: `nft list table` is only needed by people who want to look.
//!
//! - `value`: keys, elements, sets, chains, transactions
//! - `rule`: what a rule may say
//! - `encode`, `expression`, `decode`: values to netlink attributes and back (linux/netfilter/nf_tables.h)
//! - `socket`: one batch out, the verdict of the kernel back
//! - `events`: what others change
//! - `fake`: the same in memory, and the packet tracer

mod decode;
mod display;
mod encode;
mod events;
mod expression;
mod fake;
pub(crate) mod netlink;
mod rule;
mod socket;
mod value;

pub use events::{Edit, Events};
pub use fake::{Divert, Fake, Fate, Packet};
pub use rule::{ADDRESS_LOCAL, Reject, Rule, Statement, TCP_RST, TCP_SYN, Value, ct_state, ct_status};
pub use socket::Socket;
pub use value::{
    Base, Chain, ChainKind, DataType, Datum, Element, ElementData, Family, Hook, Key, Op, Set, SetData, Transaction,
    Verdict,
};

/// What can go wrong between a transaction and the kernel.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot open a netfilter socket: {0}; the nftables mode needs CAP_NET_ADMIN in this network namespace")]
    Open(std::io::Error),
    #[error("netfilter socket: {0}; look at `dmesg` for what the kernel refused")]
    Socket(std::io::Error),
    #[error(
        "the kernel refused `{item}`: {cause}{hint}; look at `nft list table` for what is there, nothing of this transaction was applied"
    )]
    Refused { item: String, cause: std::io::Error, hint: String },
    #[error("the kernel said nothing about a transaction of {0} messages; retry it")]
    Silent(usize),
    #[error("the kernel's answer is malformed at {0}; is this kernel newer than 5.13?")]
    Malformed(&'static str),
    #[error("the fake kernel fails this commit on purpose; retry it")]
    Injected,
}

impl Error {
    /// The kernel says that the table or set asked for does not exist.
    pub fn is_absent(&self) -> bool {
        matches!(self, Error::Refused { cause, .. } if cause.raw_os_error() == Some(libc::ENOENT))
    }

    /// This process may not look at or change what it asked for: it has no CAP_NET_ADMIN.
    pub fn is_forbidden(&self) -> bool {
        let (Error::Refused { cause, .. } | Error::Open(cause) | Error::Socket(cause)) = self else { return false };
        matches!(cause.raw_os_error(), Some(libc::EPERM | libc::EACCES))
    }
}

/// What a data path needs of nftables. The kernel implements it, and so does [`Fake`].
pub trait Nft: Send {
    /// Applies the whole transaction or nothing of it.
    fn commit(&mut self, transaction: &Transaction) -> Result<(), Error>;
    /// The comment of the table, `None` if there is no such table.
    fn table_comment(&mut self, family: Family, table: &str) -> Result<Option<String>, Error>;
    /// The names of the chains of the table, in no order.
    fn chains(&mut self, family: Family, table: &str) -> Result<Vec<String>, Error>;
    /// The names of the sets and maps of the table, in no order.
    fn sets(&mut self, family: Family, table: &str) -> Result<Vec<String>, Error>;
    /// What a set or map holds now.
    fn elements(&mut self, family: Family, table: &str, set: &Set) -> Result<Vec<Element>, Error>;
    /// Takes the table out; whether it was there.
    fn remove_table(&mut self, family: Family, table: &str) -> Result<bool, Error> {
        if self.table_comment(family, table)?.is_none() {
            return Ok(false);
        }
        self.commit(&Transaction { family, table: table.into(), ops: vec![Op::DeleteTable] })?;
        Ok(true)
    }
    /// How [`Events`] names this socket; `None` where there are none.
    fn port(&self) -> Option<u32> {
        None
    }
}
