//! Bytes and file descriptors together over a unix socket (SCM_RIGHTS).

use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recvmsg, sendmsg};

/// The most descriptors one message carries here.
pub const MAX_FDS: usize = 8;

/// Sends all of `bytes`; the descriptors travel with the first of them, so `bytes` must not be empty.
pub fn send_with_fds(socket: impl AsFd, bytes: &[u8], fds: &[RawFd]) -> io::Result<()> {
    let socket = socket.as_fd().as_raw_fd();
    let rights = [ControlMessage::ScmRights(fds)];
    let control: &[ControlMessage<'_>] = if fds.is_empty() { &[] } else { &rights };
    let mut sent = 0;
    while sent < bytes.len() {
        let control = if sent == 0 { control } else { &[] };
        match sendmsg::<UnixAddr>(socket, &[IoSlice::new(&bytes[sent..])], control, MsgFlags::MSG_NOSIGNAL, None) {
            Ok(n) => sent += n,
            Err(nix::errno::Errno::EINTR) => continue,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(())
}

/// One receive: how many bytes came, and the descriptors that came with them. Zero bytes mean the end.
pub fn receive_with_fds(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    let mut slices = [IoSliceMut::new(buffer)];
    let message = loop {
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        match recvmsg::<UnixAddr>(socket.as_fd().as_raw_fd(), &mut slices, Some(&mut space), flags) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => break other?,
        }
    };
    let mut fds = Vec::new();
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(received) = control {
            // SAFETY: the kernel installed these descriptors for us alone with this very message.
            fds.extend(received.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
        }
    }
    Ok((message.bytes, fds))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_descriptor_arrives_usable_with_its_bytes() {
        let (left, right) = UnixStream::pair().expect("a socket pair");
        let (mut inner, outer) = UnixStream::pair().expect("a socket pair");
        send_with_fds(&left, b"hello", &[outer.as_raw_fd()]).expect("sent");
        let mut buffer = [0; 16];
        let (n, mut fds) = receive_with_fds(&right, &mut buffer).expect("received");
        assert_eq!(&buffer[..n], b"hello");
        let mut passed = UnixStream::from(fds.remove(0));
        passed.write_all(b"x").expect("written");
        let mut byte = [0];
        inner.read_exact(&mut byte).expect("read");
        assert_eq!(&byte, b"x");
    }
}
