//! What a rule says, as the kernel's expressions.
//!
//! Registers: sixteen words of four bytes. A rule's scratch values start at word 0; what `Statement::Choose` chose
//! (an address of up to four words and a port) rests in words 11 to 15, where nothing else is computed.

use super::encode::{DATA_VALUE, LIST_ELEM, datum, verdict_attributes};
use super::netlink::Writer;
use super::rule::{Reject, Statement, Value};
use super::value::{Datum, Family};

/// The word where the chosen address starts.
const CHOSEN: u32 = 11;
/// The word where the data of a dynamic element is put together: after a number and its filler were chosen.
const DYNSET_DATA: u32 = 13;

/// The two sides of a connection, as conntrack numbers them.
const ORIGINAL: u8 = 0;
const REPLY: u8 = 1;

/// `meta iifname`, and the kernel's IFNAMSIZ.
const IIFNAME: u32 = 6;
const INTERFACE_NAME_SIZE: usize = 16;

/// The kernel's number of the register that starts at this word.
fn register(word: u32) -> u32 {
    // Whole registers 1 to 4 are what nft expects to see where a value starts at their first word.
    if word.is_multiple_of(4) { 1 + word / 4 } else { 8 + word }
}

/// Words that a value takes.
fn words(value: &Value) -> u32 {
    match value {
        Value::Chosen { words } => *words,
        Value::SourceIp { v6: true } | Value::DestinationIp { v6: true } => 4,
        Value::OriginalDestinationIp { v6: true } | Value::ReplySourceIp { v6: true } => 4,
        Value::Const(datum) => datum.data_type().len().div_ceil(4),
        // Only a lookup as part of a key is asked: those give one number.
        _ => 1,
    }
}

fn is_from_map(value: &Value) -> bool {
    matches!(value, Value::Lookup { .. } | Value::Chosen { .. })
}

/// Appends the expressions of one statement.
pub(super) fn encode(writer: &mut Writer, statement: &Statement) {
    Expressions { writer }.statement(statement);
}

struct Expressions<'a> {
    writer: &'a mut Writer,
}

