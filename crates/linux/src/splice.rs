//! Bytes from one socket to another without a copy in user space: splice(2) through a pipe.
//!
//! Nothing here waits: what would block says `WouldBlock`, for an event loop to wait for. A [`Pipe`] is only needed while
//! bytes are under way, so that idle connections need none; a [`Pool`] keeps a few for the next.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Mutex, PoisonError};

/// What a pipe holds at most by default, and how much one call moves: linux/pipe_fs_i.h gives it 16 pages.
const PIPE_BYTES: usize = 64 << 10;

/// A pipe and how many bytes are in it.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    held: usize,
}

impl Pipe {
    pub fn new() -> io::Result<Self> {
        let mut ends = [0; 2];
        // SAFETY: the kernel writes two descriptors into an array of two.
        if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just made these two for us alone.
        let [read, write] = ends.map(|end| unsafe { OwnedFd::from_raw_fd(end) });
        Ok(Pipe { read, write, held: 0 })
    }

    /// Bytes that were taken in and not yet given out.
    pub fn held(&self) -> usize {
        self.held
    }

    /// Takes what the socket has, into an empty pipe. Zero: the peer has ended its stream.
    pub fn fill(&mut self, from: impl AsFd) -> io::Result<usize> {
        let moved = splice(from.as_fd().as_raw_fd(), self.write.as_raw_fd(), PIPE_BYTES)?;
        self.held += moved;
        Ok(moved)
    }

    /// Gives out what the pipe holds, as much as the socket takes. It must hold something.
    pub fn drain(&mut self, to: impl AsFd) -> io::Result<usize> {
        let moved = splice(self.read.as_raw_fd(), to.as_fd().as_raw_fd(), self.held)?;
        self.held -= moved;
        Ok(moved)
    }
}

fn splice(from: i32, to: i32, length: usize) -> io::Result<usize> {
    loop {
        let flags = libc::SPLICE_F_MOVE | libc::SPLICE_F_NONBLOCK;
        // SAFETY: no memory of ours is passed, only descriptors that the caller borrows for the call.
        let moved = unsafe { libc::splice(from, std::ptr::null_mut(), to, std::ptr::null_mut(), length, flags) };
        match usize::try_from(moved) {
            Ok(moved) => return Ok(moved),
            Err(_) => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
}

/// Empty pipes for whoever needs one next.
#[derive(Debug, Default)]
pub struct Pool(Mutex<Vec<Pipe>>);

impl Pool {
    /// How many pipes are kept.
    const KEPT: usize = 64;

    pub fn take(&self) -> io::Result<Pipe> {
        let kept = self.0.lock().unwrap_or_else(PoisonError::into_inner).pop();
        kept.map_or_else(Pipe::new, Ok)
    }

    /// Keeps an empty pipe; one with bytes of a connection that failed goes.
    pub fn give(&self, pipe: Pipe) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if pipe.held == 0 && kept.len() < Self::KEPT {
            kept.push(pipe);
        }
    }
}

/// Tells the socket's peer that nothing more comes, while it may go on sending. A peer that has gone already is fine.
pub fn end_stream(socket: impl AsFd) -> io::Result<()> {
    use nix::sys::socket::{Shutdown, shutdown};
    match shutdown(socket.as_fd().as_raw_fd(), Shutdown::Write) {
        Ok(()) | Err(nix::errno::Errno::ENOTCONN) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

/// Lets this process open as many files as it may by its hard limit, as a relay of many connections needs; the number.
pub fn raise_open_files() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the kernel writes one rlimit into one rlimit.
    if unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the kernel reads one rlimit.
    if unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &limit) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(limit.rlim_max)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};

    fn pair() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("bind");
        let client = TcpStream::connect(listener.local_addr().expect("address")).expect("connect");
        (client, listener.accept().expect("accept").0)
    }

    #[test]
    fn bytes_pass_and_so_does_the_end_of_one_direction() {
        let ((mut client, inner), (outer, mut server)) = (pair(), pair());
        let pool = Pool::default();
        let mut pipe = pool.take().expect("a pipe");
        client.write_all(b"hello").expect("written");
        assert_eq!(pipe.fill(&inner).expect("filled"), 5);
        assert_eq!((pipe.drain(&outer).expect("drained"), pipe.held()), (5, 0));
        end_stream(&client).expect("ended");
        assert_eq!(pipe.fill(&inner).expect("the end"), 0);
        end_stream(&outer).expect("ended");
        let mut text = String::new();
        server.read_to_string(&mut text).expect("read to the end");
        assert_eq!(text, "hello");
        // The other direction is open still.
        server.write_all(b"back").expect("written");
        assert_eq!(pipe.fill(&outer).expect("filled"), 4);
        inner.set_nonblocking(true).expect("non-blocking");
        assert_eq!(pipe.drain(&inner).expect("drained"), 4);
        pool.give(pipe);
        outer.set_nonblocking(true).expect("non-blocking");
        let mut pipe = pool.take().expect("the same pipe");
        assert_eq!(pipe.fill(&outer).expect_err("nothing there").kind(), io::ErrorKind::WouldBlock);
    }
}
