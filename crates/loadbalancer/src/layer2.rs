//! The layer 2 announcer: a thread of its own that exchanges heartbeats, and answers ARP and NDP for the addresses that are
//! this node's to announce. Whose an address is the nodes' vote says or, for those of a virtual router, VRRP.
//!
//! Its right to speak is an element with a timeout in an nftables set, which a chain on the way out of the interface asks for
//! each packet of ours. A thread that was stopped after it decided to speak and goes on later says nothing.

mod interface;
mod moved;
mod routers;
mod speak;

use std::collections::{BTreeMap, BTreeSet};
use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use linux::link::{LinkWatch, Links};
use linux::nft::{DataType, Datum, Element, ElementData, Family, Key, Nft, Op, Set, Socket, Transaction};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tracing::{debug, info, warn};

use crate::vrrp::instance::RouterConfig;
use crate::{Elector, Heartbeat, Metrics, Plan};
use interface::Interface;
use moved::Moved;
use routers::Router;

/// UDP, between the nodes' own addresses.
pub const PORT: u16 = 10263;
const TABLE: &str = "fairlead-layer2";
const RIGHT: &str = "right";
/// On all that the announcer sends, and on nothing else: `LB2`.
const MARK: u32 = 0x004c_4232;
/// A right that took the kernel longer than this to get is given back: the next heartbeat asks for another.
const LATE: Duration = Duration::from_millis(50);
/// Another host that says it has our address is contradicted so often at most.
const DEFENCE: Duration = Duration::from_secs(1);

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("listen for heartbeats on {0} port {PORT}: {1}; does another announcer run here?")]
    Listen(IpAddr, io::Error),
    #[error("no interface of this host has one of the node's addresses, {0:?}; see `ip address`")]
    NoInterface(Vec<IpAddr>),
    #[error("{0}: {1}; this needs CAP_NET_RAW and CAP_NET_ADMIN")]
    Packets(String, io::Error),
    #[error("{0}; announcing needs nftables' netdev egress hook (Linux 5.16, CONFIG_NETFILTER_EGRESS)")]
    Right(#[from] linux::nft::Error),
    #[error(transparent)]
    Link(#[from] linux::link::LinkError),
    #[error("start the announcer's thread: {0}")]
    Thread(io::Error),
}

/// Who announces here.
#[derive(Clone, Debug)]
pub struct Config {
    pub node: String,
    /// The node's own addresses, the primary one first: heartbeats go from and to that.
    pub addresses: Vec<IpAddr>,
    /// The same number in all of a cluster.
    pub cluster: u64,
    /// Another number at each start.
    pub incarnation: u64,
}

/// What the announcer is told.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Orders {
    pub plan: Plan,
    /// The addresses of each member, the primary one first.
    pub members: BTreeMap<String, Vec<IpAddr>>,
    /// Virtual routers of VRRP, which have addresses of their own; an empty interface is the node's own.
    pub routers: Vec<RouterConfig>,
    /// Addresses that are announced on these interfaces; others, on those that hold the node's own addresses.
    pub interfaces: BTreeMap<IpAddr, BTreeSet<String>>,
}

/// What it tells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// These are announced from here now.
    Took(BTreeSet<IpAddr>),
    Lost(BTreeSet<IpAddr>),
    /// Another host says that an address of ours is its own.
    Conflict(IpAddr, String),
    /// A virtual router of this name has no part here, and why.
    Refused(String, String),
}

enum Command {
    Orders(Orders),
    Tie(bool),
    End,
}

