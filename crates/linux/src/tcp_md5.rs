//! TCP MD5 signatures (RFC 2385): segments from a peer count only if they are signed with a key, and ours to it are.

use std::io;
use std::mem::{size_of, zeroed};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

/// Of linux/tcp.h.
const TCP_MD5SIG: i32 = 14;
const LONGEST_KEY: usize = 80;

#[repr(C)]
struct Signature {
    address: libc::sockaddr_storage,
    flags: u8,
    prefix_length: u8,
    key_length: u16,
    interface: i32,
    key: [u8; LONGEST_KEY],
}

/// Before it connects, or while it listens. No port: the key is for all connections with this address.
///
/// # Errors
/// `InvalidInput` for a key that is empty or longer than 80 bytes; otherwise whatever the kernel says: it needs CONFIG_TCP_MD5SIG.
pub fn set_key(socket: BorrowedFd<'_>, peer: IpAddr, key: &[u8]) -> io::Result<()> {
    if key.is_empty() || key.len() > LONGEST_KEY {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "a TCP MD5 key has from 1 to 80 bytes"));
    }
    // SAFETY: all of it is plain numbers, for which zero is a value.
    let mut signature: Signature = unsafe { zeroed() };
    signature.key_length = key.len() as u16;
    signature.key[..key.len()].copy_from_slice(key);
    let at = (&raw mut signature.address).cast::<u8>();
    match peer {
        IpAddr::V4(v4) => {
            let address = libc::sockaddr_in {
                sin_family: libc::AF_INET as u16,
                sin_port: 0,
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(v4.octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: a sockaddr_storage has room for every address, and is aligned for it.
            unsafe { at.cast::<libc::sockaddr_in>().write(address) };
        }
        IpAddr::V6(v6) => {
            let address = libc::sockaddr_in6 {
                sin6_family: libc::AF_INET6 as u16,
                sin6_port: 0,
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: v6.octets() },
                sin6_scope_id: 0,
            };
            // SAFETY: as above.
            unsafe { at.cast::<libc::sockaddr_in6>().write(address) };
        }
    }
    let (value, length) = ((&raw const signature).cast(), size_of::<Signature>() as libc::socklen_t);
    // SAFETY: `signature` is a whole tcp_md5sig of the length given, which the kernel reads during the call.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, TCP_MD5SIG, value, length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
