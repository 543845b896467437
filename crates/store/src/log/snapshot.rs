//! All keys at one revision in a file, so that the log before it can go.
//!
//! ```text
//! magic | revision u64 | count u64 | per key: key, create u64, mod u64, value | checksum u32 of all before
//! ```

use std::fs;
use std::io::{BufWriter, Write};
use std::path::Path;

use bytes::Bytes;

use super::crc32c;
use super::directory::{Directory, SNAPSHOT};
use super::record::{Reader, put_bytes};
use crate::{Error, KeyValue, Revision};

const MAGIC: &[u8; 8] = b"FLSNAP\x00\x01";

/// Durable when this returns.
pub(crate) fn write(directory: &Directory, revision: Revision, items: &[KeyValue]) -> Result<(), Error> {
    let path = directory.name(revision, SNAPSHOT);
    directory.publish(&path, "snapshot.tmp", |file| {
        let mut file = BufWriter::with_capacity(1 << 20, file);
        let mut checksum = crc32c::Running::new();
        let mut part = Vec::new();
        part.extend_from_slice(MAGIC);
        part.extend_from_slice(&revision.to_le_bytes());
        part.extend_from_slice(&(items.len() as u64).to_le_bytes());
        for kv in items {
            checksum.add(&part);
            file.write_all(&part)?;
            part.clear();
            put_bytes(&mut part, kv.key.as_bytes());
            part.extend_from_slice(&kv.create_revision.to_le_bytes());
            part.extend_from_slice(&kv.mod_revision.to_le_bytes());
            put_bytes(&mut part, &kv.value);
        }
        checksum.add(&part);
        file.write_all(&part)?;
        file.write_all(&checksum.get().to_le_bytes())?;
        file.flush()
    })?;
    Ok(())
}

/// The keys in the snapshot, in order.
pub(crate) fn read(path: &Path, revision: Revision) -> Result<Vec<KeyValue>, Error> {
    let bytes = fs::read(path).map_err(|e| Error::disk("read", path, e))?;
    let corrupt = |offset: usize, reason: &str| Error::Corrupt {
        path: path.to_owned(),
        offset: offset as u64,
        reason: reason.to_owned(),
    };
    let Some((body, checksum)) = bytes.split_last_chunk::<4>() else {
        return Err(corrupt(0, "the snapshot is too short to be one"));
    };
    if crc32c::checksum(&[body]) != u32::from_le_bytes(*checksum) {
        return Err(corrupt(body.len(), "the snapshot's checksum does not match its content"));
    }
    let mut reader = Reader(body);
    let items = items(&mut reader, revision);
    let left = reader.0.len();
    items.filter(|_| left == 0).ok_or_else(|| corrupt(body.len() - left, "the snapshot cannot be understood"))
}

fn items(reader: &mut Reader<'_>, revision: Revision) -> Option<Vec<KeyValue>> {
    if reader.take(MAGIC.len())? != MAGIC || reader.u64()? != revision {
        return None;
    }
    let count = reader.u64()?;
    let mut items = Vec::new();
    for _ in 0..count {
        items.push(KeyValue {
            key: reader.key()?,
            create_revision: reader.u64()?,
            mod_revision: reader.u64()?,
            value: Bytes::copy_from_slice(reader.bytes()?),
        });
    }
    Some(items)
}
