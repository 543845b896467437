//! Tells an endpoint who its client is, before the first byte, where its route says so: the PROXY protocol, versions 1 and 2
//! (haproxy's `doc/proxy-protocol.txt`).

use std::net::{IpAddr, Ipv6Addr, SocketAddr};

use super::announced::SIGNATURE;
use crate::policy::ProxyProtocol;

/// Who asks, and where it came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announcement {
    pub version: ProxyProtocol,
    pub client: SocketAddr,
    pub local: SocketAddr,
}

impl Announcement {
    pub fn bytes(&self) -> Vec<u8> {
        let (client, mut local) = (self.client.ip().to_canonical(), self.local.ip().to_canonical());
        let ports = (self.client.port(), self.local.port());
        if client.is_ipv6() != local.is_ipv6() {
            // A load balancer in front may speak another family with us than with its client.
            local = if client.is_ipv6() { v6(local).into() } else { std::net::Ipv4Addr::UNSPECIFIED.into() };
        }
        match self.version {
            ProxyProtocol::V1 => {
                let family = if client.is_ipv6() { "TCP6" } else { "TCP4" };
                format!("PROXY {family} {client} {local} {} {}\r\n", ports.0, ports.1).into_bytes()
            }
            ProxyProtocol::V2 => {
                let mut body = [octets(client), octets(local)].concat();
                body.extend(ports.0.to_be_bytes());
                body.extend(ports.1.to_be_bytes());
                let family = if client.is_ipv6() { 0x21 } else { 0x11 };
                let length = if client.is_ipv6() { 36_u16 } else { 12 }.to_be_bytes();
                [&SIGNATURE[..], &[0x21, family], &length, &body].concat()
            }
        }
    }
}

fn v6(ip: IpAddr) -> Ipv6Addr {
    match ip {
        IpAddr::V4(ip) => ip.to_ipv6_mapped(),
        IpAddr::V6(ip) => ip,
    }
}

fn octets(ip: IpAddr) -> Vec<u8> {
    match ip {
        IpAddr::V4(ip) => ip.octets().to_vec(),
        IpAddr::V6(ip) => ip.octets().to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use super::super::announced;
    use super::*;

    #[tokio::test]
    async fn what_is_said_is_what_is_read() {
        for version in [ProxyProtocol::V1, ProxyProtocol::V2] {
            for (client, local) in [
                ("203.0.113.9:8080", "192.0.2.1:80"),
                ("[2001:db8::7]:8080", "[2001:db8::1]:443"),
                ("203.0.113.9:8080", "[2001:db8::1]:443"),
                ("[2001:db8::7]:8080", "192.0.2.1:80"),
                ("203.0.113.9:8080", "[::ffff:192.0.2.1]:80"),
            ] {
                let parse = |text: &str| text.parse().expect("an address");
                let said = Announcement { version, client: parse(client), local: parse(local) }.bytes();
                let bytes = [&said[..], b"GET /"].concat();
                let mut left = &bytes[..];
                let read = announced::read(&mut left).await.expect("it makes sense");
                assert_eq!((read, left), (Some(parse(client)), &b"GET /"[..]), "{version:?} {client} {local}");
            }
        }
    }
}
