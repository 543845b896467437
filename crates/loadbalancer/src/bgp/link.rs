//! Gives one session time, a connection and BFD.

use std::io;
use std::net::UdpSocket;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};

use super::bfd::{Bfd, Out};
use super::session::{Action, Event, Session};
use super::sockets;
use super::speaker::{Neighbour, Notice, Tell};
use super::update::Routes;
use crate::Metrics;

/// How long the last words may take.
const LAST_WORDS: Duration = Duration::from_millis(200);

/// What came for this session through sockets that several share.
pub enum Inbox {
    Connection(TcpStream),
    /// A packet, and the hops that it had left.
    Bfd(Vec<u8>, u8),
}

type Connecting = Pin<Box<dyn Future<Output = io::Result<TcpStream>> + Send>>;

pub struct Link {
    name: String,
    neighbour: Neighbour,
    metrics: Arc<Metrics>,
    tell: Tell,
    origin: Instant,
    session: Session,
    bfd: Option<(Bfd, UdpSocket)>,
    stream: Option<TcpStream>,
    connecting: Option<Connecting>,
    /// What is to be written.
    out: Vec<u8>,
    /// What the peer was last said to have failed of: not said twice.
    failure: Option<String>,
}

async fn connected(connecting: &mut Option<Connecting>) -> io::Result<TcpStream> {
    match connecting {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

async fn readable(stream: Option<&TcpStream>) -> io::Result<()> {
    match stream {
        Some(stream) => stream.readable().await,
        None => std::future::pending().await,
    }
}

async fn writable(stream: Option<&TcpStream>) -> io::Result<()> {
    match stream {
        Some(stream) => stream.writable().await,
        None => std::future::pending().await,
    }
}

impl Link {
    pub fn new(name: String, neighbour: Neighbour, metrics: Arc<Metrics>, tell: Tell) -> Link {
        let session = Session::new(neighbour.settings.clone(), Duration::ZERO);
        let origin = Instant::now();
        let mut link = Link {
            name,
            neighbour,
            metrics,
            tell,
            origin,
            session,
            bfd: None,
            stream: None,
            connecting: None,
            out: Vec::new(),
            failure: None,
        };
        if let Some(timing) = link.neighbour.bfd {
            let mine = mine();
            match sockets::say_bfd(&link.neighbour, timing.is_multihop, mine) {
                Ok(socket) => link.bfd = Some((Bfd::new(timing, mine, Duration::ZERO), socket)),
                Err(error) => link.fail(format!("BFD cannot be spoken: {error}")),
            }
        }
        link
    }

    fn now(&self) -> Duration {
        self.origin.elapsed()
    }

    fn fail(&mut self, text: String) {
        if self.failure.as_ref() != Some(&text) {
            (self.tell)(Notice::Failed(self.name.clone(), text.clone()));
            self.failure = Some(text);
        }
    }

    /// Keeps the session until the token is cancelled.
    pub async fn keep(
        mut self,
        mut routes: watch::Receiver<Routes>,
        mut inbox: mpsc::Receiver<Inbox>,
        token: CancellationToken,
    ) {
        let first = routes.borrow_and_update().clone();
        let mut actions = self.session.set_routes(first);
        loop {
            self.act(std::mem::take(&mut actions)).await;
            self.count();
            let due = [self.session.next(), self.bfd.as_ref().and_then(|(bfd, _)| bfd.next())];
            let due = due.into_iter().flatten().min().map(|at| self.origin + at);
            let timer = async {
                match due {
                    Some(at) => tokio::time::sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = token.cancelled() => break,
                changed = routes.changed() => {
                    if changed.is_err() {
                        break;
                    }
                    let now = routes.borrow_and_update().clone();
                    actions = self.session.set_routes(now);
                }
                item = inbox.recv() => match item {
                    Some(Inbox::Connection(stream)) => actions = self.take(stream),
                    Some(Inbox::Bfd(bytes, hops)) => actions = self.hear(&bytes, hops),
                    None => break,
                },
                result = connected(&mut self.connecting) => {
                    self.connecting = None;
                    match result {
                        Ok(stream) => actions = self.take(stream),
                        Err(error) => {
                            self.fail(format!("no connection: {error}"));
                            actions = self.session.handle(Event::Closed, self.now());
                        }
                    }
                }
                ready = readable(self.stream.as_ref()) => actions = self.read(ready),
                ready = writable(self.stream.as_ref()), if !self.out.is_empty() => actions = self.write(ready),
                () = timer => {
                    let now = self.now();
                    actions = self.session.tick(now);
                    let outs = self.bfd.as_mut().map(|(bfd, _)| bfd.tick(now)).unwrap_or_default();
                    actions.extend(self.say(outs));
                }
            }
        }
        let last = self.session.stop();
        self.act(last).await;
        if let Some(word) = self.bfd.as_mut().map(|(bfd, _)| bfd.stop()) {
            self.say(vec![word]);
        }
        let mut counts = self.metrics.write();
        counts.bgp.remove(&self.label());
        counts.bfd.remove(&self.neighbour.address.to_string());
    }

    fn label(&self) -> String {
        std::net::SocketAddr::new(self.neighbour.address, self.neighbour.port).to_string()
    }

    fn count(&self) {
        let (updates, prefixes) = self.session.counts();
        let mut counts = self.metrics.write();
        let of_peer = counts.bgp.entry(self.label()).or_default();
        (of_peer.is_up, of_peer.updates, of_peer.prefixes) = (self.session.is_established(), updates, prefixes);
        if let Some((bfd, _)) = &self.bfd {
            counts.bfd.insert(self.neighbour.address.to_string(), bfd.is_up());
        }
    }

    async fn act(&mut self, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Connect => self.connecting = Some(Box::pin(sockets::connect(self.neighbour.clone()))),
                Action::Send(bytes) => self.out.extend(bytes),
                Action::Close => {
                    self.connecting = None;
                    if let Some(mut stream) = self.stream.take() {
                        // The peer may be gone; then nobody misses them.
                        tokio::time::timeout(LAST_WORDS, stream.write_all(&self.out)).await.ok();
                    }
                    self.out.clear();
                }
                Action::Up => {
                    info!(peer = self.name, "the BGP session is up");
                    self.failure = None;
                    (self.tell)(Notice::Up(self.name.clone()));
                }
                Action::Down(reason) => {
                    info!(peer = self.name, reason, "the BGP session is down");
                    (self.tell)(Notice::Down(self.name.clone(), reason));
                }
            }
        }
    }

    fn take(&mut self, stream: TcpStream) -> Vec<Action> {
        let Ok(local) = stream.local_addr() else { return self.session.handle(Event::Closed, self.now()) };
        let mut actions = Vec::new();
        if self.stream.is_some() {
            if self.session.is_established() {
                return actions;
            }
            // A passive peer that begins anew means this connection.
            actions = self.session.handle(Event::Closed, self.now());
            actions.retain(|action| *action != Action::Close);
            self.out.clear();
        }
        stream.set_nodelay(true).unwrap_or_default();
        self.stream = Some(stream);
        actions.extend(self.session.handle(Event::Connected(local.ip()), self.now()));
        actions
    }

    fn read(&mut self, ready: io::Result<()>) -> Vec<Action> {
        let Some(stream) = &self.stream else { return Vec::new() };
        let mut buffer = [0; 16 * 1024];
        let event = match ready.and_then(|()| stream.try_read(&mut buffer)) {
            Ok(0) => Event::Closed,
            Ok(length) => Event::Received(&buffer[..length]),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Vec::new(),
            Err(error) => {
                debug!(peer = self.name, %error, "the connection broke");
                Event::Closed
            }
        };
        self.session.handle(event, self.now())
    }

    fn write(&mut self, ready: io::Result<()>) -> Vec<Action> {
        let Some(stream) = &self.stream else { return Vec::new() };
        match ready.and_then(|()| stream.try_write(&self.out)) {
            Ok(length) => {
                self.out.drain(..length);
                Vec::new()
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Vec::new(),
            Err(_) => self.session.handle(Event::Closed, self.now()),
        }
    }

    fn hear(&mut self, bytes: &[u8], hops: u8) -> Vec<Action> {
        let now = self.now();
        let outs = self.bfd.as_mut().map(|(bfd, _)| bfd.receive(bytes, hops, now)).unwrap_or_default();
        self.say(outs)
    }

    fn say(&mut self, outs: Vec<Out>) -> Vec<Action> {
        let mut actions = Vec::new();
        let Some((_, socket)) = &self.bfd else { return actions };
        for out in outs {
            match out {
                Out::Send(packet) => {
                    // A peer that is not there yet refuses it.
                    if let Err(error) = socket.send(&packet) {
                        debug!(peer = self.name, %error, "a BFD packet is not sent");
                    }
                }
                Out::Up => info!(peer = self.name, "BFD is up"),
                Out::Down => {
                    info!(peer = self.name, "BFD is down");
                    actions.extend(self.session.handle(Event::Unreachable, self.origin.elapsed()));
                }
            }
        }
        actions
    }
}

/// A number that no other session of this node has, and probably none before it had.
fn mine() -> u32 {
    let mut bytes = [0; 4];
    // Without random bytes, the place of a value of this process is as good.
    if getrandom::fill(&mut bytes).is_err() {
        bytes = (std::ptr::from_ref(&bytes) as usize as u32).to_ne_bytes();
    }
    u32::from_ne_bytes(bytes).max(1)
}
