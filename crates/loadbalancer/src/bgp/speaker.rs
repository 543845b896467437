//! Keeps the sessions with all peers, on a thread of its own: what else the process does delays no packet.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;

use linux::hops;
use tokio::io::Interest;
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::bfd::Timing;
use super::link::{self, Inbox};
use super::session::Settings;
use super::sockets;
use super::update::Routes;
use crate::Metrics;

/// A peer and how to speak with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Neighbour {
    pub address: IpAddr,
    pub port: u16,
    pub source: Option<IpAddr>,
    /// Packets to it go no further than this; `None`: as the system has it.
    pub hops: Option<u8>,
    /// The key of TCP MD5.
    pub password: Option<String>,
    pub settings: Settings,
    pub bfd: Option<Timing>,
}

/// Peers by name, and what each is told.
pub type Orders = BTreeMap<String, (Neighbour, Routes)>;

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    Up(String),
    /// The peer, and why.
    Down(String, String),
    /// The peer, and what of its session cannot be.
    Failed(String, String),
}

enum Command {
    Orders(Orders),
    End,
}

/// What came from the network for some peer.
enum Incoming {
    Connection(TcpStream, IpAddr),
    Bfd(Vec<u8>, IpAddr, u8, bool),
}

pub(super) type Tell = Arc<dyn Fn(Notice) + Send + Sync>;

/// The running speaker. It ends its sessions when it is dropped, and waits for that.
pub struct Speaker {
    commands: mpsc::UnboundedSender<Command>,
    thread: Option<JoinHandle<()>>,
}

impl Speaker {
    /// Its sockets are of the calling thread's network namespace.
    ///
    /// # Errors
    /// The thread or its runtime cannot be made.
    pub fn start(metrics: Arc<Metrics>, notice: impl Fn(Notice) + Send + Sync + 'static) -> io::Result<Speaker> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (commands, received) = mpsc::unbounded_channel();
        let tell: Tell = Arc::new(notice);
        let thread = std::thread::Builder::new()
            .name("bgp".into())
            .spawn(move || runtime.block_on(Worker::new(metrics, tell).run(received)))?;
        Ok(Speaker { commands, thread: Some(thread) })
    }

    pub fn set_orders(&self, orders: Orders) {
        // A thread that has ended takes no orders.
        self.commands.send(Command::Orders(orders)).unwrap_or_default();
    }
}

impl Drop for Speaker {
    fn drop(&mut self) {
        self.commands.send(Command::End).unwrap_or_default();
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            warn!("the thread of BGP died");
        }
    }
}

/// A session that is kept.
struct Kept {
    neighbour: Neighbour,
    routes: watch::Sender<Routes>,
    inbox: mpsc::Sender<Inbox>,
    token: CancellationToken,
}

struct Worker {
    kept: BTreeMap<String, Kept>,
    sessions: JoinSet<()>,
    /// Those that hear for all peers; each ends with the set.
    ears: JoinSet<()>,
    incoming: mpsc::Sender<Incoming>,
    heard: Option<mpsc::Receiver<Incoming>>,
    /// Which ears for BFD there are: of a family, over several hops or one.
    hears: BTreeSet<(bool, bool)>,
    /// The passive peers of each family for which a listener is there.
    listeners: BTreeMap<bool, (Vec<Neighbour>, CancellationToken)>,
    metrics: Arc<Metrics>,
    tell: Tell,
}

impl Worker {
    fn new(metrics: Arc<Metrics>, tell: Tell) -> Worker {
        let (incoming, heard) = mpsc::channel(256);
        Worker {
            kept: BTreeMap::new(),
            sessions: JoinSet::new(),
            ears: JoinSet::new(),
            incoming,
            heard: Some(heard),
            hears: BTreeSet::new(),
            listeners: BTreeMap::new(),
            metrics,
            tell,
        }
    }

