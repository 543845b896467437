//! The body of an answer, out of the bytes behind its head.

use bytes::{Buf, Bytes};
use http::header::{
    CONNECTION, CONTENT_LENGTH, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRAILER, TRANSFER_ENCODING, UPGRADE,
};

use super::Http1Error;

/// Bytes of a chunk's first line, extensions with it, and of all trailers.
const LONGEST_LINE: usize = 4 * 1024;
const LONGEST_TRAILERS: usize = 16 * 1024;
const TRAILERS: usize = 64;

/// How much of a body is still to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decoder {
    Done,
    Length(u64),
    UntilClosed,
    Chunked(Chunk),
}

/// What comes next in a chunked body (RFC 9112 7.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Chunk {
    Size,
    Data(u64),
    /// The line's end behind data.
    End,
    Trailers,
}

/// A part of a body.
#[derive(Debug, PartialEq)]
pub enum Part {
    Data(Bytes),
    Trailers(HeaderMap),
}

impl Decoder {
    pub fn length(bytes: u64) -> Self {
        if bytes == 0 { Decoder::Done } else { Decoder::Length(bytes) }
    }

    pub fn chunked() -> Self {
        Decoder::Chunked(Chunk::Size)
    }

    pub fn is_done(&self) -> bool {
        *self == Decoder::Done
    }

    /// Takes the next part from the front of `bytes`. `None`: it is done, or there must come more.
    ///
    /// # Errors
    /// What is there is no body of this kind.
    pub fn next(&mut self, bytes: &mut Bytes) -> Result<Option<Part>, Http1Error> {
        match self {
            Decoder::Done => Ok(None),
            _ if bytes.is_empty() => Ok(None),
            Decoder::UntilClosed => Ok(Some(Part::Data(std::mem::take(bytes)))),
            Decoder::Length(left) => {
                let data = take(bytes, left);
                *self = Decoder::length(*left);
                Ok(Some(Part::Data(data)))
            }
            Decoder::Chunked(_) => self.next_chunk(bytes),
        }
    }

    fn next_chunk(&mut self, bytes: &mut Bytes) -> Result<Option<Part>, Http1Error> {
        while let Decoder::Chunked(chunk) = self {
            match chunk {
                Chunk::Size => match size(bytes)? {
                    Some((0, line)) => {
                        bytes.advance(line);
                        *chunk = Chunk::Trailers;
                    }
                    Some((size, line)) => {
                        bytes.advance(line);
                        *chunk = Chunk::Data(size);
                    }
                    None => return Ok(None),
                },
                Chunk::Data(left) => {
                    if bytes.is_empty() {
                        return Ok(None);
                    }
                    let data = take(bytes, left);
                    if *left == 0 {
                        *chunk = Chunk::End;
                    }
                    return Ok(Some(Part::Data(data)));
                }
                Chunk::End => match &bytes[..] {
                    [b'\r', b'\n', ..] => {
                        bytes.advance(2);
                        *chunk = Chunk::Size;
                    }
                    [] | [b'\r'] => return Ok(None),
                    _ => return Err(Http1Error::NotHttp("a chunk is longer than it says")),
                },
                Chunk::Trailers => {
                    let Some(trailers) = trailers(bytes)? else { return Ok(None) };
                    *self = Decoder::Done;
                    return Ok((!trailers.is_empty()).then_some(Part::Trailers(trailers)));
                }
            }
        }
        Ok(None)
    }

    /// Takes the end, if it stands directly behind the last data: then these two are one event.
    pub fn settle(&mut self, bytes: &mut Bytes) {
        const END: &[u8] = b"\r\n0\r\n\r\n";
        if *self == Decoder::Chunked(Chunk::End) && bytes.starts_with(END) {
            bytes.advance(END.len());
            *self = Decoder::Done;
        }
    }
}

fn take(bytes: &mut Bytes, left: &mut u64) -> Bytes {
    let count = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
    *left -= count as u64;
    bytes.split_to(count)
}

/// The size in a chunk's first line, and the length of that line.
fn size(bytes: &[u8]) -> Result<Option<(u64, usize)>, Http1Error> {
    let Some(end) = bytes.iter().take(LONGEST_LINE).position(|byte| *byte == b'\n') else {
        return match bytes.len() < LONGEST_LINE {
            true => Ok(None),
            false => Err(Http1Error::NotHttp("a chunk's first line does not end")),
        };
    };
    let wrong = Http1Error::NotHttp("a chunk has no size");
    let Some(line) = bytes[..end].strip_suffix(b"\r") else { return Err(wrong) };
    let (digits, rest) = line.split_at(line.iter().position(|byte| !byte.is_ascii_hexdigit()).unwrap_or(line.len()));
    // Sixteen digits are all that 64 bits hold.
    let is_clean = (1..=16).contains(&digits.len())
        && matches!(rest.trim_ascii_start(), [] | [b';', ..])
        && !rest.iter().any(|byte| matches!(byte, b'\r' | 0));
    let digits = std::str::from_utf8(digits).ok().filter(|_| is_clean);
    let size = digits.and_then(|digits| u64::from_str_radix(digits, 16).ok()).ok_or(wrong)?;
    Ok(Some((size, end + 1)))
}

