//! Processes as values: identity that survives pid reuse, waiting without being the parent, and what a pod's
//! helper needs before it may start containers.

use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

/// A process that cannot be confused with a later one of the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessId {
    pub pid: i32,
    /// Clock ticks after boot, field 22 of /proc/PID/stat.
    pub start_time: u64,
}

impl ProcessId {
    pub fn of(pid: i32) -> io::Result<ProcessId> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let start_time = parse_start_time(&stat)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("unreadable /proc/{pid}/stat")))?;
        Ok(ProcessId { pid, start_time })
    }

    /// False also for a zombie: it runs nothing any more.
    pub fn is_alive(&self) -> bool {
        let Ok(stat) = fs::read_to_string(format!("/proc/{}/stat", self.pid)) else { return false };
        let state = stat.rsplit_once(") ").and_then(|(_, rest)| rest.chars().next());
        parse_start_time(&stat) == Some(self.start_time) && !matches!(state, Some('Z' | 'X'))
    }
}

/// Whether a process is stopped, by a signal or by a debugger; `None` if there is no such process.
pub fn is_stopped(pid: i32) -> Option<bool> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let state = stat.rsplit_once(") ")?.1.chars().next()?;
    Some(matches!(state, 'T' | 't'))
}

/// Whether a process has the socket of this inode number open.
pub fn has_socket(pid: i32, inode: u32) -> bool {
    let wanted = format!("socket:[{inode}]");
    let files = fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
    files.filter_map(|file| fs::read_link(file.path()).ok()).any(|target| target.to_str() == Some(&wanted))
}

/// The command name may hold spaces and parentheses, so count from its last parenthesis.
fn parse_start_time(stat: &str) -> Option<u64> {
    stat.rsplit_once(") ")?.1.split(' ').nth(19)?.parse().ok()
}

/// A handle on a process that may belong to anybody.
#[derive(Debug)]
pub struct PidFd(OwnedFd);

impl PidFd {
    pub fn open(pid: i32) -> io::Result<PidFd> {
        // SAFETY: pidfd_open takes two integers and returns a new descriptor or -1.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel just gave us this descriptor; nobody else owns it.
        Ok(PidFd(unsafe { OwnedFd::from_raw_fd(fd as i32) }))
    }

    /// A process that is gone already is no error.
    pub fn signal(&self, signal: i32) -> io::Result<()> {
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: a null siginfo asks for the same as kill(2).
        let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, self.0.as_raw_fd(), signal, none, 0) };
        match io::Error::last_os_error() {
            _ if result == 0 => Ok(()),
            e if e.raw_os_error() == Some(libc::ESRCH) => Ok(()),
            e => Err(e),
        }
    }

    /// True when the process has ended, false when `patience` ran out first.
    pub fn wait(&self, patience: Duration) -> io::Result<bool> {
        let timeout = PollTimeout::try_from(patience).unwrap_or(PollTimeout::MAX);
        let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
        loop {
            match poll(&mut fds, timeout) {
                Ok(n) => return Ok(n > 0),
                Err(nix::errno::Errno::EINTR) => continue,
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl AsFd for PidFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Orphans below the caller become its children instead of init's.
pub fn become_subreaper() -> io::Result<()> {
    nix::sys::prctl::set_child_subreaper(true).map_err(io::Error::from)
}

/// Kills the caller when its parent dies. Cleared by the kernel when credentials change: call it last.
pub fn die_with_parent() -> io::Result<()> {
    nix::sys::prctl::set_pdeathsig(nix::sys::signal::Signal::SIGKILL).map_err(io::Error::from)
}

/// Signals as a fresh process expects them: Rust ignores SIGPIPE, a helper blocks SIGCHLD, and both survive exec.
pub fn restore_default_signals() -> io::Result<()> {
    use nix::sys::signal::{SigHandler, SigSet, SigmaskHow, Signal, signal, sigprocmask};
    // SAFETY: the default action installs no handler of ours.
    unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl)? };
    sigprocmask(SigmaskHow::SIG_SETMASK, Some(&SigSet::empty()), None)?;
    Ok(())
}

/// Forks a process that does nothing but reap, as process 1 of a new pid namespace, and returns its pid as the
/// caller sees it. Containers of a pod with a shared process namespace join it.
///
/// Only for single-threaded processes.
pub fn fork_pid_namespace_init() -> io::Result<i32> {
    let own = fs::File::open("/proc/self/ns/pid")?;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWPID)?;
    // SAFETY: the caller has one thread, so the child may use everything it inherited.
    let pid = match unsafe { nix::unistd::fork()? } {
        nix::unistd::ForkResult::Parent { child } => child.as_raw(),
        nix::unistd::ForkResult::Child => {
            let _ = die_with_parent();
            // It keeps nothing of the caller's open: a pipe would never end.
            let _ = nix::unistd::dup2(own.as_raw_fd(), 1);
            let mut set = nix::sys::signal::SigSet::empty();
            set.add(nix::sys::signal::Signal::SIGCHLD);
            let _ = set.thread_block();
            loop {
                let _ = set.wait();
                while matches!(
                    nix::sys::wait::waitpid(None, Some(nix::sys::wait::WaitPidFlag::WNOHANG)),
                    Ok(status) if status != nix::sys::wait::WaitStatus::StillAlive
                ) {}
            }
        }
    };
    // Later children belong to the caller's own namespace again.
    nix::sched::setns(own, nix::sched::CloneFlags::CLONE_NEWPID)?;
    Ok(pid)
}

/// Brings `lo` up in the caller's network namespace.
pub fn bring_loopback_up() -> io::Result<()> {
    let socket = nix::sys::socket::socket(
        nix::sys::socket::AddressFamily::Inet,
        nix::sys::socket::SockType::Datagram,
        nix::sys::socket::SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    // SAFETY: an all-zero ifreq is a valid value of this plain C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"lo\0") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: SIOCSIFFLAGS reads one ifreq, which lives until the call returns.
    if unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS as _, &request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// The size of a terminal, in characters.
pub fn set_window_size(terminal: impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = libc::winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCSWINSZ reads one winsize, which lives until the call returns.
    if unsafe { libc::ioctl(terminal.as_fd().as_raw_fd(), libc::TIOCSWINSZ, &size) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Starts `program` with the given stdout; its stderr goes to `log`. It inherits nothing else.
///
/// The returned child should be waited for, or it stays a zombie while the caller lives.
pub fn spawn(program: &Path, arguments: &[&str], stdout: OwnedFd, log: &Path) -> io::Result<tokio::process::Child> {
    let log = fs::File::options().create(true).append(true).open(log)?;
    let mut command = tokio::process::Command::new(program);
    command.args(arguments).stdin(std::process::Stdio::null()).stdout(stdout).stderr(log);
    command.spawn()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_name_with_parentheses_does_not_shift_the_start_time() {
        let stat = "7 (a) b (c) S 1 7 7 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 424242 1000 1";
        assert_eq!(parse_start_time(stat), Some(424242));
    }

    #[test]
    fn we_are_alive_and_our_pid_with_another_start_time_is_not() {
        let me = ProcessId::of(std::process::id() as i32).expect("own stat is readable");
        assert!(me.is_alive());
        assert!(!ProcessId { start_time: me.start_time + 1, ..me }.is_alive());
    }
}
