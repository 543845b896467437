//! What can go wrong between the table and the kernel.

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("--proxy-mode={0} does not exist yet; use nftables or iptables")]
    LaterMode(&'static str),
    #[error("--proxy-mode={0:?} is no proxy mode; use nftables or iptables")]
    UnknownMode(String),
    #[error(transparent)]
    Nft(#[from] linux::nft::Error),
    #[error("the thread of a commit died: {0}; the commit is repeated")]
    Commit(tokio::task::JoinError),
}
