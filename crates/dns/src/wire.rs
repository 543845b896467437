//! From bytes to a question, without allocating, and the frame of a reply.
//!
//! Nothing here trusts a client: every step is checked against the end of the packet.

use std::net::IpAddr;

/// Bytes before the first question (RFC 1035, 4.1.1).
pub const HEADER: usize = 12;
/// The UDP payload that crosses every path without fragments (DNS flag day 2020).
pub const UDP_PAYLOAD: u16 = 1232;
/// What a client without EDNS takes (RFC 1035, 4.2.1).
const PLAIN_PAYLOAD: u16 = 512;
const MAX_NAME: usize = 255;
const MAX_LABELS: usize = 127;
/// An OPT record without options (RFC 6891, 6.1.2).
const OPT_LEN: usize = 11;
/// A pointer to the name of the question.
pub const QUESTION_NAME: [u8; 2] = [0xc0, HEADER as u8];
const CLASS_IN: [u8; 2] = [0, 1];

/// Numbers of record types.
pub mod kind {
    pub const A: u16 = 1;
    pub const NS: u16 = 2;
    pub const CNAME: u16 = 5;
    pub const SOA: u16 = 6;
    pub const PTR: u16 = 12;
    pub const TXT: u16 = 16;
    pub const AAAA: u16 = 28;
    pub const SRV: u16 = 33;
    pub const OPT: u16 = 41;
    pub const TKEY: u16 = 249;
    pub const TSIG: u16 = 250;
    pub const IXFR: u16 = 251;
    pub const AXFR: u16 = 252;
    pub const ANY: u16 = 255;
}

/// Response codes.
pub mod code {
    pub const NO_ERROR: u16 = 0;
    pub const FORM_ERR: u16 = 1;
    pub const SERV_FAIL: u16 = 2;
    pub const NX_DOMAIN: u16 = 3;
    pub const NOT_IMP: u16 = 4;
    pub const REFUSED: u16 = 5;
    /// Needs the upper bits, which are in the OPT record.
    pub const BAD_VERS: u16 = 16;
}

/// A name as it is on the wire, in lower case, and where its labels begin.
#[derive(Clone)]
pub struct WireName {
    bytes: [u8; MAX_NAME],
    len: u8,
    starts: [u8; MAX_LABELS + 1],
    labels: u8,
}

impl WireName {
    /// Reads an uncompressed name at `at`. `None`: it is not one, or too long.
    pub fn read(packet: &[u8], at: usize) -> Option<Self> {
        let mut name = WireName { bytes: [0; MAX_NAME], len: 0, starts: [0; MAX_LABELS + 1], labels: 0 };
        let mut here = at;
        loop {
            let length = usize::from(*packet.get(here)?);
            let start = here - at;
            name.starts[usize::from(name.labels)] = u8::try_from(start).ok()?;
            if length == 0 {
                name.len = u8::try_from(start + 1).ok()?;
                break;
            }
            // Two upper bits: a pointer, or a kind of label that never came to be. Before the question's name nothing is.
            if length > 63 || start + 1 + length >= MAX_NAME {
                return None;
            }
            here += 1 + length;
            name.labels += 1;
        }
        let end = usize::from(name.len);
        name.bytes[..end].copy_from_slice(packet.get(at..at + end)?);
        // No length is a letter, so that the whole name can be treated alike.
        name.bytes[..end].make_ascii_lowercase();
        Some(name)
    }

    /// With the root's zero at the end.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.len)]
    }

    pub fn labels(&self) -> usize {
        usize::from(self.labels)
    }

    /// Where label `index` begins; the root is the label after the last.
    pub fn start(&self, index: usize) -> usize {
        usize::from(self.starts[index.min(self.labels())])
    }

    /// The labels from `first` up to `end`, each with its length before it.
    pub fn part(&self, first: usize, end: usize) -> &[u8] {
        &self.bytes[self.start(first)..self.start(end)]
    }

    /// The text of label `index`.
    pub fn label(&self, index: usize) -> &[u8] {
        self.part(index, index + 1).get(1..).unwrap_or_default()
    }

    /// How many labels are below `origin`; `None` when the name is not in that zone.
    pub fn below(&self, origin: &WireName) -> Option<usize> {
        let below = self.labels().checked_sub(origin.labels())?;
        (self.part(below, self.labels()) == origin.part(0, origin.labels())).then_some(below)
    }

    /// The address that a name under in-addr.arpa or ip6.arpa stands for, and how many of its parts are there: 4 or 32
    /// for a whole one.
    pub fn reversed(&self) -> Option<(IpAddr, usize)> {
        let last = self.labels().checked_sub(2)?;
        if self.label(last + 1) != b"arpa" {
            return None;
        }
        let is_v4 = match self.label(last) {
            b"in-addr" => true,
            b"ip6" => false,
            _ => return None,
        };
        let (mut v4, mut v6) = ([0u8; 4], [0u8; 16]);
        if last > if is_v4 { 4 } else { 32 } {
            return None;
        }
        for part in 0..last {
            let text = std::str::from_utf8(self.label(last - 1 - part)).ok()?;
            if is_v4 {
                // As written by those who ask: no sign, no leading zero.
                let plain = text.bytes().all(|digit| digit.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
                v4[part] = text.parse().ok().filter(|_| plain)?;
            } else {
                let nibble = u8::from_str_radix(text, 16).ok().filter(|_| text.len() == 1 && text != "+")?;
                v6[part / 2] |= nibble << if part % 2 == 0 { 4 } else { 0 };
            }
        }
        Some((if is_v4 { v4.into() } else { v6.into() }, last))
    }
}

