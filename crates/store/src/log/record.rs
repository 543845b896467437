//! One transaction as bytes in the log.
//!
//! ```text
//! length u32 | checksum u32 | revision u64 | group u64 | payload
//! payload: count u32, then per change: 1 key value (put) or 0 key (delete); key and value: length u32, bytes
//! ```
//! All numbers are little endian; the checksum covers everything but itself. `group` is the offset in the segment at which the
//! record's group of writes began. All before it was synced before the record was written, so a sound record
//! proves that damage before its group is no torn write.

use std::sync::Arc;

use bytes::Bytes;

use super::crc32c;
use crate::index::Batch;
use crate::{Op, Revision, Txn};

pub(crate) const HEADER: usize = 24;

/// The longest payload, so that a damaged length is seen as such.
pub(crate) const MAX_PAYLOAD: usize = 32 << 20;

pub(crate) struct Record<'a> {
    pub revision: Revision,
    pub payload: &'a [u8],
}

impl Record<'_> {
    pub fn len(&self) -> usize {
        HEADER + self.payload.len()
    }

    /// The transaction it records, or nothing if a sound checksum covers bytes that no version of ours writes.
    pub fn txn(&self) -> Option<Txn> {
        let mut reader = Reader(self.payload);
        let count = reader.u32()?;
        let mut txn = Txn::new();
        for _ in 0..count {
            txn.ops.push(match reader.u8()? {
                1 => Op::Put { key: reader.string()?, value: Bytes::copy_from_slice(reader.bytes()?) },
                0 => Op::Delete { key: reader.string()? },
                _ => return None,
            });
        }
        reader.is_empty().then_some(txn)
    }
}

/// How long the payload of a transaction can become.
pub(crate) fn payload_len(txn: &Txn) -> usize {
    let len = |op: &Op| match op {
        Op::Put { key, value } => 9 + key.len() + value.len(),
        Op::Delete { key } => 5 + key.len(),
    };
    4 + txn.ops.iter().map(len).sum::<usize>()
}

/// Appends the record of `batch`, whose payload must not exceed [`MAX_PAYLOAD`].
pub(crate) fn encode(batch: &Batch, group: u64, into: &mut Vec<u8>) {
    let start = into.len();
    into.extend_from_slice(&[0; 8]);
    into.extend_from_slice(&batch.revision.to_le_bytes());
    into.extend_from_slice(&group.to_le_bytes());
    put_u32(into, batch.changes.len());
    for change in &batch.changes {
        into.push(u8::from(change.after.is_some()));
        put_bytes(into, change.key.as_bytes());
        if let Some(kv) = &change.after {
            put_bytes(into, &kv.value);
        }
    }
    let length = u32_of(into.len() - start - HEADER).to_le_bytes();
    let checksum = crc32c::checksum(&[&length, &into[start + 8..]]).to_le_bytes();
    into[start..start + 4].copy_from_slice(&length);
    into[start + 4..start + 8].copy_from_slice(&checksum);
}

/// The record at the start of `bytes`, if a whole and sound one is there.
pub(crate) fn decode(bytes: &[u8]) -> Option<Record<'_>> {
    let mut reader = Reader(bytes);
    let length = reader.u32()?;
    let checksum = reader.u32()?;
    let revision = reader.u64()?;
    // Where its group began: read by recovery from the raw bytes.
    reader.u64()?;
    let len = usize::try_from(length).ok().filter(|len| *len >= 4 && *len <= MAX_PAYLOAD)?;
    let payload = reader.take(len)?;
    let sound = crc32c::checksum(&[&length.to_le_bytes(), &bytes[8..HEADER + len]]) == checksum;
    sound.then_some(Record { revision, payload })
}

fn u32_of(len: usize) -> u32 {
    u32::try_from(len).expect("lengths are checked against MAX_PAYLOAD before they are encoded")
}

pub(crate) fn put_u32(into: &mut Vec<u8>, number: usize) {
    into.extend_from_slice(&u32_of(number).to_le_bytes());
}

pub(crate) fn put_bytes(into: &mut Vec<u8>, bytes: &[u8]) {
    put_u32(into, bytes.len());
    into.extend_from_slice(bytes);
}

/// Takes numbers and strings off the front of bytes; `None` once they do not suffice.
pub(crate) struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn take(&mut self, len: usize) -> Option<&'a [u8]> {
        let (taken, rest) = self.0.split_at_checked(len)?;
        self.0 = rest;
        Some(taken)
    }

    pub fn u8(&mut self) -> Option<u8> {
        self.take(1).map(|bytes| bytes[0])
    }

    pub fn u32(&mut self) -> Option<u32> {
        self.take(4)?.try_into().ok().map(u32::from_le_bytes)
    }

    pub fn u64(&mut self) -> Option<u64> {
        self.take(8)?.try_into().ok().map(u64::from_le_bytes)
    }

    pub fn bytes(&mut self) -> Option<&'a [u8]> {
        let len = usize::try_from(self.u32()?).ok()?;
        self.take(len)
    }

    pub fn string(&mut self) -> Option<String> {
        std::str::from_utf8(self.bytes()?).ok().map(str::to_owned)
    }

    pub fn key(&mut self) -> Option<Arc<str>> {
        std::str::from_utf8(self.bytes()?).ok().map(Arc::from)
    }
}
