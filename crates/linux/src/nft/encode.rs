//! Values to netlink attributes and back. Names and numbers are those of linux/netfilter/nf_tables.h.
//!
//! Registers: sixteen words of four bytes. A rule's scratch values start at word 0; what `Statement::Choose` chose
//! (an address of up to four words and a port) rests in words 11 to 15, where nothing else is computed.

use super::netlink::{Attributes, NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, Writer};
use super::rule::{Reject, Rule, Statement, Value};
use super::value::{
    Chain, ChainKind, DataType, Datum, Element, ElementData, Family, Key, Op, Set, SetData, Transaction, Verdict,
};

const SUBSYSTEM: u16 = 10 << 8;
const MSG_NEWTABLE: u16 = SUBSYSTEM;
const MSG_DELTABLE: u16 = SUBSYSTEM | 2;
const MSG_NEWCHAIN: u16 = SUBSYSTEM | 3;
const MSG_DELCHAIN: u16 = SUBSYSTEM | 5;
const MSG_NEWRULE: u16 = SUBSYSTEM | 6;
const MSG_DELRULE: u16 = SUBSYSTEM | 8;
const MSG_NEWSET: u16 = SUBSYSTEM | 9;
const MSG_DELSET: u16 = SUBSYSTEM | 11;
pub(crate) const MSG_NEWSETELEM: u16 = SUBSYSTEM | 12;
pub(crate) const MSG_DELSETELEM: u16 = SUBSYSTEM | 14;
pub(crate) const MSG_NEWGEN: u16 = SUBSYSTEM | 15;
pub(crate) const MSG_GETTABLE: u16 = SUBSYSTEM | 1;
pub(crate) const MSG_GETCHAIN: u16 = SUBSYSTEM | 4;
pub(crate) const MSG_GETSET: u16 = SUBSYSTEM | 10;
pub(crate) const MSG_GETSETELEM: u16 = SUBSYSTEM | 13;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NFNL_SUBSYS_NFTABLES: u16 = 10;

/// Attribute numbers that more than one file needs.
pub(crate) const TABLE_NAME: u16 = 1;
pub(crate) const TABLE_USERDATA: u16 = 6;
pub(crate) const CHAIN_TABLE: u16 = 1;
pub(crate) const CHAIN_NAME: u16 = 3;
pub(crate) const SET_TABLE: u16 = 1;
pub(crate) const SET_NAME: u16 = 2;

const LIST_ELEM: u16 = 1;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const TYPE_INTEGER: u32 = 4;
const DATA_TYPE_VERDICT: u32 = 0xffff_ff00;

const SET_FLAG_INTERVAL: u32 = 4;
const SET_FLAG_MAP: u32 = 8;
const SET_FLAG_TIMEOUT: u32 = 0x10;
const SET_FLAG_DYNAMIC: u32 = 0x20;
const SET_FLAG_CONCAT: u32 = 0x80;

/// An attribute's length is 16 bits; a list of elements must stay below that.
const ELEMENTS_BYTES: usize = 48 << 10;
/// The word where the chosen address starts.
const CHOSEN: u32 = 11;
/// The word where the data of a dynamic element is put together: after a number and its filler were chosen.
const DYNSET_DATA: u32 = 13;

/// A batch, and which operation each of its messages came from.
pub(crate) struct Batch {
    pub writer: Writer,
    /// For each message: the operation, the first element in it, and where each element starts in the message.
    pub origins: Vec<Origin>,
    pub first_sequence: u32,
}

pub(crate) struct Origin {
    pub op: usize,
    pub first_element: usize,
    pub element_offsets: Vec<u32>,
}

/// The transaction as one batch; sequence numbers count up from `sequence`.
pub(crate) fn batch(transaction: &Transaction, sequence: u32) -> Batch {
    let mut batch = Batch { writer: Writer::default(), origins: Vec::new(), first_sequence: sequence + 1 };
    batch.writer.begin(BATCH_BEGIN, 0, sequence, 0, NFNL_SUBSYS_NFTABLES);
    batch.writer.end();
    let mut last = 0;
    for (index, op) in transaction.ops.iter().enumerate() {
        last = batch.op(transaction.family, &transaction.table, index, op, last);
    }
    // One acknowledgement, of the last message: it comes after the commit of all.
    batch.writer.set_flag(last, super::netlink::NLM_F_ACK);
    let end = batch.first_sequence + batch.origins.len() as u32;
    batch.writer.begin(BATCH_END, 0, end, 0, NFNL_SUBSYS_NFTABLES);
    batch.writer.end();
    batch
}