    async fn run(mut self, mut commands: mpsc::UnboundedReceiver<Command>) {
        let Some(mut heard) = self.heard.take() else { return };
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    Some(Command::Orders(orders)) => self.take(orders),
                    Some(Command::End) | None => break,
                },
                Some(incoming) = heard.recv() => self.hand_on(incoming),
                // Reaps the sessions of peers that are gone.
                Some(_) = self.sessions.join_next() => {}
            }
        }
        self.kept.values().for_each(|kept| kept.token.cancel());
        while self.sessions.join_next().await.is_some() {}
        self.ears.shutdown().await;
    }

    fn take(&mut self, orders: Orders) {
        self.kept.retain(|name, kept| {
            let stays = orders.get(name).is_some_and(|(neighbour, _)| *neighbour == kept.neighbour);
            if !stays {
                kept.token.cancel();
            }
            stays
        });
        for (name, (neighbour, routes)) in orders {
            if let Some(kept) = self.kept.get(&name) {
                kept.routes.send_if_modified(|held| {
                    let is_new = *held != routes;
                    *held = routes;
                    is_new
                });
                continue;
            }
            if let Some(timing) = &neighbour.bfd
                && let Err(error) = self.hear_bfd(neighbour.address.is_ipv4(), timing.is_multihop)
            {
                (self.tell)(Notice::Failed(name.clone(), format!("BFD cannot be heard: {error}")));
            }
            let (routes, routes_seen) = watch::channel(routes);
            let (inbox, received) = mpsc::channel(64);
            let token = CancellationToken::new();
            let (tell, metrics) = (self.tell.clone(), self.metrics.clone());
            let link = link::Link::new(name.clone(), neighbour.clone(), metrics, tell);
            self.sessions.spawn(link.keep(routes_seen, received, token.clone()));
            self.kept.insert(name, Kept { neighbour, routes, inbox, token });
        }
        self.listen();
    }

    fn hear_bfd(&mut self, is_v4: bool, is_multihop: bool) -> io::Result<()> {
        if !self.hears.contains(&(is_v4, is_multihop)) {
            let socket = sockets::hear_bfd(is_v4, is_multihop)?;
            self.hears.insert((is_v4, is_multihop));
            self.ears.spawn(hear(socket, is_multihop, self.incoming.clone()));
        }
        Ok(())
    }

    /// A listener for the passive peers of each family, with their keys: another one when these change.
    fn listen(&mut self) {
        for is_v4 in [true, false] {
            let all = self.kept.values().map(|kept| &kept.neighbour);
            let peers: Vec<Neighbour> =
                all.filter(|one| one.settings.is_passive && one.address.is_ipv4() == is_v4).cloned().collect();
            let held = self.listeners.get(&is_v4).map(|(held, _)| held.as_slice()).unwrap_or_default();
            if held == peers.as_slice() {
                continue;
            }
            if let Some((_, token)) = self.listeners.remove(&is_v4) {
                token.cancel();
            }
            if peers.is_empty() {
                continue;
            }
            let token = CancellationToken::new();
            match sockets::listen(is_v4, &peers) {
                Ok(listener) => {
                    self.ears.spawn(accept(listener, self.incoming.clone(), token.clone()));
                    self.listeners.insert(is_v4, (peers, token));
                }
                Err(error) => {
                    for (name, _) in self.kept.iter().filter(|(_, kept)| peers.contains(&kept.neighbour)) {
                        let text = format!("it cannot connect to port {}: {error}", sockets::PORT);
                        (self.tell)(Notice::Failed(name.clone(), text));
                    }
                }
            }
        }
    }

    /// To the session of who sent it. One that is behind loses packets, as networks do.
    fn hand_on(&self, incoming: Incoming) {
        let (from, item) = match incoming {
            Incoming::Connection(stream, from) => (from, Inbox::Connection(stream)),
            Incoming::Bfd(bytes, from, hops, is_multihop) => {
                let hears = |kept: &Kept| {
                    kept.neighbour.address == from
                        && kept.neighbour.bfd.is_some_and(|timing| timing.is_multihop == is_multihop)
                };
                if let Some(kept) = self.kept.values().find(|kept| hears(kept)) {
                    kept.inbox.try_send(Inbox::Bfd(bytes, hops)).unwrap_or_default();
                }
                return;
            }
        };
        let is_meant = |kept: &&Kept| kept.neighbour.address == from && kept.neighbour.settings.is_passive;
        match self.kept.values().find(is_meant) {
            Some(kept) => kept.inbox.try_send(item).unwrap_or_default(),
            None => debug!(%from, "nobody waits for this connection"),
        }
    }
}

async fn hear(socket: UdpSocket, is_multihop: bool, incoming: mpsc::Sender<Incoming>) {
    let mut buffer = [0; 128];
    loop {
        match socket.async_io(Interest::READABLE, || hops::receive(socket.as_fd(), &mut buffer)).await {
            Ok((length, from, hops)) => {
                if incoming.send(Incoming::Bfd(buffer[..length].to_vec(), from, hops, is_multihop)).await.is_err() {
                    return;
                }
            }
            Err(error) => debug!(%error, "a BFD packet is not heard"),
        }
    }
}

async fn accept(listener: TcpListener, incoming: mpsc::Sender<Incoming>, token: CancellationToken) {
    loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            () = token.cancelled() => return,
        };
        match accepted {
            Ok((stream, from)) => {
                if incoming.send(Incoming::Connection(stream, from.ip())).await.is_err() {
                    return;
                }
            }
            Err(error) => debug!(%error, "a connection is not accepted"),
        }
    }
}