/// What says where a message goes and how it is carried is not for a trailer to say (RFC 9110 6.5.1).
pub fn is_framing(name: &HeaderName) -> bool {
    matches!(*name, CONTENT_LENGTH | TRANSFER_ENCODING | HOST | CONNECTION | TE | TRAILER | UPGRADE)
}

/// Trailers to the empty line, which is taken, too.
fn trailers(bytes: &mut Bytes) -> Result<Option<HeaderMap>, Http1Error> {
    let mut slots = [httparse::EMPTY_HEADER; TRAILERS];
    let wrong = Http1Error::NotHttp("its trailers are none");
    let Ok(parsed) = httparse::parse_headers(bytes, &mut slots) else { return Err(wrong) };
    let httparse::Status::Complete((length, lines)) = parsed else {
        return if bytes.len() < LONGEST_TRAILERS { Ok(None) } else { Err(wrong) };
    };
    let mut trailers = HeaderMap::new();
    for line in lines {
        let name = HeaderName::from_bytes(line.name.as_bytes());
        let (Ok(name), Ok(value)) = (name, HeaderValue::from_bytes(line.value)) else { return Err(wrong) };
        if !is_framing(&name) {
            trailers.append(name, value);
        }
    }
    bytes.advance(length);
    Ok(Some(trailers))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What becomes of a body that comes in pieces of this size: its data, its trailers' count, and what is behind it.
    fn decode(mut decoder: Decoder, text: &str, piece: usize) -> Result<(String, usize, String), String> {
        let (mut held, mut data, mut trailers) = (Bytes::new(), Vec::new(), 0);
        for piece in text.as_bytes().chunks(piece) {
            held = Bytes::from([&held[..], piece].concat());
            loop {
                match decoder.next(&mut held).map_err(|error| error.to_string())? {
                    Some(Part::Data(bytes)) => data.extend_from_slice(&bytes),
                    Some(Part::Trailers(all)) => trailers += all.len(),
                    None => break,
                }
                decoder.settle(&mut held);
            }
        }
        if !decoder.is_done() {
            return Err("it goes on".to_owned());
        }
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).expect("text");
        Ok((text(&data), trailers, text(&held)))
    }

    #[test]
    fn a_body_is_the_same_in_pieces_of_every_size() {
        for (decoder, text, expected) in [
            (Decoder::length(5), "hello", ("hello", 0, "")),
            (Decoder::length(5), "hellomore", ("hello", 0, "more")),
            (Decoder::chunked(), "5\r\nhello\r\n0\r\n\r\n", ("hello", 0, "")),
            (Decoder::chunked(), "3;a=b\r\nhel\r\n02 \r\nlo\r\n000\r\n\r\nmore", ("hello", 0, "more")),
            (Decoder::chunked(), "0\r\n\r\n", ("", 0, "")),
            (Decoder::chunked(), "5\r\nhello\r\n0\r\na: b\r\nhost: c\r\nd: e\r\n\r\n", ("hello", 2, "")),
        ] {
            for piece in 1..=text.len() {
                let (data, trailers, rest) = decode(decoder, text, piece).expect("a body");
                let all_came = piece == text.len();
                assert_eq!((data.as_str(), trailers), (expected.0, expected.1), "{text:?} by {piece}");
                assert!(!all_came || rest == expected.2, "{text:?}: {rest:?} is left");
            }
        }
    }

    #[test]
    fn what_two_readers_could_read_differently_is_an_error() {
        for text in [
            "\r\nhello",
            "x\r\nhello",
            "5\nhello\r\n0\r\n\r\n",
            "5\r\nhello0\r\n\r\n",
            "5\r\nhello\n0\r\n\r\n",
            "-5\r\nhello\r\n0\r\n\r\n",
            "0x5\r\nhello\r\n0\r\n\r\n",
            "10000000000000005\r\nhello\r\n0\r\n\r\n",
            "5 5\r\nhello\r\n0\r\n\r\n",
            "5;\r\r\nhello\r\n0\r\n\r\n",
            "0\r\na b: c\r\n\r\n",
        ] {
            for piece in [1, text.len()] {
                assert_ne!(decode(Decoder::chunked(), text, piece), Err("it goes on".to_owned()), "{text:?}");
                assert!(decode(Decoder::chunked(), text, piece).is_err(), "{text:?}");
            }
        }
        assert!(decode(Decoder::chunked(), &format!("5;{}", "x".repeat(LONGEST_LINE)), 64).is_err());
        assert!(decode(Decoder::chunked(), &format!("0\r\n{}", "a: b\r\n".repeat(4000)), 4096).is_err());
        assert_eq!(decode(Decoder::length(6), "hello", 5), Err("it goes on".to_owned()));
    }
}