impl Batch {
    fn begin(&mut self, kind: u16, flags: u16, family: Family, op: usize) -> usize {
        let start = self.writer.buffer.len();
        let sequence = self.first_sequence + self.origins.len() as u32;
        self.writer.begin(kind, flags, sequence, family.number(), 0);
        self.origins.push(Origin { op, first_element: 0, element_offsets: Vec::new() });
        start
    }

    /// Appends the messages of one operation; the position of the last message of the batch so far.
    fn op(&mut self, family: Family, table: &str, index: usize, op: &Op, last: usize) -> usize {
        let start = match op {
            Op::AddTable { comment } => {
                let start = self.begin(MSG_NEWTABLE, NLM_F_CREATE, family, index);
                self.writer.string(TABLE_NAME, table);
                self.writer.u32(2, 0);
                if let Some(comment) = comment {
                    self.writer.bytes(TABLE_USERDATA, &comment_userdata(comment));
                }
                start
            }
            Op::DeleteTable => {
                let start = self.begin(MSG_DELTABLE, 0, family, index);
                self.writer.string(TABLE_NAME, table);
                start
            }
            Op::AddChain(chain) => {
                let start = self.begin(MSG_NEWCHAIN, NLM_F_CREATE, family, index);
                add_chain(&mut self.writer, table, chain);
                start
            }
            Op::FlushChain(chain) => {
                let start = self.begin(MSG_DELRULE, 0, family, index);
                self.writer.string(1, table);
                self.writer.string(2, chain);
                start
            }
            Op::DeleteChain(chain) => {
                let start = self.begin(MSG_DELCHAIN, 0, family, index);
                self.writer.string(CHAIN_TABLE, table);
                self.writer.string(CHAIN_NAME, chain);
                start
            }
            Op::AddSet(set) => {
                let start = self.begin(MSG_NEWSET, NLM_F_CREATE, family, index);
                add_set(&mut self.writer, table, set, index as u32 + 1);
                start
            }
            Op::DeleteSet(set) => {
                let start = self.begin(MSG_DELSET, 0, family, index);
                self.writer.string(SET_TABLE, table);
                self.writer.string(SET_NAME, set);
                start
            }
            Op::FlushSet(set) => {
                let start = self.begin(MSG_DELSETELEM, 0, family, index);
                self.writer.string(1, table);
                self.writer.string(2, set);
                start
            }
            Op::AddRule { chain, rule } => {
                let start = self.begin(MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, family, index);
                add_rule(&mut self.writer, table, chain, rule);
                start
            }
            Op::AddElements { set, elements } => {
                // EXCL: an element that is there already with other data must be an error, not silence.
                let flags = NLM_F_CREATE | NLM_F_EXCL;
                return self.elements(MSG_NEWSETELEM, flags, family, table, index, set, elements, last);
            }
            Op::DeleteElements { set, elements } => {
                return self.elements(MSG_DELSETELEM, 0, family, table, index, set, elements, last);
            }
        };
        self.writer.end();
        start
    }

    #[allow(clippy::too_many_arguments)]
    fn elements(
        &mut self,
        kind: u16,
        flags: u16,
        family: Family,
        table: &str,
        index: usize,
        set: &str,
        elements: &[Element],
        mut last: usize,
    ) -> usize {
        let mut done = 0;
        while done < elements.len() {
            let start = self.begin(kind, flags, family, index);
            last = start;
            self.writer.string(1, table);
            self.writer.string(2, set);
            let list = self.writer.nest(3);
            let mut offsets = Vec::new();
            let first = done;
            while done < elements.len() && self.writer.buffer.len() - start < ELEMENTS_BYTES {
                offsets.push((self.writer.buffer.len() - start) as u32);
                element(&mut self.writer, &elements[done]);
                done += 1;
            }
            self.writer.close(list);
            self.writer.end();
            let origin = self.origins.last_mut().expect("begin pushed one");
            origin.first_element = first;
            origin.element_offsets = offsets;
        }
        last
    }
}

/// nft keeps comments as type-length-value user data; type 0 is a comment everywhere.
fn comment_userdata(comment: &str) -> Vec<u8> {
    let text = &comment.as_bytes()[..comment.len().min(128)];
    let mut data = vec![0, text.len() as u8 + 1];
    data.extend_from_slice(text);
    data.push(0);
    data
}

/// The comment in a table's user data.
pub(crate) fn comment_of(userdata: &[u8]) -> Option<String> {
    let length = *userdata.get(1)? as usize;
    let text = userdata.get(2..2 + length)?;
    (userdata[0] == 0).then(|| String::from_utf8_lossy(text.strip_suffix(&[0]).unwrap_or(text)).into_owned())
}

