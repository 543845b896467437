//! Network namespaces: make them, find them again, and open sockets inside them.
//!
//! A namespace is entered only on scratch threads that end right after, so that the caller's thread, and every
//! task a runtime may put on it, stays where it was. A socket belongs to the namespace it was *created* in,
//! whoever connects it later.

// Namespaces are entered here, on scratch threads.
#![allow(clippy::disallowed_methods)]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::statfs::{NSFS_MAGIC, statfs};

use crate::link::{Item, LinkError, Links};

/// Of asm-generic/socket.h.
const SO_NETNS_COOKIE: libc::c_int = 71;

#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    #[error("{doing}: {source}; network namespaces need root and a kernel with CONFIG_NET_NS")]
    Namespace { doing: String, source: io::Error },
    #[error("{doing}: {source}")]
    Socket { doing: String, source: io::Error },
    #[error("sysctl {name}={value}: {source}; look for the file under /proc/sys in that namespace")]
    Sysctl { name: String, value: String, source: io::Error },
    #[error(transparent)]
    Link(#[from] LinkError),
}

/// A network namespace, held open: it exists at least as long as this value.
#[derive(Debug, Clone)]
pub struct Netns {
    file: Arc<File>,
    path: Option<PathBuf>,
    /// Device and inode number of the namespace: the same namespace has the same pair whatever path led to it.
    identity: (u64, u64),
}

impl PartialEq for Netns {
    fn eq(&self, other: &Self) -> bool {
        self.identity == other.identity
    }
}

impl Eq for Netns {}

impl Netns {
    /// The namespace of the calling thread.
    pub fn current() -> Result<Self, NetnsError> {
        Self::hold(Path::new("/proc/thread-self/ns/net"), None)
    }

    /// A namespace by its path: a pin made by [`Netns::create`] or `/proc/PID/ns/net`.
    pub fn open(path: &Path) -> Result<Self, NetnsError> {
        Self::hold(path, Some(path.to_owned()))
    }

    /// A namespace that somebody else has opened.
    pub fn from_fd(fd: OwnedFd) -> Result<Self, NetnsError> {
        let file = File::from(fd);
        let meta = file
            .metadata()
            .map_err(|source| NetnsError::Namespace { doing: "look at a namespace's descriptor".into(), source })?;
        Ok(Self { file: Arc::new(file), path: None, identity: (meta.dev(), meta.ino()) })
    }

    fn hold(path: &Path, keep: Option<PathBuf>) -> Result<Self, NetnsError> {
        let failed = |source| NetnsError::Namespace { doing: format!("open namespace {}", path.display()), source };
        let file = File::open(path).map_err(failed)?;
        let meta = file.metadata().map_err(failed)?;
        Ok(Self { file: Arc::new(file), path: keep, identity: (meta.dev(), meta.ino()) })
    }

    /// A namespace pinned at `path` (a bind mount on a file), with its loopback up. One that is pinned there already is kept.
    pub fn create(path: &Path) -> Result<Self, NetnsError> {
        if is_pinned(path) {
            return Self::open(path);
        }
        let pin = || -> io::Result<()> {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            File::create(path)?;
            unshare(CloneFlags::CLONE_NEWNET)?;
            mount(Some("/proc/thread-self/ns/net"), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?;
            Ok(())
        };
        on_scratch_thread(pin)
            .and_then(|done| done)
            .map_err(|source| NetnsError::Namespace { doing: format!("pin namespace {}", path.display()), source })?;
        let namespace = Self::open(path)?;
        Links::open(&namespace)?.ensure(&Item::Up("lo".into()))?;
        Ok(namespace)
    }

    /// Gives this namespace a further name: a pin at `path`, replacing what is pinned there.
    pub fn pin(&self, path: &Path) -> Result<(), NetnsError> {
        if Self::open(path).is_ok_and(|held| held == *self) {
            return Ok(());
        }
        Self::remove(path)?;
        let source = format!("/proc/self/fd/{}", self.file.as_raw_fd());
        File::create(path)
            .and_then(|_| Ok(mount(Some(source.as_str()), path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?))
            .map_err(|source| NetnsError::Namespace { doing: format!("pin namespace {}", path.display()), source })
    }

    /// Unpins `path`. The namespace, and every link in it, goes when its last process and descriptor are gone. Absent is fine.
    pub fn remove(path: &Path) -> Result<(), NetnsError> {
        let failed = |source| NetnsError::Namespace { doing: format!("unpin namespace {}", path.display()), source };
        while is_pinned(path) {
            umount2(path, MntFlags::MNT_DETACH).map_err(|errno| failed(errno.into()))?;
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
            _ => Ok(()),
        }
    }

    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// Runs `work` inside the namespace, on a thread of its own, and waits for it. A panic in `work` is passed on.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T, NetnsError> {
        let inside = || -> io::Result<T> {
            setns(&self.file, CloneFlags::CLONE_NEWNET)?;
            Ok(work())
        };
        on_scratch_thread(inside)
            .and_then(|done| done)
            .map_err(|source| NetnsError::Namespace { doing: format!("enter {}", self.name()), source })
    }

    /// Its inode number, as `namespace_of` has it.
    pub fn inode(&self) -> Result<u64, NetnsError> {
        let failed = |source| NetnsError::Namespace { doing: "look at a network namespace".into(), source };
        Ok(self.file.metadata().map_err(failed)?.ino())
    }

    /// The number by which eBPF programs know the namespace; no other has it as long as the machine runs.
    pub fn cookie(&self) -> Result<u64, NetnsError> {
        let read = || -> io::Result<u64> {
            let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
            let (mut cookie, mut length) = (0_u64, size_of::<u64>() as libc::socklen_t);
            let (value, size) = (std::ptr::from_mut(&mut cookie).cast(), std::ptr::from_mut(&mut length));
            // SAFETY: the kernel writes at most `length` bytes to `cookie`, and both live until it returns.
            let result =
                unsafe { libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, SO_NETNS_COOKIE, value, size) };
            if result < 0 { Err(io::Error::last_os_error()) } else { Ok(cookie) }
        };
        self.run(read)?.map_err(|source| self.socket_failed("read the cookie".into(), source))
    }

