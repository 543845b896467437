//! The number of a request in a distributed trace (W3C Trace Context): passed on as it came, and made where there is none and
//! somebody wants one.

use std::fmt::Write as _;

use http::{HeaderName, HeaderValue, Request};

use super::worker::Worker;
use crate::policy::Policy;

const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");

/// The request's trace, where its route or the whole proxy takes part; its own if that makes sense and is believed.
pub fn begin<B>(worker: &Worker, policy: &Policy, request: &mut Request<B>) -> Option<HeaderValue> {
    if !policy.traces.unwrap_or(worker.shared.config.trace) {
        return None;
    }
    let held = request.headers().get(TRACEPARENT).filter(|held| policy.trusts_trace && is_trace(held.as_bytes()));
    if let Some(held) = held {
        return Some(held.clone());
    }
    let number = u128::from(worker.random()) << 64 | u128::from(worker.random());
    let mut text = String::with_capacity(55);
    // Writing to a String cannot fail. An identifier of zeroes is none.
    let _ = write!(text, "00-{:032x}-{:016x}-01", number.max(1), worker.random().max(1));
    let made = HeaderValue::try_from(text).ok()?;
    request.headers_mut().insert(TRACEPARENT, made.clone());
    // What it says belongs to another trace.
    request.headers_mut().remove(TRACESTATE);
    Some(made)
}

/// `VERSION-TRACE-PARENT-FLAGS`, in lower case; a later version may go on behind.
fn is_trace(text: &[u8]) -> bool {
    let is_hex = |part: &[u8]| part.iter().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    let is_some = |part: &[u8]| is_hex(part) && part.iter().any(|byte| *byte != b'0');
    let Some((head, rest)) = text.split_at_checked(55) else { return false };
    let dashes = [2, 35, 52].into_iter().all(|at| head[at] == b'-');
    let (version, trace, parent, flags) = (&head[..2], &head[3..35], &head[36..52], &head[53..]);
    let ends = if version == b"00" { rest.is_empty() } else { rest.is_empty() || rest[0] == b'-' };
    dashes && ends && is_hex(version) && version != b"ff" && is_some(trace) && is_some(parent) && is_hex(flags)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_trace_is_one_or_is_not() {
        let good = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
        let later = good.replace("00-4", "cc-4");
        for text in [good, &later, &format!("{later}-what-comes")] {
            assert!(is_trace(text.as_bytes()), "{text}");
        }
        for text in [
            String::new(),
            good.to_uppercase(),
            format!("{good}-more"),
            good[..54].to_owned(),
            good.replace("00-4", "ff-4"),
            good.replace("00f067aa0ba902b7", "0000000000000000"),
            good.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)),
            good.replace('-', "_"),
        ] {
            assert!(!is_trace(text.as_bytes()), "{text}");
        }
    }
}
