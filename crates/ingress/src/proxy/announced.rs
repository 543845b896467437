//! Who a client is, as a load balancer in front says it before the first byte: the PROXY protocol, versions 1 and 2
//! (haproxy's `doc/proxy-protocol.txt`).

use std::io::{Error, ErrorKind};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt};

/// What version 2 begins with.
pub const SIGNATURE: [u8; 12] = *b"\r\n\r\n\0\r\nQUIT\n";
/// The longest line of version 1, with its end.
const LONGEST_LINE: usize = 107;
/// Addresses and whatever else version 2 brings.
const LONGEST_BODY: u16 = 4096;

fn wrong(what: &'static str) -> Error {
    Error::new(ErrorKind::InvalidData, what)
}

/// Reads what is said, and not one byte more. `None`: the load balancer speaks for itself.
///
/// # Errors
/// Nothing is said, or it makes no sense: then nobody knows who asks.
pub async fn read<S: AsyncRead + Unpin>(stream: &mut S) -> Result<Option<SocketAddr>, Error> {
    let mut head = [0; SIGNATURE.len()];
    stream.read_exact(&mut head).await?;
    if head == SIGNATURE {
        let mut rest = [0; 4];
        stream.read_exact(&mut rest).await?;
        let length = u16::from_be_bytes([rest[2], rest[3]]);
        if length > LONGEST_BODY {
            return Err(wrong("the PROXY header is too long"));
        }
        let mut body = vec![0; usize::from(length)];
        stream.read_exact(&mut body).await?;
        return version2(rest[0], rest[1], &body);
    }
    if !head.starts_with(b"PROXY ") {
        return Err(wrong("there is no PROXY header"));
    }
    let mut line = head.to_vec();
    while !line.ends_with(b"\r\n") {
        if line.len() >= LONGEST_LINE {
            return Err(wrong("the PROXY header does not end"));
        }
        line.push(stream.read_u8().await?);
    }
    version1(&line)
}

fn version1(line: &[u8]) -> Result<Option<SocketAddr>, Error> {
    let nonsense = || wrong("the PROXY header makes no sense");
    let line = line.strip_suffix(b"\r\n").and_then(|line| std::str::from_utf8(line).ok()).ok_or_else(nonsense)?;
    let words: Vec<&str> = line.split(' ').collect();
    match words[..] {
        ["PROXY", "UNKNOWN", ..] => Ok(None),
        ["PROXY", family @ ("TCP4" | "TCP6"), source, destination, port, _] => {
            let address: IpAddr = source.parse().map_err(|_| nonsense())?;
            let other: IpAddr = destination.parse().map_err(|_| nonsense())?;
            if address.is_ipv6() != (family == "TCP6") || other.is_ipv6() != address.is_ipv6() {
                return Err(nonsense());
            }
            Ok(Some(SocketAddr::new(address, port.parse().map_err(|_| nonsense())?)))
        }
        _ => Err(nonsense()),
    }
}

