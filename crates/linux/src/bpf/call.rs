//! The bpf system call, as far as it is used here (linux/bpf.h, `union bpf_attr`).

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::time::Duration;

const OBJ_PIN: u32 = 6;
const OBJ_GET: u32 = 7;
const GET_INFO: u32 = 15;
const LOOKUP_BATCH: u32 = 24;
const UPDATE_BATCH: u32 = 26;
const DELETE_BATCH: u32 = 27;
const LINK_CREATE: u32 = 28;
const LINK_UPDATE: u32 = 29;

/// Where a program is attached (`enum bpf_attach_type`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Hook {
    Send = 1,
    Talk = 3,
    Connect4 = 10,
    Connect6 = 11,
    Sendmsg4 = 14,
    Sendmsg6 = 15,
    Recvmsg4 = 19,
    Recvmsg6 = 20,
    Getpeername4 = 29,
    Getpeername6 = 30,
    Arriving = 46,
    Leaving = 47,
}

/// The clock by which programs note times (`bpf_ktime_get_ns`): since the machine's start, without its sleep.
pub fn now() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel fills the struct, which lives until it returns; this clock always exists.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

/// How long the kernel's tick is, in which it counts the timeouts of sockets: the resolution of its coarse clocks.
pub fn tick() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the kernel fills the struct, which lives until it returns; this clock always exists.
    unsafe { libc::clock_getres(libc::CLOCK_MONOTONIC_COARSE, &raw mut time) };
    Duration::new(time.tv_sec.unsigned_abs(), time.tv_nsec.unsigned_abs() as u32)
}

fn bpf<T>(command: u32, attributes: &mut T) -> io::Result<RawFd> {
    let size = std::mem::size_of::<T>();
    // SAFETY: the kernel reads and writes at most `size` bytes of a plain `repr(C)` struct that we own, and only the
    // memory that its pointers name, which the callers below keep alive and long enough.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as RawFd) }
}

fn owned(fd: RawFd) -> OwnedFd {
    // SAFETY: the kernel just returned this descriptor; nobody else owns it.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn path_text(path: &Path) -> io::Result<CString> {
    Ok(CString::new(path.as_os_str().as_bytes())?)
}

#[repr(C)]
struct ObjectAttributes {
    path: u64,
    fd: u32,
    flags: u32,
}

/// The map or link pinned at a path.
pub fn get(path: &Path) -> io::Result<OwnedFd> {
    let text = path_text(path)?;
    bpf(OBJ_GET, &mut ObjectAttributes { path: text.as_ptr() as u64, fd: 0, flags: 0 }).map(owned)
}

pub fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let text = path_text(path)?;
    let fd = object.as_raw_fd() as u32;
    bpf(OBJ_PIN, &mut ObjectAttributes { path: text.as_ptr() as u64, fd, flags: 0 }).map(drop)
}

#[repr(C)]
struct LinkAttributes {
    program: u32,
    target: u32,
    hook: u32,
    flags: u32,
    /// Further fields, which depend on the hook; zero is their default.
    more: [u64; 4],
}

/// Attaches a program to a cgroup's descriptor or to a network device's index in the calling thread's namespace.
pub fn link(program: BorrowedFd<'_>, target: u32, hook: Hook) -> io::Result<OwnedFd> {
    let program = program.as_raw_fd() as u32;
    let mut attributes = LinkAttributes { program, target, hook: hook as u32, flags: 0, more: [0; 4] };
    bpf(LINK_CREATE, &mut attributes).map(owned)
}

#[repr(C)]
struct UpdateAttributes {
    link: u32,
    program: u32,
    flags: u32,
    old_program: u32,
}

/// Puts another program in the place of the one that a link holds, between two packets.
pub fn relink(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let (link, program) = (link.as_raw_fd() as u32, program.as_raw_fd() as u32);
    bpf(LINK_UPDATE, &mut UpdateAttributes { link, program, flags: 0, old_program: 0 }).map(drop)
}

