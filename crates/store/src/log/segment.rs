//! One file of the log: a header, records, then zeros that wait to be overwritten.
//!
//! The zeros matter: a sync that neither allocates a block nor moves the end of the file costs about half of one that does.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use super::crc32c;
use super::directory::{self, Directory, SEGMENT};
use super::record::{self, Record};
use crate::{Error, Revision};

const MAGIC: &[u8; 8] = b"FLWAL\x00\x00\x01";
/// Magic, the revision before the first record, the checksum of both, zeros up to a multiple of eight.
const HEADER: usize = 24;
const FIRST_ALLOCATION: u64 = 1 << 20;
/// A file grows by what it has, within these: small clusters stay small, and busy ones seldom pay.
const SMALLEST_GROWTH: u64 = 4 << 10;
const LARGEST_GROWTH: u64 = 8 << 20;

static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// The segment that is written to.
#[derive(Debug)]
pub(crate) struct Segment {
    file: File,
    path: PathBuf,
    /// Where the next record goes.
    end: u64,
    /// Up to here the file exists.
    allocated: u64,
}

impl Segment {
    /// A new one, whose first record will be the one after `base`, and which will hold about `size` bytes.
    pub fn create(directory: &Directory, base: Revision, size: u64) -> Result<Self, Error> {
        let allocated = size.clamp(HEADER as u64, FIRST_ALLOCATION);
        let path = directory.name(base, SEGMENT);
        let file = directory.publish(&path, "segment.tmp", |file| {
            file.write_all(&header(base))?;
            fill(file, HEADER as u64, allocated)
        })?;
        Ok(Self { file, path, end: HEADER as u64, allocated })
    }

    /// The last one of a log that was read up to `end`. What follows is cut off if it is anything but zeros.
    pub fn reopen(path: &Path, end: u64, is_torn: bool) -> Result<Self, Error> {
        let disk = |action, source| Error::disk(action, path, source);
        let file = directory::private().open(path).map_err(|e| disk("open", e))?;
        if is_torn {
            file.set_len(end).and_then(|()| file.sync_all()).map_err(|e| disk("cut the torn end of", e))?;
        }
        let allocated = file.metadata().map_err(|e| disk("look at", e))?.len();
        Ok(Self { file, path: path.to_owned(), end, allocated })
    }

    pub fn end(&self) -> u64 {
        self.end
    }

    pub fn has_records(&self) -> bool {
        self.end > HEADER as u64
    }

    /// Writes whole records and syncs them: they survive whatever comes once this has returned.
    pub fn append(&mut self, records: &[u8]) -> Result<(), Error> {
        let after = self.end + records.len() as u64;
        if after > self.allocated {
            let more = self.allocated.clamp(SMALLEST_GROWTH, LARGEST_GROWTH);
            let target = after.max(self.allocated + more);
            fill(&self.file, self.allocated, target).map_err(|e| Error::disk("extend", &self.path, e))?;
            self.allocated = target;
        }
        self.file.write_all_at(records, self.end).map_err(|e| Error::disk("write", &self.path, e))?;
        self.file.sync_data().map_err(|e| Error::disk("sync", &self.path, e))?;
        self.end = after;
        Ok(())
    }

    /// Gives back the zeros at the end; nothing more will be written.
    pub fn seal(self) -> Result<(), Error> {
        self.file.set_len(self.end).map_err(|e| Error::disk("cut the unused end of", &self.path, e))
    }
}

fn header(base: Revision) -> [u8; HEADER] {
    let mut header = [0; HEADER];
    header[..8].copy_from_slice(MAGIC);
    header[8..16].copy_from_slice(&base.to_le_bytes());
    let checksum = crc32c::checksum(&[&header[..16]]);
    header[16..20].copy_from_slice(&checksum.to_le_bytes());
    header
}

fn fill(file: &File, from: u64, to: u64) -> io::Result<()> {
    let mut at = from;
    while at < to {
        let len = usize::try_from(to - at).map_or(ZEROS.len(), |left| left.min(ZEROS.len()));
        file.write_all_at(&ZEROS[..len], at)?;
        at += len as u64;
    }
    Ok(())
}

/// What [`replay`] found.
pub(crate) struct Replayed {
    /// The revision of the last sound record, or `base`.
    pub revision: Revision,
    /// The offset behind it.
    pub end: u64,
    /// Whether anything but zeros follows.
    pub is_torn: bool,
}

