//! Packets that a rule logs (`log group N`), as they happen (linux/netfilter/nfnetlink_log.h).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::nft::netlink::{NLM_F_ACK, Raw, Reply, Writer, errno};

const SUBSYSTEM: u16 = 4 << 8;
const MSG_CONFIG: u16 = SUBSYSTEM | 1;
const CONFIG_COMMAND: u16 = 1;
const CONFIG_MODE: u16 = 2;
const CONFIG_TIMEOUT: u16 = 4;
const CONFIG_THRESHOLD: u16 = 5;
const COMMAND_BIND: u8 = 1;
const COPY_PACKET: u8 = 2;
const PAYLOAD: u16 = 9;

const TCP: u8 = 6;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Netlink(#[from] crate::nft::Error),
    #[error(
        "cannot listen to log group {group}: {cause}; is nfnetlink_log in this kernel, and does another program listen to it?"
    )]
    Refused { group: u16, cause: std::io::Error },
    #[error("the kernel said nothing about log group {0}; retry")]
    Silent(u16),
}

/// The packets of one group in one network namespace. Readable (as a file descriptor) when packets wait.
pub struct Socket {
    raw: Raw,
}

impl Socket {
    /// Listens to the group in the namespace given, or in the calling thread's. Each packet is told at once, with at most
    /// `bytes` of it, from its IP header on.
    pub fn open(namespace: Option<BorrowedFd<'_>>, group: u16, bytes: u32) -> Result<Self, Error> {
        let mut socket = Socket { raw: Raw::open(namespace)? };
        let mut mode = bytes.to_be_bytes().to_vec();
        mode.extend([COPY_PACKET, 0]);
        socket.configure(group, 1, |writer| writer.u8(CONFIG_COMMAND, COMMAND_BIND))?;
        socket.configure(group, 2, |writer| {
            writer.bytes(CONFIG_MODE, &mode);
            // The kernel would otherwise collect packets for up to a second.
            writer.u32(CONFIG_TIMEOUT, 0);
            writer.u32(CONFIG_THRESHOLD, 1);
        })?;
        Ok(socket)
    }

    /// The socket as something to wait for. To be called inside a tokio runtime.
    pub fn register(self) -> std::io::Result<AsyncFd<Self>> {
        // SAFETY: the descriptor is owned by the socket, which never replaces it and closes it only when it is dropped, after
        // the registration.
        Ok(unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) }?)
    }

    fn configure(&mut self, group: u16, sequence: u32, settings: impl FnOnce(&mut Writer)) -> Result<(), Error> {
        let mut writer = Writer::default();
        writer.begin(MSG_CONFIG, NLM_F_ACK, sequence, libc::AF_UNSPEC as u8, group);
        settings(&mut writer);
        writer.end();
        self.raw.send(&writer.buffer)?;
        let mut outcome = Err(Error::Silent(group));
        self.raw.replies(|reply| {
            match reply {
                Reply::Ack { .. } => outcome = Ok(()),
                Reply::Failed { errno: number, .. } => {
                    outcome = Err(Error::Refused { group, cause: errno(number) });
                }
                Reply::Object(_) | Reply::Done => {}
            }
            Ok(true)
        })?;
        outcome
    }

    /// Hands over every packet that waits; `false` if the kernel had to leave some out.
    pub fn packets(&mut self, mut visit: impl FnMut(&[u8])) -> Result<bool, Error> {
        let read = self.raw.replies(|reply| {
            if let Reply::Object(attributes) = reply {
                visit(attributes.get(PAYLOAD).unwrap_or_default());
            }
            Ok(true)
        });
        match read {
            Ok(()) => Ok(true),
            Err(crate::nft::Error::Socket(cause)) if cause.raw_os_error() == Some(libc::ENOBUFS) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.raw.as_fd()
    }
}

impl AsRawFd for Socket {
    fn as_raw_fd(&self) -> RawFd {
        self.as_fd().as_raw_fd()
    }
}

/// Who refused a TCP connection, by a packet that says so: the sender of a TCP segment, or the destination of the segment
/// that an ICMP error quotes. `None` for any other packet, and for one that is cut short.
pub fn refuser(packet: &[u8]) -> Option<SocketAddr> {
    let (protocol, from, _, payload) = header(packet)?;
    match protocol {
        TCP => Some(SocketAddr::new(from, port(payload, 0)?)),
        ICMP | ICMPV6 => {
            let (protocol, _, to, quoted) = header(payload.get(8..)?)?;
            (protocol == TCP).then_some(SocketAddr::new(to, port(quoted, 2)?))
        }
        _ => None,
    }
}

/// Protocol, source, destination and what follows an IP header. IPv6 extension headers are not looked through.
fn header(packet: &[u8]) -> Option<(u8, IpAddr, IpAddr, &[u8])> {
    match packet.first()? >> 4 {
        4 => {
            let length = usize::from(packet[0] & 0xf) * 4;
            let address = |at: usize| -> Option<IpAddr> {
                let bytes: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
                Some(Ipv4Addr::from(bytes).into())
            };
            Some((*packet.get(9)?, address(12)?, address(16)?, packet.get(length..)?))
        }
        6 => {
            let address = |at: usize| -> Option<IpAddr> {
                let bytes: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
                Some(Ipv6Addr::from(bytes).into())
            };
            Some((*packet.get(6)?, address(8)?, address(24)?, packet.get(40..)?))
        }
        _ => None,
    }
}

fn port(payload: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(payload.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn v4(protocol: u8, from: [u8; 4], to: [u8; 4], payload: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x45, 0, 0, 0, 0, 0, 0, 0, 64, protocol, 0, 0];
        packet.extend(from);
        packet.extend(to);
        packet.extend(payload);
        packet
    }

    #[test]
    fn a_reset_names_its_sender_and_an_icmp_error_whom_it_quotes() {
        let (pod, client) = ([10, 244, 0, 11], [10, 244, 0, 9]);
        let ports = [0x1f, 0x90, 0xc0, 0x01, 0, 0, 0, 0];
        let expected: SocketAddr = "10.244.0.11:8080".parse().expect("address");
        assert_eq!(refuser(&v4(TCP, pod, client, &ports)), Some(expected));
        let mut error = vec![3, 1, 0, 0, 0, 0, 0, 0];
        error.extend(v4(TCP, client, pod, &[0xc0, 0x01, 0x1f, 0x90, 0, 0, 0, 0]));
        let router = v4(ICMP, [192, 168, 49, 3], client, &error);
        assert_eq!(refuser(&router), Some(expected));
        let udp = v4(17, pod, client, &ports);
        assert_eq!(refuser(&udp), None);
        for length in 0..router.len() - 4 {
            assert_eq!(refuser(&router[..length]), None, "{length} bytes");
        }
        let mut six = vec![0x60, 0, 0, 0, 0, 8, TCP, 64];
        six.extend("fd00:10:244::11".parse::<Ipv6Addr>().expect("address").octets());
        six.extend("fd00:10:244::9".parse::<Ipv6Addr>().expect("address").octets());
        six.extend(ports);
        assert_eq!(refuser(&six), Some("[fd00:10:244::11]:8080".parse().expect("address")));
    }
}