fn add_chain(writer: &mut Writer, table: &str, chain: &Chain) {
    writer.string(CHAIN_TABLE, table);
    writer.string(CHAIN_NAME, &chain.name);
    if let Some(base) = &chain.base {
        let hook = writer.nest(4);
        writer.u32(1, base.hook.number());
        writer.bytes(2, &base.priority.to_be_bytes());
        writer.close(hook);
        writer.u32(5, 1);
        writer.string(
            7,
            match base.kind {
                ChainKind::Filter => "filter",
                ChainKind::Nat => "nat",
            },
        );
    }
}

/// nft's number of a concatenation: six bits a field.
fn type_number(types: &[DataType]) -> u32 {
    types.iter().fold(0, |number, field| number << 6 | field.number())
}

/// Bytes of a key: one field as it is, several padded to words.
fn key_len(types: &[DataType]) -> u32 {
    match types {
        [one] => one.len(),
        several => several.iter().map(|field| field.len().next_multiple_of(4)).sum(),
    }
}

fn add_set(writer: &mut Writer, table: &str, set: &Set, id: u32) {
    let mut flags = 0;
    if set.data != SetData::None {
        flags |= SET_FLAG_MAP;
    }
    if set.dynamic {
        flags |= SET_FLAG_DYNAMIC | SET_FLAG_TIMEOUT;
    }
    let concatenated_ranges = set.interval && set.key.len() > 1;
    if set.interval {
        flags |= SET_FLAG_INTERVAL;
    }
    if concatenated_ranges {
        flags |= SET_FLAG_CONCAT;
    }
    writer.string(SET_TABLE, table);
    writer.string(SET_NAME, &set.name);
    writer.u32(3, flags);
    writer.u32(4, type_number(&set.key));
    writer.u32(5, key_len(&set.key));
    match &set.data {
        SetData::None => {}
        SetData::Verdict => {
            writer.u32(6, DATA_TYPE_VERDICT);
            writer.u32(7, 16);
        }
        SetData::Value(types) => {
            // An `update` of a map whose data is a concatenation makes `nft list` abort; one big integer does not.
            let number = if set.dynamic && types.len() > 1 { TYPE_INTEGER } else { type_number(types) };
            writer.u32(6, number);
            writer.u32(7, key_len(types));
        }
    }
    if set.size.is_some() || concatenated_ranges {
        let description = writer.nest(9);
        if let Some(size) = set.size {
            writer.u32(1, size);
        }
        if concatenated_ranges {
            let fields = writer.nest(2);
            for field in &set.key {
                let item = writer.nest(LIST_ELEM);
                writer.u32(1, field.len());
                writer.close(item);
            }
            writer.close(fields);
        }
        writer.close(description);
    }
    writer.u32(10, id);
}

fn datum(buffer: &mut Vec<u8>, datum: Datum) {
    match datum {
        Datum::V4(address) => buffer.extend_from_slice(&address.octets()),
        Datum::V6(address) => buffer.extend_from_slice(&address.octets()),
        Datum::Proto(number) => buffer.push(number),
        Datum::Port(port) => buffer.extend_from_slice(&port.to_be_bytes()),
        Datum::Mark(mark) => buffer.extend_from_slice(&mark.to_ne_bytes()),
    }
}

fn key_bytes(key: &Key) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(24);
    for field in key.0.iter() {
        datum(&mut bytes, *field);
        if key.0.len() > 1 {
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
    }
    bytes
}

fn verdict_attributes(writer: &mut Writer, verdict: &Verdict) {
    let nest = writer.nest(DATA_VERDICT);
    let code: i32 = match verdict {
        Verdict::Drop => 0,
        Verdict::Accept => 1,
        Verdict::Return => -5,
        Verdict::Jump(_) => -3,
        Verdict::Goto(_) => -4,
    };
    writer.bytes(1, &code.to_be_bytes());
    if let Some(chain) = verdict.chain() {
        writer.string(2, chain);
    }
    writer.close(nest);
}

fn element(writer: &mut Writer, element: &Element) {
    let item = writer.nest(LIST_ELEM);
    let key = writer.nest(1);
    writer.bytes(DATA_VALUE, &key_bytes(&element.key));
    writer.close(key);
    if let Some(end) = &element.end {
        let key = writer.nest(10);
        writer.bytes(DATA_VALUE, &key_bytes(end));
        writer.close(key);
    }
    match &element.data {
        ElementData::None => {}
        ElementData::Verdict(verdict) => {
            let data = writer.nest(2);
            verdict_attributes(writer, verdict);
            writer.close(data);
        }
        ElementData::Value(value) => {
            let data = writer.nest(2);
            writer.bytes(DATA_VALUE, &key_bytes(value));
            writer.close(data);
        }
    }
    writer.close(item);
}