/// What a client says of itself (RFC 6891).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientEdns {
    pub payload: u16,
    pub dnssec_ok: bool,
}

/// A question that can be answered.
#[derive(Clone)]
pub struct Ask {
    /// Id and flags, as sent.
    head: [u8; 4],
    /// Name, type and class, as sent.
    question: [u8; MAX_NAME + 4],
    question_len: u16,
    pub name: WireName,
    pub kind: u16,
    pub edns: Option<ClientEdns>,
}

/// Why a question gets no answer, and what is said of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    head: [u8; 4],
    pub code: u16,
    question: Vec<u8>,
    has_edns: bool,
}

/// What a client sent.
pub enum Incoming {
    /// Not a question: answering could start a loop between two servers.
    Ignore,
    /// Not a question that can be answered.
    Refuse(Refusal),
    Ask(Box<Ask>),
}

fn number(packet: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(*packet.get(at..)?.first_chunk()?))
}

/// Reads one message.
pub fn decode(packet: &[u8]) -> Incoming {
    let Some(head) = packet.first_chunk::<4>().copied() else { return Incoming::Ignore };
    if head[2] & 0x80 != 0 {
        return Incoming::Ignore;
    }
    let refuse = |code: u16, question: &[u8], has_edns: bool| {
        Incoming::Refuse(Refusal { head, code, question: question.to_vec(), has_edns })
    };
    // The other operations give the sections other meanings.
    if head[2] & 0x78 != 0 {
        return refuse(code::NOT_IMP, &[], false);
    }
    let Some((name, question, edns)) = sections(packet) else { return refuse(code::FORM_ERR, &[], false) };
    if edns.is_some_and(|edns| edns.version > 0) {
        return refuse(code::BAD_VERS, question, true);
    }
    let (_, fixed) = question.split_at(question.len() - 4);
    let kind = u16::from_be_bytes([fixed[0], fixed[1]]);
    if fixed[2..] != CLASS_IN {
        return refuse(code::REFUSED, question, edns.is_some());
    }
    if matches!(kind, 0 | kind::OPT | kind::TKEY | kind::TSIG) {
        // Types of records that travel with a message, not of what a name has.
        return refuse(code::FORM_ERR, question, edns.is_some());
    }
    let mut ask = Box::new(Ask {
        head,
        question: [0; MAX_NAME + 4],
        question_len: question.len() as u16,
        name,
        kind,
        edns: edns.map(|edns| edns.client),
    });
    ask.question[..question.len()].copy_from_slice(question);
    Incoming::Ask(ask)
}

#[derive(Clone, Copy)]
struct Opt {
    version: u8,
    client: ClientEdns,
}

/// The one question, and what the client says of itself. `None`: the message is broken.
fn sections(packet: &[u8]) -> Option<(WireName, &[u8], Option<Opt>)> {
    if number(packet, 4)? != 1 {
        return None;
    }
    let name = WireName::read(packet, HEADER)?;
    let mut at = HEADER + name.bytes().len() + 4;
    let question = packet.get(HEADER..at)?;
    let mut edns = None;
    for (section, count_at) in [6, 8, 10].into_iter().enumerate() {
        for _ in 0..number(packet, count_at)? {
            let is_root = packet.get(at) == Some(&0);
            at = skip_name(packet, at)?;
            let kind = number(packet, at)?;
            let data = at + 10;
            let end = data + usize::from(number(packet, at + 8)?);
            packet.get(data..end)?;
            if kind == kind::OPT {
                if section != 2 || edns.is_some() || !is_root {
                    return None;
                }
                let client = ClientEdns { payload: number(packet, at + 2)?, dnssec_ok: packet[at + 6] & 0x80 != 0 };
                edns = Some(Opt { version: packet[at + 5], client });
            }
            at = end;
        }
    }
    (at == packet.len()).then_some((name, question, edns))
}

