//! The kernel: one generic netlink socket for virtual services, route netlink for the interface that holds their addresses.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::path::PathBuf;

use ipnet::IpNet;
use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use nix::sys::socket::SockProtocol;

use super::message;
use super::value::{Connections, Counters, Destination, Info, Key, Op, Scheduler, Service, Timeouts};
use super::{DEVICE, Error, Ipvs};
use crate::link::wire::Message;
use crate::link::{Address, Item, LinkError, Links, socket};
use crate::netns::{Netns, NetnsError, on_scratch_thread};

/// IPVS of one network namespace.
pub struct Socket {
    netlink: socket::Socket,
    /// The number that this boot gave to the netlink family.
    family: u16,
    namespace: Netns,
    links: Links,
}

impl Socket {
    /// Opens IPVS of the namespace given, or of the calling thread's. The kernel loads its module for it, if it has one.
    pub fn open(namespace: Option<BorrowedFd<'_>>) -> Result<Self, Error> {
        let namespace = enter(namespace)?;
        let links = Links::open(&namespace)?;
        let open = || socket::Socket::open(SockProtocol::NetlinkGeneric);
        let mut netlink = namespace.run(open)?.map_err(Error::Open)?;
        let mut family = None;
        match netlink.exchange(message::find_family("IPVS"), |payload| {
            family = family.or_else(|| message::family_id(payload));
        }) {
            Ok(_) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(Error::Query { doing: "look up the family IPVS", errno }),
        }
        let Some(family) = family else {
            let mut missing = vec!["IPVS (module ip_vs)"];
            if !has_dummies()? {
                missing.push(DUMMIES);
            }
            return Err(Error::Missing(missing.join(" and no ")));
        };
        Ok(Socket { netlink, family, namespace, links })
    }

    /// Whether [`DEVICE`] is there. Unlike `open`, this makes the kernel load nothing.
    pub fn is_used(namespace: Option<BorrowedFd<'_>>) -> Result<bool, Error> {
        let namespace = enter(namespace)?;
        Ok(Links::open(&namespace)?.link(DEVICE)?.is_some())
    }

    pub fn timeouts(&mut self) -> Result<Timeouts, Error> {
        self.query("read timeouts", message::get_timeouts(self.family), message::decode_timeouts)
    }

    pub fn info(&mut self) -> Result<Info, Error> {
        self.query("read its version", message::get_info(self.family), message::decode_info)
    }

    /// The destinations of a service, what each has open, and what it has had.
    pub fn counters(&mut self, of: &Key) -> Result<Vec<(SocketAddr, Connections, Counters)>, Error> {
        let request = message::list_destinations(self.family, of);
        self.list("list counters", request, |payload| {
            let (destination, connections) = message::decode_destination(payload, of)?;
            Some((destination.address, connections, message::decode_counters(payload)?))
        })
    }

    /// An error that names the module, if this kernel cannot schedule so. Found out in a namespace that ends with the
    /// question, since only a service that uses it makes the kernel load it.
    pub fn require(scheduler: &Scheduler) -> Result<(), Error> {
        let scheduler = scheduler.clone();
        let ask = move || {
            unshare(CloneFlags::CLONE_NEWNET).map_err(Error::Open)?;
            let key = Key { address: SocketAddr::from(([127, 0, 0, 1], 1)), protocol: 6 };
            let service = Service { key, scheduler: scheduler.clone(), persistence: None, flags: 0 };
            match Socket::open(None)?.apply(&Op::AddService(service)) {
                Err(Error::Refused { errno: Errno::ENOENT, .. }) => {
                    Err(Error::Missing(format!("scheduler {scheduler} of IPVS (module ip_vs_{scheduler})")))
                }
                other => other,
            }
        };
        let thread = |source| NetnsError::Namespace { doing: "ask for a scheduler".into(), source };
        on_scratch_thread(ask).map_err(thread)?
    }

