//! From what was found to the bytes of a reply that fits.

use crate::compile::{Held, Records};
use crate::wire::{Ask, Counts, HEADER, Verdict, code, kind};
use crate::zone::{Found, Zone, record_len, records};

/// Writes the reply to a question about the cluster: the records, or why there are none.
///
/// `below` is how many labels of the name are below the zone whose start of authority a negative answer shows; for a
/// reverse name that zone is not the cluster's, whose name is then not in the question.
pub fn write(
    out: &mut Vec<u8>,
    ask: &Ask,
    zone: &Zone,
    below: usize,
    is_reverse: bool,
    found: &Found<'_>,
    limit: usize,
) -> u16 {
    ask.begin(out);
    let (verdict, counts) = match records(found) {
        Some(records) => copy(out, ask, zone, below, &records, limit),
        None => {
            let code = match found {
                Found::NotYet => code::SERV_FAIL,
                Found::Held(Held::NoName) => code::NX_DOMAIN,
                _ => code::NO_ERROR,
            };
            let mut counts = Counts::default();
            if *found != Found::NotYet {
                let owner = HEADER + ask.name.start(below);
                // A name may come the next moment: nobody is to remember that it was not there (RFC 2308, 5).
                zone.write_soa(out, owner, (!is_reverse).then_some(owner), 0);
                counts.authorities = 1;
            }
            (Verdict { code, authoritative: *found != Found::NotYet, truncated: false }, counts)
        }
    };
    ask.end(out, verdict, counts);
    verdict.code
}

/// Copies records. What does not fit is left out: first the additional records, which the client can ask for, then
/// answers, with the flag that tells the client to come back over TCP.
fn copy(
    out: &mut Vec<u8>,
    ask: &Ask,
    zone: &Zone,
    below: usize,
    records: &Records<'_>,
    limit: usize,
) -> (Verdict, Counts) {
    let room = ask.room(limit);
    let base = out.len();
    let mut verdict = Verdict { code: code::NO_ERROR, authoritative: true, truncated: false };
    let mut counts = Counts { answers: records.answer_count, ..Counts::default() };
    if records.answers.len() <= room {
        let are_addresses = matches!(ask.kind, kind::A | kind::AAAA);
        rotated(out, records, if are_addresses { usize::from(ask.id()) } else { 0 });
        if records.answers.len() + records.additionals.len() <= room {
            out.extend_from_slice(records.additionals);
            counts.additionals = records.additional_count;
        }
    } else {
        verdict.truncated = true;
        let (mut end, mut whole) = (0, 0);
        while let Some(length) = record_len(&records.answers[end..]).filter(|length| end + length <= room) {
            end += length;
            whole += 1;
        }
        out.extend_from_slice(&records.answers[..end]);
        counts.answers = whole;
    }
    // The zone in targets is written as the client wrote it.
    let written = &ask.written_name()[ask.name.start(below)..];
    if !records.zones.is_empty() && written != zone.origin().bytes() {
        for at in records.zones.chunks_exact(4).filter_map(|at| at.first_chunk().copied()) {
            let at = base + u32::from_be_bytes(at) as usize;
            if let Some(place) = out.get_mut(at..at + written.len()) {
                place.copy_from_slice(written);
            }
        }
    }
    (verdict, counts)
}

/// Clients mostly take the first address: each question gets another one. Records of addresses are all of one length.
fn rotated(out: &mut Vec<u8>, records: &Records<'_>, by: usize) {
    let count = usize::from(records.answer_count).max(1);
    let (last, first) = records.answers.split_at((by % count) * (records.answers.len() / count));
    out.extend_from_slice(first);
    out.extend_from_slice(last);
}
