//! What is changed in nftables, as the kernel tells whoever listens (group NFNLGRP_NFTABLES).

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::encode::{MSG_DELSETELEM, MSG_NEWGEN, MSG_NEWSETELEM, TABLE_NAME};
use super::netlink::{Attributes, HEADER, Raw};
use super::{Error, Family};

const GROUP: i32 = 7;
const GENERATION_PROCESS: u16 = 2;
const GENERATION_NAME: u16 = 3;

/// A transaction of somebody else that touched a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Edit {
    /// The program and its process id, as the kernel knows them.
    pub by: String,
    /// More than elements of sets and maps.
    pub rules: bool,
}

/// The changes of one network namespace. Whoever listens makes every transaction dearer, by about a microsecond for each
/// element: leave the group for one's own large ones.
pub struct Events {
    raw: Raw,
    /// Of a transaction whose end is not read yet: whether it touched more than elements.
    begun: Option<bool>,
}

impl Events {
    /// Opens the changes of the namespace given, or of the calling thread's; hears nothing yet.
    pub fn open(namespace: Option<BorrowedFd<'_>>) -> Result<Self, Error> {
        Ok(Events { raw: Raw::open(namespace)?, begun: None })
    }

    /// Begins or ceases to hear. What was heard before stays to be read.
    pub fn listen(&mut self, listens: bool) -> Result<(), Error> {
        self.raw.listen(GROUP, listens)
    }

    /// The socket as something to wait for. To be called inside a tokio runtime.
    #[allow(unsafe_code)]
    pub fn register(self) -> std::io::Result<AsyncFd<Self>> {
        // SAFETY: the descriptor is owned by the socket, which never replaces it and closes it only when it is dropped, after
        // the registration.
        Ok(unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) }?)
    }

    /// Whole transactions that touched the table and were not those of the socket with the port `own`. `None` at the end
    /// stands for what the kernel had to leave out.
    pub fn edits(&mut self, family: Family, table: &str, own: u32) -> Result<Vec<Option<Edit>>, Error> {
        let mut edits = Vec::new();
        let begun = &mut self.begun;
        let read = self.raw.messages(|message| {
            let kind = u16::from_ne_bytes([message[4], message[5]]);
            let port = u32::from_ne_bytes([message[12], message[13], message[14], message[15]]);
            let body = &message[HEADER..];
            let attributes = Attributes(body.get(4..).ok_or(Error::Malformed("a short message"))?);
            if kind == MSG_NEWGEN {
                edits.extend(begun.take().map(|rules| Some(Edit { by: process(attributes), rules })));
            } else if port != own && body[0] == family.number() && attributes.string(TABLE_NAME) == Some(table) {
                // Every kind of message has the name of its table in the same attribute.
                *begun.get_or_insert(false) |= ![MSG_NEWSETELEM, MSG_DELSETELEM].contains(&kind);
            }
            Ok(true)
        });
        match read {
            Ok(()) => Ok(edits),
            Err(Error::Socket(cause)) if cause.raw_os_error() == Some(libc::ENOBUFS) => {
                self.begun = None;
                edits.push(None);
                Ok(edits)
            }
            Err(error) => Err(error),
        }
    }
}

fn process(generation: Attributes<'_>) -> String {
    match (generation.string(GENERATION_NAME), generation.u32(GENERATION_PROCESS)) {
        (Some(name), Some(process)) => format!("{name} (process {process})"),
        _ => "somebody".to_owned(),
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.raw.as_fd()
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}
