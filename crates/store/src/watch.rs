//! A watch over an [`Index`](crate::index::Index): a cursor into its history.
//!
//! There is no queue per watcher. A watcher remembers the revision it has seen and reads on from there when told that
//! there is more; so nothing is lost or repeated, and a slow watcher costs no memory: one that falls out of the
//! history is told `Compacted`.

use std::collections::VecDeque;

use futures::StreamExt;
use tokio::sync::watch;

use crate::index::SharedIndex;
use crate::{Error, Revision, WatchBatch, WatchStream};

/// Batches read per turn, so that a watcher far behind does not hold the index for long.
const TURN: usize = 256;

struct Cursor {
    index: SharedIndex,
    /// The newest revision in the index; it closes with the store.
    revisions: watch::Receiver<Revision>,
    prefix: String,
    seen: Revision,
    ready: VecDeque<WatchBatch>,
}

/// Everything under `prefix` after `from`. `revisions` must be sent each revision after it is applied to `index`.
pub(crate) fn stream(
    index: SharedIndex,
    revisions: watch::Receiver<Revision>,
    prefix: &str,
    from: Revision,
) -> Result<WatchStream, Error> {
    let mut cursor = Cursor { index, revisions, prefix: prefix.to_owned(), seen: from, ready: VecDeque::new() };
    cursor.read()?;
    let stream = futures::stream::unfold(Some(cursor), |cursor| async move {
        let mut cursor = cursor?;
        match cursor.next().await {
            Ok(batch) => Some((Ok(batch), Some(cursor))),
            Err(error) => Some((Err(error), None)),
        }
    });
    Ok(stream.boxed())
}

impl Cursor {
    async fn next(&mut self) -> Result<WatchBatch, Error> {
        loop {
            if let Some(batch) = self.ready.pop_front() {
                return Ok(batch);
            }
            // Marked as seen before reading: a revision applied in between wakes us again.
            let newest = *self.revisions.borrow_and_update();
            self.read()?;
            if self.ready.is_empty() && self.seen >= newest {
                self.revisions.changed().await.map_err(|_| Error::Closed)?;
            }
        }
    }

    fn read(&mut self) -> Result<(), Error> {
        let index = self.index.read().expect("the index is never left locked by a panic");
        let (batches, complete) = index.since(self.seen, &self.prefix, TURN)?;
        self.seen = complete;
        self.ready.extend(batches);
        Ok(())
    }
}
