//! Holds addresses as virtual routers say, on a thread of its own: they are on the interface while this host is active.
//!
//! They are lent for a few seconds at a time: the kernel takes them from the interface of a process that is dead or stopped.

use std::collections::BTreeMap;
use std::io::{self, Read, Write};
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ipnet::IpNet;
use linux::link::{Address, Item, LinkWatch, Links};
use linux::packet::{PacketSocket, Protocol};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::{debug, info, warn};

use super::instance::{Instance, RouterConfig, VrrpError};
use super::machine::{Action, State};
use crate::packets::{BURST, gratuitous};

/// For how long an address is lent, in seconds, and how often the loan is renewed.
const LOAN: u32 = 3;
const RENEWAL: Duration = Duration::from_secs(1);

/// What became of a virtual router, by its name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    Took(String),
    GaveUp(String),
}

enum Command {
    /// `None`: it takes no part until there is a priority again.
    Priority(String, Option<u8>),
    End,
}

/// The running holder. It gives up, and says so, when this is dropped.
pub struct Holder {
    commands: Sender<Command>,
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Holder {
    /// Opens everything in the calling thread's network namespace, and starts.
    ///
    /// # Errors
    /// Says what this host lacks, or what cannot be meant.
    pub fn start(
        routers: impl IntoIterator<Item = RouterConfig>,
        notice: impl Fn(Notice) + Send + 'static,
    ) -> Result<Holder, VrrpError> {
        let (commands, received) = mpsc::channel();
        let (wake, woken) = UnixStream::pair().map_err(VrrpError::Thread)?;
        wake.set_nonblocking(true).and_then(|()| woken.set_nonblocking(true)).map_err(VrrpError::Thread)?;
        let mut held = BTreeMap::new();
        for config in routers {
            let held_by = Held::open(config)?;
            held.insert(held_by.instance.config.name.clone(), held_by);
        }
        let worker = Worker {
            origin: Instant::now(),
            links: Links::current()?,
            watch: LinkWatch::open()?,
            held,
            commands: received,
            woken,
            notice: Box::new(notice),
        };
        let thread =
            std::thread::Builder::new().name("vrrp".into()).spawn(|| worker.run()).map_err(VrrpError::Thread)?;
        Ok(Holder { commands, wake, thread: Some(thread) })
    }

    /// How much a virtual router is worth here; `None`: nothing, it gives up and waits.
    pub fn set_priority(&self, router: &str, priority: Option<u8>) {
        self.tell(Command::Priority(router.to_owned(), priority));
    }

    fn tell(&self, command: Command) {
        // A thread that has ended, or a full pipe, needs no wake-up.
        if self.commands.send(command).is_ok() {
            let _ = (&self.wake).write(&[0]);
        }
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        self.tell(Command::End);
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            warn!("the thread of VRRP died");
        }
    }
}

/// A virtual router and what it holds.
struct Held {
    instance: Instance,
    /// Where its addresses are told of.
    socket: PacketSocket,
    /// When they are told of again, and how often they were.
    burst: Option<(Duration, usize)>,
    /// When the loan is renewed.
    renewal: Option<Duration>,
}

impl Held {
    fn open(config: RouterConfig) -> Result<Held, VrrpError> {
        let name = config.name.clone();
        let instance = Instance::open(config)?;
        let is_v4 = instance.config.addresses.iter().all(IpAddr::is_ipv4);
        let protocol = if is_v4 { Protocol::Arp } else { Protocol::NeighbourSolicitation };
        let socket = PacketSocket::open(instance.index, protocol, 0).map_err(|error| VrrpError::Socket {
            name,
            doing: "prepare to tell of addresses",
            error,
        })?;
        Ok(Held { instance, socket, burst: None, renewal: None })
    }

    fn next(&self) -> Option<Duration> {
        [self.instance.machine.next(), self.burst.map(|(at, _)| at), self.renewal].into_iter().flatten().min()
    }

    fn addresses(&self) -> impl Iterator<Item = Address> + '_ {
        let config = &self.instance.config;
        config.addresses.iter().map(|ip| Address { link: config.interface.clone(), address: IpNet::from(*ip) })
    }

    fn lend(&self, links: &Links) {
        for address in self.addresses() {
            if let Err(error) = links.lend(&address, LOAN) {
                warn!(%error, "an address is not held");
            }
        }
    }

    fn tell_everybody(&self) {
        for address in &self.instance.config.addresses {
            let (packet, to) = gratuitous(*address, self.instance.mac);
            if let Err(error) = self.socket.send(&packet, to) {
                debug!(%address, %error, "not told");
            }
        }
    }
}