/// Behind a name that may end in a pointer.
fn skip_name(packet: &[u8], mut at: usize) -> Option<usize> {
    loop {
        match *packet.get(at)? {
            0 => return Some(at + 1),
            length @ 1..=63 => at += 1 + usize::from(length),
            0xc0..=0xff => return packet.get(at + 1).map(|_| at + 2),
            _ => return None,
        }
    }
}

/// The counts behind the question's, in a header.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub answers: u16,
    pub authorities: u16,
    pub additionals: u16,
}

/// What the header of a reply says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Verdict {
    pub code: u16,
    pub authoritative: bool,
    pub truncated: bool,
}

impl Ask {
    pub fn id(&self) -> u16 {
        u16::from_be_bytes([self.head[0], self.head[1]])
    }

    pub fn wants_recursion(&self) -> bool {
        self.head[2] & 0x01 != 0
    }

    pub fn checking_disabled(&self) -> bool {
        self.head[3] & 0x10 != 0
    }

    /// The question's name in the client's case, with the root's zero.
    pub fn written_name(&self) -> &[u8] {
        &self.question[..usize::from(self.question_len) - 4]
    }

    /// The bytes of a whole reply that this client can take in one UDP packet.
    pub fn udp_limit(&self) -> usize {
        usize::from(self.edns.map_or(PLAIN_PAYLOAD, |edns| edns.payload.clamp(PLAIN_PAYLOAD, UDP_PAYLOAD)))
    }

    /// The bytes that are left for records in a reply of `limit`.
    pub fn room(&self, limit: usize) -> usize {
        let opt = if self.edns.is_some() { OPT_LEN } else { 0 };
        limit.saturating_sub(HEADER + usize::from(self.question_len) + opt)
    }

    /// Begins a reply: the records come behind it, then [`Ask::end`].
    pub fn begin(&self, out: &mut Vec<u8>) {
        out.clear();
        out.extend_from_slice(&[0; HEADER]);
        out.extend_from_slice(&self.question[..usize::from(self.question_len)]);
    }

    /// A reply that is a response code and nothing else.
    pub fn refuse(&self, out: &mut Vec<u8>, code: u16) {
        self.begin(out);
        self.end(out, Verdict { code, ..Verdict::default() }, Counts::default());
    }

    pub fn end(&self, out: &mut Vec<u8>, verdict: Verdict, counts: Counts) {
        finish(out, self.head, verdict, 1, counts, self.edns.map(|edns| edns.dnssec_ok));
    }
}

impl Refusal {
    pub fn write(&self, out: &mut Vec<u8>) {
        out.clear();
        out.extend_from_slice(&[0; HEADER]);
        out.extend_from_slice(&self.question);
        let verdict = Verdict { code: self.code, ..Verdict::default() };
        let questions = u16::from(!self.question.is_empty());
        finish(out, self.head, verdict, questions, Counts::default(), self.has_edns.then_some(false));
    }
}

/// Writes the header, and the OPT record behind everything. `edns` holds the client's DO bit.
fn finish(out: &mut Vec<u8>, head: [u8; 4], verdict: Verdict, questions: u16, counts: Counts, edns: Option<bool>) {
    let [high, low] = [(verdict.code >> 4) as u8, (verdict.code & 0xf) as u8];
    if let Some(dnssec_ok) = edns {
        let [payload_high, payload_low] = UDP_PAYLOAD.to_be_bytes();
        let flags = if dnssec_ok { 0x80 } else { 0 };
        out.extend_from_slice(&[0, 0, kind::OPT as u8, payload_high, payload_low, high, 0, flags, 0, 0, 0]);
    }
    // QR and the client's opcode and RD; AA and TC are ours.
    let set = |bit: u8, is_set: bool| if is_set { bit } else { 0 };
    let flags = 0x80 | (head[2] & 0x79) | set(0x04, verdict.authoritative) | set(0x02, verdict.truncated);
    // RA, and the client's CD (RFC 4035, 3.2.2).
    let header = [head[0], head[1], flags, 0x80 | (head[3] & 0x10) | low];
    out[..4].copy_from_slice(&header);
    let additionals = counts.additionals + u16::from(edns.is_some());
    let numbers = [questions, counts.answers, counts.authorities, additionals];
    for (at, number) in (4..).step_by(2).zip(numbers) {
        out[at..at + 2].copy_from_slice(&number.to_be_bytes());
    }
}
