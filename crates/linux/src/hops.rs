//! Datagrams with the number of hops that they had left: who checks it knows how far away the sender is at most.

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsRawFd, BorrowedFd};

/// Lets [`receive`] tell the hops of each datagram of this socket.
pub fn tell(socket: BorrowedFd<'_>, is_v4: bool) -> io::Result<()> {
    let (level, name) = match is_v4 {
        true => (libc::IPPROTO_IP, libc::IP_RECVTTL),
        false => (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT),
    };
    let on: libc::c_int = 1;
    let (value, length) = ((&raw const on).cast(), size_of::<libc::c_int>() as libc::socklen_t);
    // SAFETY: `on` is a whole int, which the kernel reads during the call.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value, length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// One datagram: its length, who sent it, and the hops that were left; without these it is as if it came from far away.
///
/// # Errors
/// `WouldBlock` where none waits, and whatever else the kernel says.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, IpAddr, u8)> {
    let mut from = MaybeUninit::<libc::sockaddr_storage>::zeroed();
    // Room for one int beside its header, aligned as headers are.
    let mut control = [0_u64; 8];
    let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all of it is plain numbers and pointers, for which zero is a value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_name = from.as_mut_ptr().cast();
    message.msg_namelen = size_of::<libc::sockaddr_storage>() as libc::socklen_t;
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = size_of_val(&control) as _;
    // SAFETY: every pointer in `message` leads to memory of the length beside it that is ours during the call.
    let got = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_DONTWAIT) };
    let length = usize::try_from(got).map_err(|_| io::Error::last_os_error())?;
    let mut hops = 0;
    // SAFETY: `message` is as the kernel left it, and its control buffer lives.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: CMSG_FIRSTHDR and CMSG_NXTHDR return null or a whole header within the control buffer.
        let (level, kind) = unsafe { ((*header).cmsg_level, (*header).cmsg_type) };
        if matches!((level, kind), (libc::IPPROTO_IP, libc::IP_TTL) | (libc::IPPROTO_IPV6, libc::IPV6_HOPLIMIT)) {
            // SAFETY: the value of either is an int behind the header.
            let value = unsafe { libc::CMSG_DATA(header).cast::<libc::c_int>().read_unaligned() };
            hops = u8::try_from(value).unwrap_or(0);
        }
        // SAFETY: as above.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    // SAFETY: zeroed before, and the kernel wrote an address of the socket's family into it.
    let from = unsafe { from.assume_init() };
    let address = match i32::from(from.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that it is a sockaddr_in, which a storage has room and alignment for.
            let from = unsafe { (&raw const from).cast::<libc::sockaddr_in>().read() };
            IpAddr::V4(Ipv4Addr::from(from.sin_addr.s_addr.to_ne_bytes()))
        }
        libc::AF_INET6 => {
            // SAFETY: as above, for a sockaddr_in6.
            let from = unsafe { (&raw const from).cast::<libc::sockaddr_in6>().read() };
            IpAddr::V6(Ipv6Addr::from(from.sin6_addr.s6_addr))
        }
        family => return Err(io::Error::other(format!("a datagram of address family {family}"))),
    };
    Ok((length, address, hops))
}