    fn query<T>(
        &mut self,
        doing: &'static str,
        message: Message,
        decode: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<T, Error> {
        self.list(doing, message, decode)?.pop().ok_or(Error::Query { doing, errno: Errno::EBADMSG })
    }

    fn list<T>(
        &mut self,
        doing: &'static str,
        message: Message,
        decode: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, Error> {
        let mut all = Vec::new();
        let answer = self.netlink.exchange(message, |payload| all.extend(decode(payload)));
        answer.map_err(|errno| Error::Query { doing, errno })?;
        Ok(all)
    }

    fn address(address: IpAddr) -> Item {
        Item::Address(Address { link: DEVICE.into(), address: IpNet::from(address) })
    }
}

/// The namespace of an open file, or the calling thread's.
fn enter(namespace: Option<BorrowedFd<'_>>) -> Result<Netns, Error> {
    Ok(match namespace {
        None => Netns::current()?,
        Some(file) => Netns::open(&PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd())))?,
    })
}

const DUMMIES: &str = "dummy interfaces (module dummy)";

/// Whether the kernel can make [`DEVICE`], found out in a namespace that ends with the question.
fn has_dummies() -> Result<bool, Error> {
    let ask = || {
        unshare(CloneFlags::CLONE_NEWNET).map_err(Error::Open)?;
        match Links::current()?.ensure(&Item::Dummy(DEVICE.into())) {
            Ok(()) => Ok(true),
            Err(error) if is_unknown_kind(&error) => Ok(false),
            Err(error) => Err(error.into()),
        }
    };
    let thread = |source| NetnsError::Namespace { doing: "ask for dummy interfaces".into(), source };
    on_scratch_thread(ask).map_err(thread)?
}

fn is_unknown_kind(error: &LinkError) -> bool {
    matches!(error, LinkError::Kernel { errno: Errno::EOPNOTSUPP, .. })
}

/// What an error number means here, where the kernel's own text misleads.
fn hint(op: &Op, errno: Errno) -> &'static str {
    match (op, errno) {
        (Op::AddService(_) | Op::SetService(_), Errno::ENOENT) => {
            " (no such scheduler: load its module, ip_vs_ and its name)"
        }
        (_, Errno::ESRCH) => " (no such service)",
        (Op::AddService(_), Errno::EPROTONOSUPPORT | Errno::EAFNOSUPPORT) => " (the module lacks this protocol)",
        _ => "",
    }
}

impl Ipvs for Socket {
    fn apply(&mut self, op: &Op) -> Result<(), Error> {
        match op {
            Op::Bind(address) => return Ok(self.links.ensure(&Self::address(*address))?),
            Op::Unbind(address) => return Ok(self.links.remove(&Self::address(*address))?),
            _ => {}
        }
        let Some(message) = message::encode(self.family, op) else { return Ok(()) };
        match self.netlink.exchange(message, |_| ()) {
            Ok(_) => Ok(()),
            Err(errno) => Err(Error::Refused { op: op.to_string(), errno, hint: hint(op, errno) }),
        }
    }

    fn services(&mut self) -> Result<Vec<Service>, Error> {
        self.list("list services", message::list_services(self.family), message::decode_service)
    }

    fn destinations(&mut self, of: &Key) -> Result<Vec<(Destination, Connections)>, Error> {
        let request = message::list_destinations(self.family, of);
        self.list("list destinations", request, |payload| message::decode_destination(payload, of))
    }

    fn addresses(&mut self) -> Result<Option<BTreeSet<IpAddr>>, Error> {
        if self.links.link(DEVICE)?.is_none() {
            return Ok(None);
        }
        let all = self.links.addresses()?.into_iter();
        Ok(Some(all.filter(|address| address.link == DEVICE).map(|address| address.address.addr()).collect()))
    }

    fn prepare(&mut self, sysctls: &[(&str, &str)]) -> Result<(), Error> {
        match self.links.ensure(&Item::Dummy(DEVICE.into())) {
            Ok(()) => Ok(self.namespace.sysctls(sysctls)?),
            Err(error) if is_unknown_kind(&error) => Err(Error::Missing(DUMMIES.into())),
            Err(error) => Err(error.into()),
        }
    }

    fn remove_device(&mut self) -> Result<(), Error> {
        Ok(self.links.remove_link(DEVICE)?)
    }
}
