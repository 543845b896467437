//! Transactions to netlink messages. Names and numbers are those of linux/netfilter/nf_tables.h.

use super::expression;
use super::netlink::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, Writer};
use super::rule::Rule;
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

pub(super) const LIST_ELEM: u16 = 1;
pub(super) const DATA_VALUE: u16 = 1;
pub(super) const DATA_VERDICT: u16 = 2;
const TYPE_INTEGER: u32 = 4;
const DATA_TYPE_VERDICT: u32 = 0xffff_ff00;

const SET_FLAG_INTERVAL: u32 = 4;
const SET_FLAG_MAP: u32 = 8;
const SET_FLAG_TIMEOUT: u32 = 0x10;
const SET_FLAG_DYNAMIC: u32 = 0x20;
const SET_FLAG_CONCAT: u32 = 0x80;

/// An attribute's length is 16 bits; a list of elements must stay below that.
const ELEMENTS_BYTES: usize = 48 << 10;
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
                return self.elements(MSG_NEWSETELEM, flags, family, table, index, set, elements, None, last);
            }
            Op::AddFor { set, elements, milliseconds } => {
                let flags = NLM_F_CREATE | NLM_F_EXCL;
                let life = Some(*milliseconds);
                return self.elements(MSG_NEWSETELEM, flags, family, table, index, set, elements, life, last);
            }
            Op::DeleteElements { set, elements } => {
                return self.elements(MSG_DELSETELEM, 0, family, table, index, set, elements, None, last);
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
        milliseconds: Option<u64>,
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
                element(&mut self.writer, &elements[done], milliseconds);
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

fn add_chain(writer: &mut Writer, table: &str, chain: &Chain) {
    writer.string(CHAIN_TABLE, table);
    writer.string(CHAIN_NAME, &chain.name);
    if let Some(base) = &chain.base {
        let hook = writer.nest(4);
        writer.u32(1, base.hook.number());
        writer.bytes(2, &base.priority.to_be_bytes());
        if let Some(device) = &chain.device {
            writer.string(3, device);
        }
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

pub(super) fn datum(buffer: &mut Vec<u8>, datum: Datum) {
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

pub(super) fn verdict_attributes(writer: &mut Writer, verdict: &Verdict) {
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

fn element(writer: &mut Writer, element: &Element, milliseconds: Option<u64>) {
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
    if let Some(milliseconds) = milliseconds {
        writer.u64(4, milliseconds);
    }
    writer.close(item);
}

fn add_rule(writer: &mut Writer, table: &str, chain: &str, rule: &Rule) {
    writer.string(1, table);
    writer.string(2, chain);
    let list = writer.nest(4);
    for statement in &rule.statements {
        expression::encode(writer, statement);
    }
    writer.close(list);
    if let Some(comment) = &rule.comment {
        writer.bytes(7, &comment_userdata(comment));
    }
}