struct Worker {
    origin: Instant,
    links: Links,
    watch: LinkWatch,
    held: BTreeMap<String, Held>,
    commands: Receiver<Command>,
    woken: UnixStream,
    notice: Box<dyn Fn(Notice) + Send>,
}

impl Worker {
    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn run(mut self) {
        // Whatever a process before this one has left: it holds nothing yet.
        for held in self.held.values() {
            give_back(&self.links, held);
        }
        let names: Vec<String> = self.held.keys().cloned().collect();
        for name in &names {
            self.drive(name, |held, now| held.instance.want(!held.instance.config.waits, now));
        }
        loop {
            if let Err(error) = self.wait() {
                warn!(%error, "VRRP cannot wait for packets, and ends");
                break;
            }
            if !self.take_commands() {
                break;
            }
            if self.watch.has_changed() {
                self.look();
            }
            for name in &names {
                self.drive(name, |held, now| held.instance.hear(now));
                self.drive(name, |held, now| held.instance.machine.tick(now));
                self.keep(name);
            }
        }
        for name in &names {
            self.drive(name, |held, _| held.instance.machine.stop());
        }
    }

    fn wait(&self) -> io::Result<()> {
        let now = self.now();
        let next = self.held.values().filter_map(Held::next).min();
        let left = next.map_or(RENEWAL, |next| next.saturating_sub(now)).min(RENEWAL);
        let timeout = PollTimeout::from(left.as_micros().div_ceil(1000) as u16);
        let mut all = vec![PollFd::new(self.woken.as_fd(), PollFlags::POLLIN)];
        all.push(PollFd::new(self.watch.as_fd(), PollFlags::POLLIN));
        all.extend(self.held.values().map(|held| PollFd::new(held.instance.fd(), PollFlags::POLLIN)));
        match poll(&mut all, timeout) {
            Ok(_) | Err(nix::Error::EINTR) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// Whether it goes on.
    fn take_commands(&mut self) -> bool {
        let mut buffer = [0; 64];
        while matches!((&self.woken).read(&mut buffer), Ok(count) if count > 0) {}
        loop {
            match self.commands.try_recv() {
                Ok(Command::Priority(name, priority)) => self.drive(&name, |held, now| {
                    let new = priority.map(|priority| held.instance.machine.set_priority(priority, now));
                    let mut actions = new.unwrap_or_default();
                    actions.extend(held.instance.want(priority.is_some(), now));
                    actions
                }),
                Ok(Command::End) | Err(mpsc::TryRecvError::Disconnected) => return false,
                Err(mpsc::TryRecvError::Empty) => return true,
            }
        }
    }

    /// Looks which cables are in.
    fn look(&mut self) {
        let names: Vec<String> = self.held.keys().cloned().collect();
        let links = match Links::current() {
            Ok(links) => links,
            Err(error) => return warn!(%error, "interfaces cannot be looked at"),
        };
        for name in names {
            self.drive(&name, |held, now| held.instance.look(&links, now));
        }
    }

    /// Does what the machine of a router says.
    fn drive(&mut self, name: &str, step: impl FnOnce(&mut Held, Duration) -> Vec<Action>) {
        let now = self.now();
        let Some(held) = self.held.get_mut(name) else { return };
        for action in step(held, now) {
            match action {
                Action::Advertise(priority) => held.instance.advertise(priority),
                Action::Take => {
                    info!(name, addresses = ?held.instance.config.addresses, "held here");
                    held.lend(&self.links);
                    (held.burst, held.renewal) = (Some((now, 0)), Some(now + RENEWAL));
                    (self.notice)(Notice::Took(name.to_owned()));
                }
                Action::TellAgain => drop(held.burst.get_or_insert((now, 0))),
                Action::GiveUp => {
                    info!(name, addresses = ?held.instance.config.addresses, "no longer held here");
                    give_back(&self.links, held);
                    (held.burst, held.renewal) = (None, None);
                    (self.notice)(Notice::GaveUp(name.to_owned()));
                }
            }
        }
    }

    /// Renews loans and tells of addresses that are new here.
    fn keep(&mut self, name: &str) {
        let now = self.now();
        let Some(held) = self.held.get_mut(name) else { return };
        if held.instance.machine.state() != State::Active {
            return;
        }
        if held.renewal.is_some_and(|at| at <= now) {
            held.lend(&self.links);
            held.renewal = Some(now + RENEWAL);
        }
        if let Some((at, round)) = held.burst.filter(|(at, _)| *at <= now) {
            held.tell_everybody();
            held.burst = BURST.get(round + 1).map(|after| (at + (*after - BURST[round]), round + 1));
        }
    }
}

fn give_back(links: &Links, held: &Held) {
    for address in held.addresses() {
        if let Err(error) = links.remove(&Item::Address(address)) {
            warn!(%error, "an address stays until its loan ends");
        }
    }
}