/// The running announcer. It ends, and withdraws first, when this is dropped.
pub struct Announcer {
    commands: Sender<Command>,
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Announcer {
    /// Opens everything it needs in the calling thread's network namespace, and starts.
    ///
    /// # Errors
    /// Says what this host lacks.
    pub fn start(
        config: Config,
        metrics: Arc<Metrics>,
        notice: impl Fn(Notice) + Send + 'static,
    ) -> Result<Announcer, Error> {
        let (commands, received) = mpsc::channel();
        let (wake, woken) = UnixStream::pair().map_err(Error::Thread)?;
        wake.set_nonblocking(true).and_then(|()| woken.set_nonblocking(true)).map_err(Error::Thread)?;
        let worker = Worker::open(config, metrics, received, woken, Box::new(notice))?;
        let thread = std::thread::Builder::new().name("layer2".into()).spawn(|| worker.run()).map_err(Error::Thread)?;
        Ok(Announcer { commands, wake, thread: Some(thread) })
    }

    pub fn set_orders(&self, orders: Orders) {
        self.tell(Command::Orders(orders));
    }

    /// Whether this node holds the Lease that decides between equal halves.
    pub fn set_tie(&self, tie: bool) {
        self.tell(Command::Tie(tie));
    }

    fn tell(&self, command: Command) {
        // A thread that has ended, or a full pipe, needs no wake-up.
        if self.commands.send(command).is_ok() {
            let _ = (&self.wake).write(&[0]);
        }
    }
}

impl Drop for Announcer {
    fn drop(&mut self) {
        self.tell(Command::End);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            warn!("the announcer's thread died");
        }
    }
}

struct Worker {
    origin: Instant,
    elector: Elector,
    peers: BTreeMap<String, SocketAddr>,
    members: BTreeMap<String, Vec<IpAddr>>,
    moved: Moved,
    udp: UdpSocket,
    interfaces: Vec<Interface>,
    /// Where addresses are announced that are not announced on all of the node's own interfaces.
    only: BTreeMap<IpAddr, BTreeSet<String>>,
    metrics: Arc<Metrics>,
    routers: Vec<Router>,
    watch: LinkWatch,
    nft: Socket,
    commands: Receiver<Command>,
    woken: UnixStream,
    notice: Box<dyn Fn(Notice) + Send>,
    held: BTreeSet<IpAddr>,
    /// Until when the kernel lets us speak.
    right: Duration,
    /// When which addresses are told of again, and how often that was done.
    bursts: Vec<(Duration, usize, BTreeSet<IpAddr>)>,
    defended: BTreeMap<IpAddr, Duration>,
}

