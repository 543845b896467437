//! Notices when somebody else changes the proxy's own nftables table, so that it can be made right again.
//!
//! What another program writes between the reading and the writing of a whole plan is not noticed: for that time nobody
//! listens, since it would make the plan dearer.

use std::os::fd::BorrowedFd;

use linux::nft::{Edit, Events};
use tokio::io::unix::AsyncFd;

use crate::Error;
use crate::dataplane::OwnTable;

/// Listens to changes of one table.
pub(crate) struct Guard {
    events: AsyncFd<Events>,
    table: OwnTable,
}

impl Guard {
    /// Hears nothing until it is told to.
    pub fn open(namespace: Option<BorrowedFd<'_>>, table: OwnTable) -> Result<Self, Error> {
        let events = Events::open(namespace)?.register().map_err(Error::Namespace)?;
        Ok(Guard { events, table })
    }

    pub fn listen(&mut self, listens: bool) -> Result<(), Error> {
        Ok(self.events.get_mut().listen(listens)?)
    }

    /// Waits for a change by somebody else. Loses nothing if it is given up waiting.
    async fn edit(&mut self) -> Result<Edit, Error> {
        loop {
            let mut ready = self.events.readable_mut().await.map_err(Error::Namespace)?;
            let OwnTable { family, name, port } = self.table;
            let edits = ready.get_inner_mut().edits(family, name, port)?;
            ready.clear_ready();
            let all = edits.into_iter().reduce(|one, other| match (one, other) {
                (Some(one), Some(other)) => Some(Edit { rules: one.rules | other.rules, ..other }),
                _ => None,
            });
            match all {
                None => {}
                Some(Some(edit)) => return Ok(edit),
                Some(None) => return Ok(Edit { by: "somebody, too fast to follow,".to_owned(), rules: true }),
            }
        }
    }

    /// The table's name, as `nft list` takes it.
    pub fn table(&self) -> String {
        format!("{} {}", self.table.family, self.table.name)
    }
}

/// The next change by somebody else; never, where nobody listens.
pub(crate) async fn edit(guard: &mut Option<Guard>) -> Result<Edit, Error> {
    match guard {
        Some(guard) => guard.edit().await,
        None => std::future::pending().await,
    }
}
