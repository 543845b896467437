//! What a data directory holds: the newest sound snapshot, and the log from there on.

use std::path::Path;

use super::LogOptions;
use super::directory::{Directory, SEGMENT, SNAPSHOT};
use super::record::Record;
use super::segment::{self, Replayed, Segment};
use super::snapshot;
use crate::Error;
use crate::index::{Decision, HistoryLimits, Index};

pub(crate) struct Recovered {
    pub index: Index,
    /// The one to go on writing to.
    pub segment: Segment,
    /// Bytes of log that the next opening would read as well, were there no snapshot by then.
    pub logged: u64,
}

pub(crate) fn recover(directory: &Directory, options: &LogOptions) -> Result<Recovered, Error> {
    let segments = directory.revisions(SEGMENT)?;
    let (mut index, damage) = newest_snapshot(directory, options.history)?;
    let start = index.revision();
    let Some(first) = segments.iter().rposition(|base| *base <= start) else {
        return match damage {
            Some(error) => Err(error),
            None if segments.is_empty() && start == 1 => begin(directory, index, options),
            None => Err(corrupt(&directory.name(start, SEGMENT), "this segment or one before it is missing")),
        };
    };
    let mut expected = segments[first];
    let mut logged = 0;
    let mut last = None;
    for (position, base) in segments.iter().enumerate().skip(first) {
        let path = directory.name(*base, SEGMENT);
        if *base != expected {
            return Err(corrupt(&path, &format!("the log before it ends at revision {expected}")));
        }
        let is_last = position + 1 == segments.len();
        let replayed = segment::replay(&path, *base, is_last, |record| redo(&mut index, record))?;
        expected = replayed.revision;
        logged += replayed.end;
        last = Some((path, replayed));
    }
    let Some((path, Replayed { revision, end, is_torn })) = last.filter(|(_, last)| last.revision >= start) else {
        let path = directory.name(expected, SEGMENT);
        return Err(corrupt(&path, &format!("the log ends at revision {expected}, its snapshot is of {start}")));
    };
    if is_torn {
        tracing::warn!(path = %path.display(), end, revision, "cut off a write that a crash interrupted");
    }
    let segment = Segment::reopen(&path, end, is_torn)?;
    // What a crash kept from being removed after the snapshot was written.
    directory.remove_before(segments[first], SEGMENT)?;
    directory.remove_before(start, SNAPSHOT)?;
    Ok(Recovered { index, segment, logged })
}

fn corrupt(path: &Path, reason: &str) -> Error {
    Error::Corrupt { path: path.to_owned(), offset: 0, reason: reason.to_owned() }
}

/// An empty log in an empty directory.
fn begin(directory: &Directory, index: Index, options: &LogOptions) -> Result<Recovered, Error> {
    let segment = Segment::create(directory, index.revision(), options.segment_bytes)?;
    Ok(Recovered { index, segment, logged: 0 })
}

/// The index as of the newest snapshot that can be read (else the empty one), and what is wrong with newer ones.
fn newest_snapshot(directory: &Directory, history: HistoryLimits) -> Result<(Index, Option<Error>), Error> {
    let mut damage = None;
    for revision in directory.revisions(SNAPSHOT)?.into_iter().rev() {
        match snapshot::read(&directory.name(revision, SNAPSHOT), revision) {
            Ok(items) => return Ok((Index::restored(revision, items, history), damage)),
            Err(error) => {
                tracing::warn!(%error, "passing over a snapshot");
                damage.get_or_insert(error);
            }
        }
    }
    Ok((Index::new(history), damage))
}

/// Applies a record unless the snapshot has it already.
fn redo(index: &mut Index, record: &Record<'_>) -> Option<()> {
    if record.revision <= index.revision() {
        return Some(());
    }
    match index.decide(record.txn()?) {
        Decision::Change(batch) if batch.revision == record.revision => {
            index.apply(batch);
            Some(())
        }
        _ => None,
    }
}
