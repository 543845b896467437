//! The kernel's own: maps and links pinned in a directory of bpffs, programs attached to a cgroup and to network devices.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya::programs::Program;
use aya::{Ebpf, EbpfLoader};
use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{FsType, statfs};

use super::call::{self, Hook, Map};
use super::devices::{Devices, Watch};
use super::{Entries, Error, Kernel, Ring};
use crate::netns::Netns;

/// BPF_FS_MAGIC of linux/magic.h.
const BPFFS: FsType = FsType(0xcafe_4a11_u32 as _);
/// CGROUP2_SUPER_MAGIC.
const CGROUP2: FsType = FsType(0x6367_7270);

/// Symbols of the cgroup programs in an object file, and where each goes.
const CGROUP_PROGRAMS: [(&str, Hook); 11] = [
    ("connect4", Hook::Connect4),
    ("connect6", Hook::Connect6),
    ("sendmsg4", Hook::Sendmsg4),
    ("sendmsg6", Hook::Sendmsg6),
    ("recvmsg4", Hook::Recvmsg4),
    ("recvmsg6", Hook::Recvmsg6),
    ("getpeername4", Hook::Getpeername4),
    ("getpeername6", Hook::Getpeername6),
    ("send", Hook::Send),
    ("release", Hook::Release),
    ("talk", Hook::Talk),
];
pub(super) const ARRIVING: &str = "arriving";
pub(super) const LEAVING: &str = "leaving";

/// Where a node's programs are attached, and where they are kept while no agent runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hooks {
    /// A directory of a cgroup2 file system: sockets of processes below it are balanced.
    pub cgroup: PathBuf,
    /// A directory of the node's own. A bpffs is mounted here.
    pub pins: PathBuf,
}

/// eBPF of one node.
pub struct Pinned {
    hooks: Hooks,
    /// Below `pins`, so that maps of another layout are never taken for these.
    dir: PathBuf,
    object: &'static [u8],
    namespace: Netns,
    maps: BTreeMap<String, Map>,
    /// From the first `attach` on.
    running: Option<Running>,
}

struct Running {
    /// Keeps the programs that new devices will need.
    _programs: Ebpf,
    devices: Arc<Devices>,
    _watch: Watch,
}

impl Pinned {
    /// `object` is an ELF file with maps that are pinned by name and with programs named as in this module; `layout` is
    /// the version of its maps. Nothing is loaded before [`Kernel::attach`].
    pub fn open(
        object: &'static [u8],
        layout: u32,
        hooks: Hooks,
        namespace: Option<BorrowedFd<'_>>,
    ) -> Result<Self, Error> {
        let namespace = match namespace {
            Some(fd) => Netns::open(Path::new(&format!("/proc/self/fd/{}", fd.as_raw_fd())))?,
            None => Netns::current()?,
        };
        let dir = hooks.pins.join(format!("services-{layout}"));
        Ok(Pinned { hooks, dir, object, namespace, maps: BTreeMap::new(), running: None })
    }

    fn load(&mut self) -> Result<Running, Error> {
        mount_pins(&self.hooks.pins)?;
        let pins = |cause| Error::Pins { path: self.dir.clone(), cause };
        fs::create_dir_all(&self.dir).map_err(pins)?;
        let cgroup = open_cgroup(&self.hooks.cgroup)?;
        let mut programs = EbpfLoader::new()
            .default_map_pin_directory(&self.dir)
            .load(self.object)
            .map_err(|error| missing("load eBPF maps", &error))?;
        let mut names: Vec<String> = programs.programs().map(|(name, _)| name.to_owned()).collect();
        names.sort();
        for name in names {
            let program = programs.program_mut(&name).expect("it was just listed");
            let loaded = match program {
                Program::CgroupSockAddr(program) => program.load(),
                Program::CgroupSkb(program) => program.load(),
                Program::CgroupSock(program) => program.load(),
                Program::SockOps(program) => program.load(),
                Program::SchedClassifier(program) => program.load(),
                other => panic!("no hook for the program {name} of type {:?}", other.prog_type()),
            };
            loaded.map_err(|error| missing(&format!("run the program {name}"), &error))?;
        }
        for (name, hook) in CGROUP_PROGRAMS {
            let program = descriptor(&programs, name)?;
            let pin = self.dir.join(format!("link-{name}"));
            attach(program.as_fd(), cgroup.as_raw_fd() as u32, hook, &pin)
                .map_err(|cause| missing(&format!("attach {name} to {}", self.hooks.cgroup.display()), &cause))?;
        }
        let (arriving, leaving) = (descriptor(&programs, ARRIVING)?, descriptor(&programs, LEAVING)?);
        let devices = Arc::new(Devices::new(self.namespace.clone(), self.dir.clone(), arriving, leaving));
        forget_other_layouts(&self.hooks.pins, &self.dir).map_err(pins)?;
        // Watching starts before the first look, so that no device is missed.
        let watch = Watch::start(devices.clone())?;
        devices.attach()?;
        Ok(Running { _programs: programs, devices, _watch: watch })
    }

    /// Detaches the programs of sockets; those of packets stay.
    pub fn detach_sockets(&self) -> Result<(), Error> {
        for (name, _) in CGROUP_PROGRAMS {
            match fs::remove_file(self.dir.join(format!("link-{name}"))) {
                Err(cause) if cause.kind() != io::ErrorKind::NotFound => {
                    return Err(Error::Pins { path: self.dir.clone(), cause });
                }
                _ => {}
            }
        }
        Ok(())
    }