impl Expressions<'_> {
    fn expression(&mut self, name: &str, body: impl FnOnce(&mut Writer)) {
        let item = self.writer.nest(LIST_ELEM);
        self.writer.string(1, name);
        let data = self.writer.nest(2);
        body(self.writer);
        self.writer.close(data);
        self.writer.close(item);
    }

    fn payload(&mut self, base: u32, offset: u32, length: u32, to: u32) {
        self.expression("payload", |w| {
            w.u32(1, register(to));
            w.u32(2, base);
            w.u32(3, offset);
            w.u32(4, length);
        });
    }

    fn meta(&mut self, key: u32, to: u32) {
        self.expression("meta", |w| {
            w.u32(1, register(to));
            w.u32(2, key);
        });
    }

    fn ct(&mut self, key: u32, side: Option<u8>, to: u32) {
        self.expression("ct", |w| {
            w.u32(1, register(to));
            w.u32(2, key);
            if let Some(side) = side {
                w.u8(3, side);
            }
        });
    }

    fn fib_type(&mut self, flag: u32, to: u32) {
        self.expression("fib", |w| {
            w.u32(1, register(to));
            w.u32(2, 3);
            w.u32(3, flag);
        });
    }

    fn lookup(&mut self, set: &str, from: u32, to: Option<u32>, inverted: bool) {
        self.expression("lookup", |w| {
            w.string(1, set);
            w.u32(2, register(from));
            if let Some(to) = to {
                w.u32(3, to);
            }
            if inverted {
                w.u32(5, 1);
            }
        });
    }

    fn immediate(&mut self, value: &[u8], to: u32) {
        self.expression("immediate", |w| {
            w.u32(1, register(to));
            let data = w.nest(2);
            w.bytes(DATA_VALUE, value);
            w.close(data);
        });
    }

    /// Computes the value into `to`, with words from `scratch` on as room for keys.
    fn load(&mut self, value: &Value, to: u32, scratch: u32) {
        match value {
            Value::Nfproto => self.meta(15, to),
            Value::L4Proto => self.meta(16, to),
            Value::PacketMark => self.meta(3, to),
            Value::SourceIp { v6: false } => self.payload(1, 12, 4, to),
            Value::DestinationIp { v6: false } => self.payload(1, 16, 4, to),
            Value::SourceIp { v6: true } => self.payload(1, 8, 16, to),
            Value::DestinationIp { v6: true } => self.payload(1, 24, 16, to),
            Value::SourcePort => self.payload(2, 0, 2, to),
            Value::DestinationPort => self.payload(2, 2, 2, to),
            Value::OriginalDestinationIp { v6: false } => self.ct(20, Some(ORIGINAL), to),
            Value::OriginalDestinationIp { v6: true } => self.ct(22, Some(ORIGINAL), to),
            Value::OriginalDestinationPort => self.ct(12, Some(ORIGINAL), to),
            Value::ReplySourceIp { v6: false } => self.ct(19, Some(REPLY), to),
            Value::ReplySourceIp { v6: true } => self.ct(21, Some(REPLY), to),
            Value::ReplySourcePort => self.ct(11, Some(REPLY), to),
            Value::TcpFlags => self.payload(2, 13, 1, to),
            Value::IcmpType => self.payload(2, 0, 1, to),
            Value::IcmpCode => self.payload(2, 1, 1, to),
            Value::CtDirection => self.ct(1, None, to),
            Value::CtState => self.ct(0, None, to),
            Value::CtStatus => self.ct(2, None, to),
            Value::FibSourceType => self.fib_type(1, to),
            Value::FibDestinationType => self.fib_type(2, to),
            Value::Random { modulus } => self.expression("numgen", |w| {
                w.u32(1, register(to));
                w.u32(2, *modulus);
                w.u32(3, 1);
                w.u32(4, 0);
            }),
            Value::Const(constant) => {
                let mut bytes = Vec::new();
                datum(&mut bytes, *constant);
                self.immediate(&bytes, to);
            }
            Value::Lookup { key, map } => {
                self.key(key, scratch);
                self.lookup(map, scratch, Some(register(to)), false);
            }
            Value::Chosen { words } => self.copy(CHOSEN, to, *words),
        }
    }

    /// Loads the parts of a key or of an element's data one after the other.
    ///
    /// `nft` before 1.0.7 does not know how wide what comes out of a map is, and aborts when it lists a rule whose key
    /// contains it. So such a part has a constant before it, which is loaded wide enough to lie under both: `nft` then
    /// prints the constant and does not look at what overwrote its end.
    fn key(&mut self, key: &[Value], at: u32) {
        let mut word = at;
        for (index, value) in key.iter().enumerate() {
            let covered = key[index + 1..].iter().take_while(|next| is_from_map(next)).map(words).sum::<u32>();
            match value {
                Value::Const(constant) if covered > 0 => {
                    let mut bytes = Vec::new();
                    datum(&mut bytes, *constant);
                    bytes.resize(bytes.len().next_multiple_of(4) + covered as usize * 4, 0);
                    self.immediate(&bytes, word);
                }
                Value::Chosen { words } => self.copy(CHOSEN, word, *words),
                _ => self.load(value, word, word),
            }
            word += words(value);
        }
    }

    fn compare(&mut self, from: u32, equal: bool, bytes: &[u8]) {
        self.expression("cmp", |w| {
            w.u32(1, register(from));
            w.u32(2, u32::from(!equal));
            let data = w.nest(3);
            w.bytes(DATA_VALUE, bytes);
            w.close(data);
        });
    }

    fn dynset(&mut self, operation: u32, map: &str, key: &[Value], data: &[Value], timeout_ms: Option<u64>) {
        self.key(data, DYNSET_DATA);
        self.key(key, 0);
        self.expression("dynset", |w| {
            w.string(1, map);
            w.u32(3, operation);
            w.u32(4, register(0));
            w.u32(5, register(DYNSET_DATA));
            if let Some(timeout) = timeout_ms {
                w.u64(6, timeout);
            }
        });
    }

    fn copy(&mut self, from: u32, to: u32, words: u32) {
        self.bitwise(from, to, &vec![0xff; words as usize * 4]);
    }

    fn mask(&mut self, mask: &[u8]) {
        self.bitwise(0, 0, mask);
    }

    fn bitwise(&mut self, from: u32, to: u32, mask: &[u8]) {
        self.expression("bitwise", |w| {
            w.u32(1, register(from));
            w.u32(2, register(to));
            w.u32(3, mask.len() as u32);
            let data = w.nest(4);
            w.bytes(DATA_VALUE, mask);
            w.close(data);
            let data = w.nest(5);
            w.bytes(DATA_VALUE, &vec![0; mask.len()]);
            w.close(data);
        });
    }

    fn equal(&mut self, value: &Value, constant: Datum, equal: bool) {
        self.load(value, 0, 0);
        let mut bytes = Vec::new();
        datum(&mut bytes, constant);
        self.compare(0, equal, &bytes);
    }

    fn bits(&mut self, value: &Value, bits: u32, none: bool) {
        self.load(value, 0, 0);
        // The flags of TCP are one byte, and `nft` wants to see one.
        let (mask, zero): (&[u8], &[u8]) = match value {
            Value::TcpFlags => (&[bits as u8], &[0]),
            _ => (&bits.to_ne_bytes(), &[0; 4]),
        };
        self.mask(mask);
        self.compare(0, none, zero);
    }

    fn in_net(&mut self, value: &Value, net: &ipnet::IpNet, inside: bool) {
        self.load(value, 0, 0);
        let bytes = |address: std::net::IpAddr| {
            let mut bytes = Vec::new();
            datum(&mut bytes, address.into());
            bytes
        };
        if net.prefix_len() < net.max_prefix_len() {
            self.mask(&bytes(net.netmask()));
        }
        self.compare(0, inside, &bytes(net.network()));
    }

    fn statement(&mut self, statement: &Statement) {
        match statement {
            Statement::Equal(value, constant) => self.equal(value, *constant, true),
            Statement::NotEqual(value, constant) => self.equal(value, *constant, false),
            Statement::InNet(value, net) => self.in_net(value, net, true),
            Statement::NotInNet(value, net) => self.in_net(value, net, false),
            Statement::CameThrough { name, is_prefix } => {
                self.meta(IIFNAME, 0);
                let mut bytes = name.as_bytes().to_vec();
                // A whole name is compared with the zeros that follow it.
                if !is_prefix {
                    bytes.resize(INTERFACE_NAME_SIZE, 0);
                }
                self.compare(0, true, &bytes);
            }
            Statement::HasBits(value, bits) => self.bits(value, *bits, false),
            Statement::LacksBits(value, bits) => self.bits(value, *bits, true),
            Statement::In { key, set } => {
                self.key(key, 0);
                self.lookup(set, 0, None, false);
            }
            Statement::NotIn { key, set } => {
                self.key(key, 0);
                self.lookup(set, 0, None, true);
            }
            Statement::VerdictMap { key, map } => {
                self.key(key, 0);
                self.lookup(map, 0, Some(0), false);
            }
            Statement::Choose(value) => self.load(value, CHOSEN, 0),
            Statement::Update { map, key, data, timeout_seconds } => {
                self.dynset(1, map, key, data, Some(u64::from(*timeout_seconds) * 1000));
            }
            Statement::Count { set, key, timeout_seconds } => {
                self.key(key, 0);
                self.expression("dynset", |w| {
                    w.string(1, set);
                    w.u32(3, 1);
                    w.u32(4, register(0));
                    w.u64(6, u64::from(*timeout_seconds) * 1000);
                    let counter = w.nest(7);
                    w.string(1, "counter");
                    let data = w.nest(2);
                    w.close(data);
                    w.close(counter);
                });
            }
            // Of a map the kernel wants the data named, although the key decides.
            Statement::Forget { map, key, data } => self.dynset(2, map, key, data, None),
            Statement::Dnat { v6 } => {
                let family = if *v6 { Family::Ip6 } else { Family::Ip };
                let port = CHOSEN + if *v6 { 4 } else { 1 };
                self.expression("nat", |w| {
                    w.u32(1, 1);
                    w.u32(2, u32::from(family.number()));
                    w.u32(3, register(CHOSEN));
                    w.u32(5, register(port));
                });
            }
            Statement::Masquerade { fully_random } => self.expression("masq", |w| {
                if *fully_random {
                    w.u32(1, 16);
                }
            }),
            Statement::Reject(reject) => self.expression("reject", |w| match reject {
                Reject::TcpReset => {
                    w.u32(1, 1);
                    w.u8(2, 0);
                }
                Reject::PortUnreachable => {
                    w.u32(1, 2);
                    w.u8(2, 1);
                }
            }),
            Statement::Counter => self.expression("counter", |_| {}),
            Statement::Limit { rate, burst } => self.expression("limit", |w| {
                w.u64(1, *rate);
                w.u64(2, 1);
                w.u32(3, *burst);
            }),
            Statement::Log { group, bytes } => self.expression("log", |w| {
                w.u16(1, *group);
                w.u32(3, *bytes);
            }),
            Statement::Duplicate { to } => {
                self.load(to, 0, 0);
                self.expression("dup", |w| w.u32(1, register(0)));
            }
            Statement::Verdict(verdict) => self.expression("immediate", |w| {
                w.u32(1, 0);
                let data = w.nest(2);
                verdict_attributes(w, verdict);
                w.close(data);
            }),
        }
    }
}
