//! What the kernel's dumps hold, as values.

use super::encode::{DATA_VALUE, DATA_VERDICT};
use super::netlink::Attributes;
use super::value::{DataType, Datum, Element, ElementData, Key, Set, SetData, Verdict};

/// The comment in a table's user data.
pub(super) fn comment_of(userdata: &[u8]) -> Option<String> {
    let length = *userdata.get(1)? as usize;
    let text = userdata.get(2..2 + length)?;
    (userdata[0] == 0).then(|| String::from_utf8_lossy(text.strip_suffix(&[0]).unwrap_or(text)).into_owned())
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
pub(super) fn decode_elements(message: Attributes<'_>, set: &Set, found: &mut Vec<Element>) -> Option<()> {
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

/// Keys and packet counts of the elements in one message of a dump; one that counts nothing has none.
pub(super) fn decode_counters(message: Attributes<'_>, set: &Set, found: &mut Vec<(Key, u64)>) -> Option<()> {
    let Some(list) = message.nested(3) else { return Some(()) };
    for (_, item) in list {
        let item = Attributes(item);
        let key = decode_key(item.nested(1)?.get(DATA_VALUE)?, &set.key)?;
        let Some(expression) = item.nested(7) else { continue };
        let packets = expression.nested(2)?.get(2)?;
        found.push((key, u64::from_be_bytes(packets.try_into().ok()?)));
    }
    Some(())
}