    /// The map of that name, for whoever is to look into it; it is there once the programs have been attached.
    pub fn descriptor(&self, map: &str) -> Result<OwnedFd, Error> {
        call::get(&self.dir.join(map)).map_err(|cause| Error::Map { map: map.into(), cause })
    }

    /// The ring of that name; it is there once the programs have been attached.
    pub fn ring(&self, name: &str) -> Result<Ring, Error> {
        Ring::open(&self.dir.join(name)).map_err(|cause| Error::Map { map: name.into(), cause })
    }

    fn map(&mut self, name: &str) -> Result<&Map, Error> {
        if !self.maps.contains_key(name) {
            let map = Map::open(&self.dir.join(name)).map_err(|cause| Error::Map { map: name.into(), cause })?;
            self.maps.insert(name.into(), map);
        }
        Ok(&self.maps[name])
    }
}

fn missing(what: &str, cause: &dyn std::error::Error) -> Error {
    // The verifier's words are in the innermost error.
    let mut text = cause.to_string();
    let mut source = cause.source();
    while let Some(inner) = source {
        text = format!("{text}: {inner}");
        source = inner.source();
    }
    Error::Missing { what: what.into(), cause: text }
}

fn descriptor(programs: &Ebpf, name: &str) -> Result<OwnedFd, Error> {
    let program = programs.program(name).expect("the object file has it");
    let fd = program.fd().and_then(|fd| Ok(fd.as_fd().try_clone_to_owned()?));
    fd.map_err(|error| missing(&format!("hold the program {name}"), &error))
}

fn open_cgroup(path: &Path) -> Result<fs::File, Error> {
    let failed = |cause| Error::Cgroup { path: path.into(), cause };
    if statfs(path).map_err(|errno| failed(errno.into()))?.filesystem_type() != CGROUP2 {
        return Err(failed(io::ErrorKind::InvalidInput.into()));
    }
    fs::File::open(path).map_err(failed)
}

fn mount_pins(path: &Path) -> Result<(), Error> {
    let failed = |cause| Error::Pins { path: path.into(), cause };
    fs::create_dir_all(path).map_err(failed)?;
    if is_bpffs(path) {
        return Ok(());
    }
    mount(Some("bpf"), path, Some("bpf"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC, None::<&str>)
        .map_err(|errno| failed(errno.into()))
}

fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|stat| stat.filesystem_type() == BPFFS)
}

/// Attaches a program by a pinned link. A link of an earlier run gets the program instead: there is no moment without one.
pub(super) fn attach(program: BorrowedFd<'_>, target: u32, hook: Hook, pin: &Path) -> io::Result<()> {
    if let Ok(held) = call::get(pin) {
        // It refuses if what it was attached to has gone.
        if call::relink(held.as_fd(), program).is_ok() {
            return Ok(());
        }
        fs::remove_file(pin)?;
    }
    let link = call::link(program, target, hook)?;
    call::pin(link.as_fd(), pin)
}

/// Whatever an older or newer version of us kept is of no use: its maps have another form.
fn forget_other_layouts(pins: &Path, own: &Path) -> io::Result<()> {
    for entry in fs::read_dir(pins)? {
        let path = entry?.path();
        if path.is_dir() && path != own {
            fs::remove_dir_all(path)?;
        }
    }
    Ok(())
}

/// Whether a node has, or had, programs and maps here.
pub fn is_kept(pins: &Path) -> bool {
    is_bpffs(pins)
}

/// Takes a node's programs and maps away; whether there were any.
pub fn remove(pins: &Path) -> Result<bool, Error> {
    let failed = |cause| Error::Pins { path: pins.into(), cause };
    if !is_bpffs(pins) {
        return Ok(false);
    }
    let mut found = false;
    for entry in fs::read_dir(pins).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        // The kernel has files of its own there.
        if entry.file_type().map_err(failed)?.is_dir() {
            found = true;
            fs::remove_dir_all(entry.path()).map_err(failed)?;
        }
    }
    crate::mount::unmount(pins).map_err(failed)?;
    Ok(found)
}

impl Kernel for Pinned {
    fn about(&self) -> String {
        format!("eBPF maps in {}, `bpftool map dump pinned` one of them", self.dir.display())
    }

    fn attach(&mut self) -> Result<(), Error> {
        match &self.running {
            Some(running) => running.devices.attach(),
            None => {
                self.running = Some(self.load()?);
                Ok(())
            }
        }
    }

    fn namespace_cookie(&self) -> Result<u64, Error> {
        Ok(self.namespace.cookie()?)
    }

    fn mtu(&self) -> Result<u32, Error> {
        super::devices::smallest_mtu(&self.namespace)
    }

    fn entries(&mut self, map: &str) -> Result<Entries, Error> {
        if !is_bpffs(&self.hooks.pins) || !self.dir.join(map).exists() {
            return Ok(Entries::default());
        }
        let (keys, values) = self.map(map)?.entries().map_err(|cause| Error::Map { map: map.into(), cause })?;
        Ok(Entries { keys, values })
    }

    fn put(&mut self, map: &str, entries: &Entries) -> Result<(), Error> {
        let held = self.map(map)?;
        held.put(&entries.keys, &entries.values).map_err(|cause| match cause.raw_os_error() {
            Some(libc::E2BIG | libc::ENOSPC) => Error::Full { map: map.into(), limit: held.limit },
            _ => Error::Map { map: map.into(), cause },
        })
    }

    fn remove(&mut self, map: &str, keys: &[u8]) -> Result<(), Error> {
        self.map(map)?.remove(keys).map_err(|cause| Error::Map { map: map.into(), cause })
    }
}