/// `struct bpf_map_info`, its beginning.
#[repr(C)]
#[derive(Default)]
struct MapInfo {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

#[repr(C)]
struct InfoAttributes {
    fd: u32,
    length: u32,
    info: u64,
}

#[repr(C)]
struct BatchAttributes {
    from: u64,
    to: u64,
    keys: u64,
    values: u64,
    count: u32,
    map: u32,
    element_flags: u64,
    flags: u64,
}

/// An open map with its sizes in bytes.
#[derive(Debug)]
pub struct Map {
    fd: OwnedFd,
    pub key_size: usize,
    pub value_size: usize,
    pub limit: u32,
}

impl Map {
    pub fn open(path: &Path) -> io::Result<Self> {
        let fd = get(path)?;
        let mut info = MapInfo::default();
        let length = std::mem::size_of::<MapInfo>() as u32;
        let info_at = std::ptr::from_mut(&mut info) as u64;
        bpf(GET_INFO, &mut InfoAttributes { fd: fd.as_raw_fd() as u32, length, info: info_at })?;
        let MapInfo { key_size, value_size, max_entries: limit, .. } = info;
        Ok(Map { fd, key_size: key_size as usize, value_size: value_size as usize, limit })
    }

    fn batch(&self, keys: u64, values: u64, count: usize) -> BatchAttributes {
        let map = self.fd.as_raw_fd() as u32;
        BatchAttributes { from: 0, to: 0, keys, values, count: count as u32, map, element_flags: 0, flags: 0 }
    }

    /// Adds or replaces entries.
    pub fn put(&self, keys: &[u8], values: &[u8]) -> io::Result<()> {
        let count = keys.len() / self.key_size;
        assert_eq!((count * self.key_size, count * self.value_size), (keys.len(), values.len()), "whole entries");
        if count == 0 {
            return Ok(());
        }
        bpf(UPDATE_BATCH, &mut self.batch(keys.as_ptr() as u64, values.as_ptr() as u64, count)).map(drop)
    }

    pub fn remove(&self, mut keys: &[u8]) -> io::Result<()> {
        assert_eq!(keys.len() % self.key_size, 0, "whole keys");
        while !keys.is_empty() {
            let mut attributes = self.batch(keys.as_ptr() as u64, 0, keys.len() / self.key_size);
            match bpf(DELETE_BATCH, &mut attributes) {
                Ok(_) => return Ok(()),
                // The kernel stops at a key that is absent: go on behind it.
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {
                    let done = (attributes.count as usize + 1) * self.key_size;
                    keys = keys.get(done..).unwrap_or_default();
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// All keys and values, in the kernel's order.
    pub fn entries(&self) -> io::Result<(Vec<u8>, Vec<u8>)> {
        let (mut all_keys, mut all_values) = (Vec::new(), Vec::new());
        // A cursor is as long as a key, and at least four bytes.
        let mut cursor = vec![0_u8; self.key_size.max(4)];
        let mut next = cursor.clone();
        let mut started = false;
        let mut room = 4_096_usize;
        loop {
            let mut keys = vec![0_u8; room * self.key_size];
            let mut values = vec![0_u8; room * self.value_size];
            let mut attributes = self.batch(keys.as_mut_ptr() as u64, values.as_mut_ptr() as u64, room);
            attributes.from = if started { cursor.as_ptr() as u64 } else { 0 };
            attributes.to = next.as_mut_ptr() as u64;
            let result = bpf(LOOKUP_BATCH, &mut attributes);
            let last = match result {
                Ok(_) => false,
                Err(error) if error.raw_os_error() == Some(libc::ENOENT) => true,
                // One bucket of the table has more entries than there was room for.
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    room *= 2;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let count = attributes.count as usize;
            all_keys.extend_from_slice(&keys[..count * self.key_size]);
            all_values.extend_from_slice(&values[..count * self.value_size]);
            if last {
                return Ok((all_keys, all_values));
            }
            std::mem::swap(&mut cursor, &mut next);
            started = true;
        }
    }
}
