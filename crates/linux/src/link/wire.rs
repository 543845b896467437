//! Route netlink messages as bytes: a header, a fixed part that depends on the kind, then attributes.

/// Kinds of messages (linux/rtnetlink.h).
pub const NEW_LINK: u16 = 16;
pub const DEL_LINK: u16 = 17;
pub const GET_LINK: u16 = 18;
pub const NEW_ADDRESS: u16 = 20;
pub const DEL_ADDRESS: u16 = 21;
pub const GET_ADDRESS: u16 = 22;
pub const NEW_ROUTE: u16 = 24;
pub const DEL_ROUTE: u16 = 25;
pub const GET_ROUTE: u16 = 26;
pub const NEW_NEIGHBOUR: u16 = 28;
pub const DEL_NEIGHBOUR: u16 = 29;
pub const GET_NEIGHBOUR: u16 = 30;
pub const GET_NAMESPACE_ID: u16 = 90;

/// Flags of a request (linux/netlink.h).
pub const REQUEST: u16 = 0x1;
pub const ACK: u16 = 0x4;
pub const REPLACE: u16 = 0x100;
pub const EXCLUSIVE: u16 = 0x200;
pub const CREATE: u16 = 0x400;
pub const DUMP: u16 = 0x300;
/// Set by the kernel when what is dumped changed meanwhile, so that the answer may have holes.
pub const DUMP_INTERRUPTED: u16 = 0x10;

pub const ERROR: u16 = 2;
pub const DONE: u16 = 3;

pub const HEADER: usize = 16;

pub fn aligned(length: usize) -> usize {
    length.next_multiple_of(4)
}

/// A request under construction.
pub struct Message {
    bytes: Vec<u8>,
}

impl Message {
    pub fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = Vec::with_capacity(256);
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(flags | REQUEST).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        let mut message = Self { bytes };
        message.raw(fixed);
        message
    }

    /// Bytes without an attribute header, padded.
    pub fn raw(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        self.bytes.resize(aligned(self.bytes.len()), 0);
    }

    pub fn attribute(&mut self, kind: u16, payload: &[u8]) {
        self.nested(kind, |inner| inner.raw(payload));
        // The length in an attribute's header leaves its padding out.
        let start = self.bytes.len() - aligned(payload.len()) - 4;
        self.length_at(start, payload.len() + 4);
    }

    pub fn u8(&mut self, kind: u16, value: u8) {
        self.attribute(kind, &[value]);
    }

    pub fn u32(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_ne_bytes());
    }

    /// A string with its final zero.
    pub fn text(&mut self, kind: u16, value: &str) {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes);
    }

    pub fn nested(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 2]);
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        fill(self);
        self.length_at(start, self.bytes.len() - start);
    }

    fn length_at(&mut self, start: usize, length: usize) {
        let length = u16::try_from(length).expect("our attributes are names, addresses and numbers");
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    pub fn finish(mut self, sequence: u32) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).expect("a request is a few hundred bytes");
        self.bytes[0..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.bytes
    }
}

/// One message of an answer.
pub struct Received<'a> {
    pub kind: u16,
    pub flags: u16,
    pub sequence: u32,
    pub payload: &'a [u8],
}

/// The messages of one datagram; a malformed tail ends the walk.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let length = read_u32(bytes, 0)? as usize;
        if length < HEADER || length > bytes.len() {
            return None;
        }
        let message = Received {
            kind: read_u16(bytes, 4)?,
            flags: read_u16(bytes, 6)?,
            sequence: read_u32(bytes, 8)?,
            payload: &bytes[HEADER..length],
        };
        bytes = &bytes[aligned(length).min(bytes.len())..];
        Some(message)
    })
}

/// The attributes after a fixed part of `fixed` bytes, as (kind, payload); flag bits of the kind are masked out.
pub fn attributes(payload: &[u8], fixed: usize) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = payload.get(aligned(fixed)..).unwrap_or_default();
    std::iter::from_fn(move || {
        let length = usize::from(read_u16(rest, 0)?);
        if length < 4 || length > rest.len() {
            return None;
        }
        let attribute = (read_u16(rest, 2)? & 0x3fff, &rest[4..length]);
        rest = &rest[aligned(length).min(rest.len())..];
        Some(attribute)
    })
}

pub fn read_u16(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

pub fn read_u32(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

pub fn read_text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes.strip_suffix(&[0]).unwrap_or(bytes)).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_survive_the_way_out_and_back_whatever_their_padding() {
        let mut message = Message::new(NEW_LINK, CREATE, &[0; 16]);
        message.text(3, "eth0");
        message.u8(33, 1);
        message.nested(18, |info| {
            info.text(1, "veth");
            info.nested(2, |data| data.u32(4, 1500));
        });
        let bytes = message.finish(7);
        let all: Vec<_> = messages(&bytes).collect();
        assert_eq!(all.len(), 1);
        assert_eq!((all[0].kind, all[0].flags, all[0].sequence), (NEW_LINK, CREATE | REQUEST, 7));
        let top: Vec<_> = attributes(all[0].payload, 16).collect();
        assert_eq!(top[0], (3, b"eth0\0".as_slice()));
        assert_eq!(top[1], (33, [1].as_slice()));
        let info: Vec<_> = attributes(top[2].1, 0).collect();
        assert_eq!(info[0], (1, b"veth\0".as_slice()));
        assert_eq!(attributes(info[1].1, 0).next(), Some((4, 1500u32.to_ne_bytes().as_slice())));
        assert_eq!(bytes.len() % 4, 0);
    }

    #[test]
    fn a_cut_answer_ends_the_walk_without_a_panic() {
        let mut message = Message::new(NEW_LINK, 0, &[0; 16]);
        message.text(3, "eth0");
        let bytes = message.finish(1);
        for cut in 0..bytes.len() {
            assert_eq!(messages(&bytes[..cut]).count(), 0);
            assert!(attributes(&bytes[..cut], 16).count() <= 8);
        }
    }
}