fn decode_key(bytes: &[u8], types: &[DataType]) -> Option<Key> {
    let mut rest = bytes;
    let mut data = Vec::with_capacity(types.len());
    for field in types {
        let length = field.len() as usize;
        let value = rest.get(..length)?;
        data.push(match field {
            DataType::Ipv4Addr => Datum::V4(<[u8; 4]>::try_from(value).ok()?.into()),
            DataType::Ipv6Addr => Datum::V6(<[u8; 16]>::try_from(value).ok()?.into()),
            DataType::InetProto => Datum::Proto(value[0]),
            DataType::InetService => Datum::Port(u16::from_be_bytes(value.try_into().ok()?)),
            DataType::Mark => Datum::Mark(u32::from_ne_bytes(value.try_into().ok()?)),
        });
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(Key::new(data))
}

/// The elements in one message of a dump.
pub(crate) fn decode_elements(message: Attributes<'_>, set: &Set, found: &mut Vec<Element>) -> Option<()> {
    let Some(list) = message.nested(3) else { return Some(()) };
    for (_, item) in list {
        let item = Attributes(item);
        let key = decode_key(item.nested(1)?.get(DATA_VALUE)?, &set.key)?;
        let end = match item.nested(10) {
            Some(end) => Some(decode_key(end.get(DATA_VALUE)?, &set.key)?),
            None => None,
        };
        let data = match &set.data {
            SetData::None => ElementData::None,
            SetData::Value(types) => ElementData::Value(decode_key(item.nested(2)?.get(DATA_VALUE)?, types)?),
            SetData::Verdict => {
                let verdict = item.nested(2)?.nested(DATA_VERDICT)?;
                let chain = || verdict.string(2).map(Box::from);
                ElementData::Verdict(match verdict.u32(1)? as i32 {
                    0 => Verdict::Drop,
                    1 => Verdict::Accept,
                    -3 => Verdict::Jump(chain()?),
                    -4 => Verdict::Goto(chain()?),
                    _ => Verdict::Return,
                })
            }
        };
        found.push(Element { key, end, data });
    }
    Some(())
}

fn add_rule(writer: &mut Writer, table: &str, chain: &str, rule: &Rule) {
    writer.string(1, table);
    writer.string(2, chain);
    let list = writer.nest(4);
    for statement in &rule.statements {
        Expressions { writer }.statement(statement);
    }
    writer.close(list);
    if let Some(comment) = &rule.comment {
        writer.bytes(7, &comment_userdata(comment));
    }
}

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
        Value::OriginalDestinationIp { v6: true } => 4,
        Value::Const(datum) => datum.data_type().len().div_ceil(4),
        // Only a lookup as part of a key is asked: those give one number.
        _ => 1,
    }
}

fn is_from_map(value: &Value) -> bool {
    matches!(value, Value::Lookup { .. } | Value::Chosen { .. })
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

    fn ct(&mut self, key: u32, original: bool, to: u32) {
        self.expression("ct", |w| {
            w.u32(1, register(to));
            w.u32(2, key);
            if original {
                w.u8(3, 0);
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
            Value::SourceIp { v6: false } => self.payload(1, 12, 4, to),
            Value::DestinationIp { v6: false } => self.payload(1, 16, 4, to),
            Value::SourceIp { v6: true } => self.payload(1, 8, 16, to),
            Value::DestinationIp { v6: true } => self.payload(1, 24, 16, to),
            Value::SourcePort => self.payload(2, 0, 2, to),
            Value::DestinationPort => self.payload(2, 2, 2, to),
            Value::OriginalDestinationIp { v6: false } => self.ct(20, true, to),
            Value::OriginalDestinationIp { v6: true } => self.ct(22, true, to),
            Value::OriginalDestinationPort => self.ct(12, true, to),
            Value::TcpFlags => self.payload(2, 13, 1, to),
            Value::IcmpType => self.payload(2, 0, 1, to),
            Value::IcmpCode => self.payload(2, 1, 1, to),
            Value::CtDirection => self.ct(1, false, to),
            Value::CtState => self.ct(0, false, to),
            Value::CtStatus => self.ct(2, false, to),
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
            Statement::Verdict(verdict) => self.expression("immediate", |w| {
                w.u32(1, 0);
                let data = w.nest(2);
                verdict_attributes(w, verdict);
                w.close(data);
            }),
        }
    }
}