/// Gives every sound record of a segment to `each`, in order, and judges what follows the last one.
///
/// In the last segment of a log that may be the torn write of a crash; elsewhere, or if a later record proves that it
/// was once whole, it is damage.
pub(crate) fn replay(
    path: &Path,
    base: Revision,
    is_last: bool,
    mut each: impl FnMut(&Record<'_>) -> Option<()>,
) -> Result<Replayed, Error> {
    let bytes = std::fs::read(path).map_err(|e| Error::disk("read", path, e))?;
    let corrupt = |offset: usize, reason: &str| Error::Corrupt {
        path: path.into(),
        offset: offset as u64,
        reason: reason.into(),
    };
    // A segment gets its name only once its header is synced, so this is never a torn write.
    if !bytes.starts_with(&header(base)) {
        return Err(corrupt(0, "the header of the segment is not what was written"));
    }
    let mut revision = base;
    let mut end = HEADER;
    while let Some(record) = record::decode(&bytes[end..]) {
        if record.revision != revision + 1 {
            return Err(corrupt(end, &format!("revision {} follows revision {revision}", record.revision)));
        }
        each(&record).ok_or_else(|| corrupt(end, "the record cannot be understood"))?;
        revision = record.revision;
        end += record.len();
    }
    let is_torn = bytes[end..].iter().any(|byte| *byte != 0);
    if is_torn && (!is_last || proves_synced(&bytes, end, revision)) {
        return Err(corrupt(end, "the record is not what was written, and is not the last"));
    }
    Ok(Replayed { revision, end: end as u64, is_torn })
}

/// Whether a sound record after `end` says that what is at `end` had been synced before it was written.
fn proves_synced(bytes: &[u8], end: usize, revision: Revision) -> bool {
    let tail = &bytes[end..];
    let last = tail.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
    (1..last).any(|skip| {
        // The revision and group are looked at first: a checksum for every offset would take minutes.
        let fields = tail.get(skip + 8..skip + 24);
        let is_plausible = fields.is_some_and(|fields| {
            let mut reader = record::Reader(fields);
            let (later, group) = (reader.u64().unwrap_or(0), reader.u64().unwrap_or(0));
            later > revision && later - revision <= last as u64 && group > end as u64 && group <= (end + skip) as u64
        });
        is_plausible && record::decode(&tail[skip..]).is_some()
    })
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};

    use super::{HEADER, header, record, replay};
    use crate::index::{Batch, Change};
    use crate::{Error, KeyValue, Revision};

    fn batch(revision: Revision) -> Batch {
        let key: Arc<str> = "key".into();
        let after =
            KeyValue { key: key.clone(), value: "value".into(), create_revision: revision, mod_revision: revision };
        Batch { revision, changes: vec![Change { key, before: None, after: Some(after) }] }
    }

    /// A segment of three records, of which the third begins a group of its own or not, and the second is damaged.
    fn replay_damaged(is_third_apart: bool, is_last: bool) -> Result<(Revision, bool), Error> {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let mut bytes = header(1).to_vec();
        let group = bytes.len() as u64;
        record::encode(&batch(2), group, &mut bytes);
        let second = bytes.len();
        record::encode(&batch(3), group, &mut bytes);
        let third = if is_third_apart { bytes.len() as u64 } else { group };
        record::encode(&batch(4), third, &mut bytes);
        bytes.extend_from_slice(&[0; 100]);
        bytes[second + 30] ^= 1;
        let name = format!("fairlead-segment-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let path = std::env::temp_dir().join(name);
        fs::write(&path, &bytes).expect("the temporary directory can be written");
        let replayed = replay(&path, 1, is_last, |_| Some(()));
        fs::remove_file(&path).expect("the file was just written");
        replayed.map(|replayed| (replayed.revision, replayed.is_torn))
    }

    #[test]
    fn a_torn_group_is_cut_though_a_later_part_of_it_reached_the_disk() {
        assert!(matches!(replay_damaged(false, true), Ok((2, true))));
    }

    #[test]
    fn damage_before_a_later_group_is_no_torn_write() {
        let record = 24 + 4 + 1 + 4 + 3 + 4 + 5;
        let damaged = (HEADER + record) as u64;
        assert!(matches!(replay_damaged(true, true), Err(Error::Corrupt { offset, .. }) if offset == damaged));
    }

    #[test]
    fn only_the_last_segment_can_be_torn() {
        assert!(matches!(replay_damaged(false, false), Err(Error::Corrupt { .. })));
    }
}