    /// Sets one sysctl, named with slashes because link names may contain dots: `net/ipv4/ip_forward`.
    pub fn sysctl(&self, name: &str, value: &str) -> Result<(), NetnsError> {
        self.sysctls(&[(name, value)])
    }

    /// Sets sysctls in order. One that holds the value already is not written: /proc/sys may be read-only in a container.
    pub fn sysctls(&self, settings: &[(&str, &str)]) -> Result<(), NetnsError> {
        self.run(|| {
            for (name, value) in settings {
                let path = Path::new("/proc/sys").join(name);
                let held = fs::read_to_string(&path).is_ok_and(|held| held.trim() == *value);
                if !held {
                    fs::write(&path, value).map_err(|source| NetnsError::Sysctl {
                        name: (*name).into(),
                        value: (*value).into(),
                        source,
                    })?;
                }
            }
            Ok(())
        })?
    }

    /// What a sysctl holds; `None` where the kernel has no such setting.
    pub fn read_sysctl(&self, name: &str) -> Result<Option<String>, NetnsError> {
        self.run(|| fs::read_to_string(Path::new("/proc/sys").join(name)).ok().map(|held| held.trim().to_owned()))
    }

    /// A non-blocking, unconnected TCP socket of the family of `peer`, for whoever wants to set options before connecting
    /// (`tokio::net::TcpSocket::from_std_stream`).
    pub fn tcp_socket(&self, peer: SocketAddr) -> Result<TcpStream, NetnsError> {
        let family = if peer.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        let made = self.run(|| socket(family, SockType::Stream, flags, None))?;
        made.map(TcpStream::from).map_err(|errno| self.socket_failed(format!("socket for {peer}"), errno.into()))
    }

    /// Connects from inside the namespace, without blocking the calling task.
    pub async fn tcp_connect(&self, peer: SocketAddr) -> Result<tokio::net::TcpStream, NetnsError> {
        let socket = tokio::net::TcpSocket::from_std_stream(self.tcp_socket(peer)?);
        socket.connect(peer).await.map_err(|source| self.socket_failed(format!("connect to {peer}"), source))
    }

    /// A non-blocking listener inside the namespace (`tokio::net::TcpListener::from_std`).
    pub fn tcp_listen(&self, address: SocketAddr) -> Result<TcpListener, NetnsError> {
        let open = || -> io::Result<TcpListener> {
            let listener = TcpListener::bind(address)?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        };
        self.run(open)?.map_err(|source| self.socket_failed(format!("listen on {address}"), source))
    }

    /// A non-blocking UDP socket inside the namespace (`tokio::net::UdpSocket::from_std`).
    pub fn udp_bind(&self, address: SocketAddr) -> Result<UdpSocket, NetnsError> {
        let open = || -> io::Result<UdpSocket> {
            let socket = UdpSocket::bind(address)?;
            socket.set_nonblocking(true)?;
            Ok(socket)
        };
        self.run(open)?.map_err(|source| self.socket_failed(format!("bind UDP {address}"), source))
    }

    fn socket_failed(&self, doing: String, source: io::Error) -> NetnsError {
        NetnsError::Socket { doing: format!("{doing} in {}", self.name()), source }
    }

    fn name(&self) -> String {
        match &self.path {
            Some(path) => format!("namespace {}", path.display()),
            None => format!("namespace net:[{}]", self.identity.1),
        }
    }
}

impl AsFd for Netns {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The processes in each network namespace, by the namespace's inode number. Those that end meanwhile are left out.
pub fn inhabited() -> io::Result<BTreeMap<u64, Vec<i32>>> {
    let mut found: BTreeMap<u64, Vec<i32>> = BTreeMap::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else { continue };
        if let Some(namespace) = namespace_of(pid) {
            found.entry(namespace).or_default().push(pid);
        }
    }
    Ok(found)
}

/// The inode number of the network namespace of a process; `None` if there is no such process.
pub fn namespace_of(pid: i32) -> Option<u64> {
    let link = fs::read_link(format!("/proc/{pid}/ns/net")).ok()?;
    link.to_str()?.strip_prefix("net:[")?.strip_suffix(']')?.parse().ok()
}

/// Whether a namespace is mounted on `path`: a plain file is left behind where a process died between the two steps.
pub fn is_pinned(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.filesystem_type() == NSFS_MAGIC)
}

/// Runs `work` on a thread that ends with it, so that a namespace entered there is left for good.
pub(crate) fn on_scratch_thread<T: Send>(work: impl FnOnce() -> T + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let scratch = thread::Builder::new().name("namespace".into()).spawn_scoped(scope, work)?;
        scratch.join().or_else(|panic| resume_unwind(panic))
    })
}