impl Worker {
    fn open(
        config: Config,
        metrics: Arc<Metrics>,
        commands: Receiver<Command>,
        woken: UnixStream,
        notice: Box<dyn Fn(Notice) + Send>,
    ) -> Result<Worker, Error> {
        let origin = Instant::now();
        let Some(primary) = config.addresses.first() else { return Err(Error::NoInterface(Vec::new())) };
        let udp = UdpSocket::bind((*primary, PORT)).map_err(|error| Error::Listen(*primary, error))?;
        udp.set_nonblocking(true).map_err(|error| Error::Listen(*primary, error))?;
        let links = Links::current()?;
        let names: BTreeSet<String> = links
            .addresses()?
            .into_iter()
            .filter(|held| config.addresses.contains(&held.address.addr()))
            .map(|held| held.link)
            .collect();
        let mut interfaces = Vec::new();
        let mut nft = Socket::open(None)?;
        let mut transaction = Transaction::new(Family::Netdev, TABLE);
        transaction.replace_table("LoadBalancer addresses that this node may announce");
        transaction.push(Op::AddSet(Set::of(RIGHT, &[DataType::Mark]).dynamic(16)));
        for name in &names {
            interfaces.extend(Interface::open(&links, name, true, &mut transaction)?);
        }
        if interfaces.is_empty() {
            return Err(Error::NoInterface(config.addresses));
        }
        nft.commit(&transaction)?;
        Ok(Worker {
            origin,
            elector: Elector::new(&config.node, config.cluster, config.incarnation, Duration::ZERO),
            peers: BTreeMap::new(),
            members: BTreeMap::new(),
            moved: Moved::open(&mut nft),
            udp,
            interfaces,
            only: BTreeMap::new(),
            metrics,
            routers: Vec::new(),
            watch: LinkWatch::open()?,
            nft,
            commands,
            woken,
            notice,
            held: BTreeSet::new(),
            right: Duration::ZERO,
            bursts: Vec::new(),
            defended: BTreeMap::new(),
        })
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn run(mut self) {
        loop {
            let now = self.now();
            if let Err(error) = self.wait(now) {
                warn!(%error, "the announcer cannot wait for packets, and ends");
                break;
            }
            if !self.take_commands() {
                break;
            }
            self.hear();
            self.beat();
            self.route();
            self.decide();
            self.answer();
            self.burst();
        }
        // It stops speaking first, and says so: the others need not wait.
        let now = self.now();
        self.elector.leave(now);
        let routers = std::mem::take(&mut self.routers);
        self.decide();
        routers.into_iter().for_each(|router| self.end(router));
        self.beat();
        if let Err(error) = self.nft.remove_table(Family::Netdev, TABLE) {
            warn!(%error, "the announcer's table stays");
        }
        self.moved.close(&mut self.nft);
    }

    fn wait(&mut self, now: Duration) -> io::Result<()> {
        let bursts = self.bursts.iter().map(|(at, ..)| *at);
        let routers = self.routers.iter().filter_map(|router| router.instance.machine.next());
        let next = bursts.chain(routers).fold(self.elector.next(now), Duration::min);
        let milliseconds = next.saturating_sub(now).as_micros().div_ceil(1000).min(1000);
        let timeout = PollTimeout::from(milliseconds as u16);
        let mut all = vec![self.woken.as_fd(), self.udp.as_fd(), self.watch.as_fd()];
        for interface in &self.interfaces {
            all.extend([interface.arp.as_fd(), interface.solicitations.as_fd()]);
        }
        all.extend(self.routers.iter().map(|router| router.instance.fd()));
        let mut all: Vec<PollFd<'_>> = all.into_iter().map(|fd| PollFd::new(fd, PollFlags::POLLIN)).collect();
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
                Ok(Command::Orders(orders)) => {
                    let primary =
                        |(name, all): (&String, &Vec<IpAddr>)| Some((name.clone(), (*all.first()?, PORT).into()));
                    self.peers = orders.members.iter().filter_map(primary).collect();
                    self.members = orders.members;
                    if let Err(error) = self.open_interfaces(orders.interfaces) {
                        warn!(%error, "not all interfaces of the advertisements can be used");
                    }
                    self.set_routers(orders.routers);
                    let now = self.now();
                    self.elector.set_plan(orders.plan, now);
                }
                Ok(Command::Tie(tie)) => self.elector.set_tie(tie),
                Ok(Command::End) | Err(mpsc::TryRecvError::Disconnected) => return false,
                Err(mpsc::TryRecvError::Empty) => return true,
            }
        }
    }

    /// Where addresses are announced; those that are not here yet are looked for at each change.
    fn open_interfaces(&mut self, only: BTreeMap<IpAddr, BTreeSet<String>>) -> Result<(), Error> {
        self.only = only;
        let known: BTreeSet<&String> = self.interfaces.iter().map(|one| &one.name).collect();
        let wanted: BTreeSet<&String> = self.only.values().flatten().filter(|name| !known.contains(name)).collect();
        if wanted.is_empty() {
            return Ok(());
        }
        let links = Links::current()?;
        let mut opened = Vec::new();
        for name in wanted {
            let mut transaction = Transaction::new(Family::Netdev, TABLE);
            if let Some(interface) = Interface::open(&links, name, false, &mut transaction)? {
                self.nft.commit(&transaction)?;
                opened.push(interface);
            }
        }
        self.interfaces.extend(opened);
        Ok(())
    }

    /// Takes the others' heartbeats, from their own addresses only.
    fn hear(&mut self) {
        let mut buffer = [0; 2048];
        while let Ok((length, from)) = self.udp.recv_from(&mut buffer) {
            let Some(beat) = Heartbeat::decode(&buffer[..length]) else { continue };
            if self.peers.get(&beat.from) != Some(&from) {
                debug!(%from, name = beat.from, "a heartbeat from elsewhere");
                continue;
            }
            let now = self.now();
            if let Some(answer) = self.elector.receive(beat, now) {
                self.send(&answer, from);
            }
        }
    }

    fn beat(&mut self) {
        let now = self.now();
        let beats = self.elector.tick(now);
        let to: Vec<Option<SocketAddr>> = self.elector.others().map(|name| self.peers.get(name).copied()).collect();
        for (beat, to) in beats.iter().zip(to) {
            if let Some(to) = to {
                self.send(beat, to);
            }
        }
    }

    fn send(&self, beat: &Heartbeat, to: SocketAddr) {
        // A lost packet, and a node that is not there, are what heartbeats are about.
        if let Err(error) = self.udp.send_to(&beat.encode(), to) {
            debug!(%error, %to, "a heartbeat is not sent");
        }
    }

    /// Takes and gives up addresses, and renews the right.
    fn decide(&mut self) {
        let now = self.now();
        let mut speech = self.elector.speech(now);
        for router in self.routers.iter().filter(|router| router.is_active()) {
            speech.addresses.extend(&router.instance.config.addresses);
            speech.until = speech.until.min(router.until);
        }
        let taken: BTreeSet<IpAddr> = speech.addresses.difference(&self.held).copied().collect();
        let lost: BTreeSet<IpAddr> = self.held.difference(&speech.addresses).copied().collect();
        if !lost.is_empty() {
            info!(addresses = ?lost, "no longer announced from here");
            self.bursts.iter_mut().for_each(|(_, _, told)| told.retain(|address| !lost.contains(address)));
            self.metrics.write().layer2.retain(|address, _| !lost.contains(address));
            (self.notice)(Notice::Lost(lost.clone()));
        }
        if !taken.is_empty() || !lost.is_empty() {
            // Before the first word, so that no packet of an old connection comes too early.
            let from = self.predecessors(&taken, now);
            self.moved.change(&mut self.nft, &lost, from, now);
        }
        self.held = speech.addresses;
        if self.held.is_empty() {
            self.right = Duration::ZERO;
        } else if speech.until > self.right + Duration::from_millis(20) || speech.until < self.right {
            self.renew(speech.until);
        }
        if !taken.is_empty() {
            info!(addresses = ?taken, "announced from here");
            self.bursts.push((now, 0, taken.clone()));
            (self.notice)(Notice::Took(taken));
        }
    }

    /// Where connections go on that were made while another node had the address: that node's address of its family.
    fn predecessors(&self, taken: &BTreeSet<IpAddr>, now: Duration) -> BTreeMap<IpAddr, IpAddr> {
        let at = |(address, name): (IpAddr, String)| {
            let own = self.members.get(&name)?.iter().find(|own| own.is_ipv4() == address.is_ipv4())?;
            Some((address, *own))
        };
        self.elector.predecessors(taken, now).into_iter().filter_map(at).collect()
    }

    fn renew(&mut self, until: Duration) {
        let begun = self.now();
        let mut transaction = Transaction::new(Family::Netdev, TABLE);
        transaction.push(Op::FlushSet(RIGHT.into()));
        let milliseconds = until.saturating_sub(begun).as_millis() as u64;
        if milliseconds > 0 {
            let elements = vec![Element { key: Key::new([Datum::Mark(MARK)]), end: None, data: ElementData::None }];
            transaction.push(Op::AddFor { set: RIGHT.into(), elements, milliseconds });
        }
        match self.nft.commit(&transaction) {
            // The kernel counts from when it got it: of what came late it would let us speak too long.
            Ok(()) if self.now() > begun + LATE => {
                self.right = Duration::ZERO;
                if milliseconds > 0 {
                    self.renew(until.min(begun));
                }
            }
            Ok(()) => self.right = until,
            // Without it the kernel drops what we say: silence is safe, and the next heartbeat tries again.
            Err(error) => warn!(%error, "the right to announce is not renewed"),
        }
    }
}