fn version2(command: u8, family: u8, body: &[u8]) -> Result<Option<SocketAddr>, Error> {
    match command {
        // A health check of its own.
        0x20 => return Ok(None),
        0x21 => {}
        _ => return Err(wrong("the PROXY header is of another version")),
    }
    let short = || wrong("the PROXY header is too short");
    let port = |at: usize| Some(u16::from_be_bytes([*body.get(at)?, *body.get(at + 1)?]));
    match family {
        // TCP over IPv4: two addresses, two ports.
        0x11 => {
            let octets: [u8; 4] = body.get(..4).and_then(|all| all.try_into().ok()).ok_or_else(short)?;
            Ok(Some(SocketAddr::new(
                Ipv4Addr::from(octets).into(),
                port(8).filter(|_| body.len() >= 12).ok_or_else(short)?,
            )))
        }
        0x21 => {
            let octets: [u8; 16] = body.get(..16).and_then(|all| all.try_into().ok()).ok_or_else(short)?;
            Ok(Some(SocketAddr::new(
                Ipv6Addr::from(octets).into(),
                port(32).filter(|_| body.len() >= 36).ok_or_else(short)?,
            )))
        }
        // What is no TCP over IP has no address that we know.
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn played(bytes: &[u8]) -> Result<(Option<SocketAddr>, Vec<u8>), ErrorKind> {
        let mut left = bytes;
        let said = read(&mut left).await.map_err(|error| error.kind())?;
        Ok((said, left.to_vec()))
    }

    fn second(command: u8, family: u8, body: &[u8]) -> Vec<u8> {
        let length = u16::try_from(body.len()).expect("short").to_be_bytes();
        [&SIGNATURE[..], &[command, family], &length, body, b"GET /"].concat()
    }

    #[tokio::test]
    async fn the_client_is_who_the_balancer_says_and_nothing_else_is_read() {
        let v4 = [&[203, 0, 113, 9, 192, 0, 2, 1][..], &[0x1f, 0x90, 0, 80]].concat();
        let v6: Vec<u8> = [&[0x20, 1, 0xd, 0xb8][..], &[0; 11], &[7], &[0; 16], &[0x1f, 0x90, 0, 80], b"more"].concat();
        for (bytes, wanted) in [
            (b"PROXY TCP4 203.0.113.9 192.0.2.1 8080 80\r\nGET /".to_vec(), Some("203.0.113.9:8080")),
            (b"PROXY TCP6 2001:db8::7 2001:db8::1 8080 80\r\nGET /".to_vec(), Some("[2001:db8::7]:8080")),
            (b"PROXY UNKNOWN\r\nGET /".to_vec(), None),
            (b"PROXY UNKNOWN ff::1 ff::2 1 2\r\nGET /".to_vec(), None),
            (second(0x21, 0x11, &v4), Some("203.0.113.9:8080")),
            (second(0x21, 0x21, &v6), Some("[2001:db8::7]:8080")),
            (second(0x20, 0, &[]), None),
            (second(0x21, 0x31, &[0; 216]), None),
        ] {
            let wanted = wanted.map(|text| text.parse().expect("an address"));
            assert_eq!(played(&bytes).await, Ok((wanted, b"GET /".to_vec())), "{}", String::from_utf8_lossy(&bytes));
        }
    }

    #[tokio::test]
    async fn who_says_nothing_that_makes_sense_is_nobody() {
        let endless = [&b"PROXY TCP4 "[..], &[b'1'; 200]].concat();
        for (bytes, kind) in [
            (b"GET / HTTP/1.1\r\n\r\n".to_vec(), ErrorKind::InvalidData),
            (b"PROXY TCP4 203.0.113.9 192.0.2.1 8080\r\n".to_vec(), ErrorKind::InvalidData),
            (b"PROXY TCP4 2001:db8::7 2001:db8::1 8080 80\r\n".to_vec(), ErrorKind::InvalidData),
            (b"PROXY TCP4 203.0.113.9 192.0.2.1 99999 80\r\n".to_vec(), ErrorKind::InvalidData),
            (b"PROXY UDP4 203.0.113.9 192.0.2.1 1 80\r\n".to_vec(), ErrorKind::InvalidData),
            (endless, ErrorKind::InvalidData),
            (second(0x31, 0x11, &[0; 12]), ErrorKind::InvalidData),
            (second(0x21, 0x11, &[0; 11]), ErrorKind::InvalidData),
            (second(0x21, 0x21, &[0; 35]), ErrorKind::InvalidData),
            ([&SIGNATURE[..], &[0x21, 0x11, 0xff, 0xff]].concat(), ErrorKind::InvalidData),
            (b"PROXY".to_vec(), ErrorKind::UnexpectedEof),
            (SIGNATURE.to_vec(), ErrorKind::UnexpectedEof),
        ] {
            assert_eq!(played(&bytes).await, Err(kind), "{}", String::from_utf8_lossy(&bytes));
        }
    }
}
