//! The one place where transactions reach the kernel, and where its tables are read back.

use std::os::fd::BorrowedFd;

use super::decode;
use super::encode::{self, Batch};
use super::netlink::{NLM_F_DUMP, Raw, Reply, Writer, errno};
use super::value::{Element, Family, Key, Op, Set, Transaction};
use super::{Error, Nft};

/// nftables of one network namespace.
pub struct Socket {
    raw: Raw,
    port: u32,
    sequence: u32,
}

impl Socket {
    /// Opens nftables of the calling thread's network namespace, or of the one given (an open file of
    /// `/proc/PID/ns/net` or of a named namespace).
    pub fn open(namespace: Option<BorrowedFd<'_>>) -> Result<Self, Error> {
        let raw = Raw::open(namespace)?;
        Ok(Socket { port: raw.port()?, raw, sequence: 0 })
    }

    /// How many packets each element of a set has counted ([`super::Statement::Count`]).
    pub fn counters(&mut self, family: Family, table: &str, set: &Set) -> Result<Vec<(Key, u64)>, Error> {
        let mut found = Vec::new();
        let names = [(encode::SET_TABLE, table), (encode::SET_NAME, &*set.name)];
        self.dump(encode::MSG_GETSETELEM, family, &names, |attributes| {
            decode::decode_counters(attributes, set, &mut found).ok_or(Error::Malformed("a counter"))
        })?;
        Ok(found)
    }

    /// Asks for all objects of a kind; the visitor sees the attributes of each.
    fn dump(
        &mut self,
        kind: u16,
        family: Family,
        names: &[(u16, &str)],
        mut visit: impl FnMut(super::netlink::Attributes<'_>) -> Result<(), Error>,
    ) -> Result<(), Error> {
        self.raw.drain()?;
        self.sequence += 1;
        let mut writer = Writer::default();
        writer.begin(kind, NLM_F_DUMP, self.sequence, family.number(), 0);
        for (attribute, name) in names {
            writer.string(*attribute, name);
        }
        writer.end();
        self.raw.send(&writer.buffer)?;
        let mut done = false;
        self.raw.replies(|reply| match reply {
            Reply::Object(attributes) => visit(attributes).map(|()| true),
            Reply::Ack { .. } => Ok(true),
            Reply::Done => {
                done = true;
                Ok(false)
            }
            Reply::Failed { errno: number, .. } => {
                let item = names.iter().map(|(_, name)| *name).collect::<Vec<_>>().join(" ");
                Err(Error::Refused { item: format!("list {item}"), cause: errno(number), hint: String::new() })
            }
        })?;
        if done { Ok(()) } else { Err(Error::Silent(1)) }
    }
}

impl Nft for Socket {
    fn commit(&mut self, transaction: &Transaction) -> Result<(), Error> {
        if transaction.is_empty() {
            return Ok(());
        }
        self.raw.drain()?;
        let mut batch = encode::batch(transaction, self.sequence + 1);
        let messages = std::mem::take(&mut batch.writer.buffer);
        if batch.origins.is_empty() {
            return Ok(());
        }
        let last = batch.first_sequence + batch.origins.len() as u32 - 1;
        self.sequence = last + 1;
        self.raw.send(&messages)?;
        let mut acknowledged = false;
        let mut refused: Option<(u32, Error)> = None;
        self.raw.replies(|reply| {
            match reply {
                Reply::Ack { sequence } if sequence == last => acknowledged = true,
                // The kernel reports every failing message; the earliest is the cause, later ones may follow from it.
                Reply::Failed { sequence, errno, offset, text }
                    if refused.as_ref().is_none_or(|(first, _)| sequence < *first) =>
                {
                    refused = Some((sequence, refusal(transaction, &batch, sequence, errno, offset, text)));
                }
                _ => {}
            }
            Ok(true)
        })?;
        match refused {
            Some((_, error)) => Err(error),
            None if acknowledged => Ok(()),
            None => Err(Error::Silent(batch.origins.len())),
        }
    }

    fn table_comment(&mut self, family: Family, table: &str) -> Result<Option<String>, Error> {
        let mut found = None;
        self.dump(encode::MSG_GETTABLE, family, &[], |attributes| {
            if attributes.string(encode::TABLE_NAME) == Some(table) {
                let comment = attributes.get(encode::TABLE_USERDATA).and_then(decode::comment_of);
                found = Some(comment.unwrap_or_default());
            }
            Ok(())
        })?;
        Ok(found)
    }

    fn chains(&mut self, family: Family, table: &str) -> Result<Vec<String>, Error> {
        let mut found = Vec::new();
        self.dump(encode::MSG_GETCHAIN, family, &[], |attributes| {
            if attributes.string(encode::CHAIN_TABLE) == Some(table) {
                found.extend(attributes.string(encode::CHAIN_NAME).map(str::to_owned));
            }
            Ok(())
        })?;
        Ok(found)
    }

    fn sets(&mut self, family: Family, table: &str) -> Result<Vec<String>, Error> {
        let mut found = Vec::new();
        self.dump(encode::MSG_GETSET, family, &[(encode::SET_TABLE, table)], |attributes| {
            found.extend(attributes.string(encode::SET_NAME).map(str::to_owned));
            Ok(())
        })?;
        Ok(found)
    }

    fn elements(&mut self, family: Family, table: &str, set: &Set) -> Result<Vec<Element>, Error> {
        let mut found = Vec::new();
        let names = [(encode::SET_TABLE, table), (encode::SET_NAME, &*set.name)];
        self.dump(encode::MSG_GETSETELEM, family, &names, |attributes| {
            decode::decode_elements(attributes, set, &mut found).ok_or(Error::Malformed("an element"))
        })?;
        Ok(found)
    }

    fn port(&self) -> Option<u32> {
        Some(self.port)
    }
}

/// Names the item that the kernel refused: the rule, chain or set, or the very element.
fn refusal(
    transaction: &Transaction,
    batch: &Batch,
    sequence: u32,
    number: i32,
    offset: Option<u32>,
    text: Option<String>,
) -> Error {
    let origin = sequence.checked_sub(batch.first_sequence).and_then(|index| batch.origins.get(index as usize));
    let item = match origin {
        None => "the batch itself".to_owned(),
        Some(origin) => {
            let op = &transaction.ops[origin.op];
            let element = offset.and_then(|offset| {
                let index = origin.element_offsets.partition_point(|start| *start <= offset).checked_sub(1)?;
                Some(origin.first_element + index)
            });
            let named = match (op, element) {
                (Op::AddElements { set, elements }, Some(index)) => elements
                    .get(index)
                    .map(|element| Op::AddElements { set: set.clone(), elements: vec![element.clone()] }),
                (Op::DeleteElements { set, elements }, Some(index)) => elements
                    .get(index)
                    .map(|element| Op::DeleteElements { set: set.clone(), elements: vec![element.clone()] }),
                _ => None,
            };
            let mut line = named.as_ref().unwrap_or(op).line(transaction.family, &transaction.table);
            // A chunk of thousands of elements would bury the message.
            if line.len() > 400 {
                let cut = (0..=400).rev().find(|at| line.is_char_boundary(*at)).unwrap_or(0);
                line.truncate(cut);
                line.push('…');
            }
            line
        }
    };
    let hint = text.map(|text| format!(" ({text})")).unwrap_or_default();
    Error::Refused { item, cause: errno(number), hint }
}
