//! Opens a mode: what it needs of the kernel, what it finds there, and the loop that then follows the table.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, RwLock};

use linux::bpf::{Hooks, Kernel as _, Pinned};
use linux::conntrack::{self, Conntrack};
use linux::iptables::Tools;
use linux::ipvs::{self, Ipvs as _};
use linux::netns::Netns;
use linux::nft::Socket;
use services::{Changes, Seed, ServiceTable};
use tokio::runtime::Handle;
use tokio::sync::{broadcast, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::commit::Kernel;
use crate::dataplane::ebpf::{Ebpf, LAYOUT, OBJECT};
use crate::dataplane::iptables::Iptables;
use crate::dataplane::ipvs::Ipvs;
use crate::dataplane::nftables::Nftables;
use crate::dataplane::userspace::{self, Place, Sockets, Userspace};
use crate::dataplane::{Dataplane as _, Kept};
use crate::follow::Loop;
use crate::leftovers::Leftovers;
use crate::watch::{self as eyes, Watching};
use crate::{Error, Metrics, Mode, NodeView, Status, keeper};

/// What a node's proxy needs.
pub struct Config {
    pub mode: Mode,
    /// The node as it is now; a change renders everything anew.
    pub node: watch::Receiver<Arc<NodeView>>,
    /// The network namespace to work in; `None`: the caller's.
    pub namespace: Option<OwnedFd>,
    /// Where commits are counted.
    pub metrics: Arc<Metrics>,
    /// Where the ebpf mode attaches and what it keeps; the other modes remove what it has left there.
    pub hooks: Option<Hooks>,
    pub watching: Watching,
}

impl Config {
    /// The same in another mode.
    pub(crate) fn in_mode(&self, mode: Mode) -> Result<Config, Error> {
        let namespace = self.namespace.as_ref().map(OwnedFd::try_clone).transpose().map_err(Error::Namespace)?;
        let (node, hooks, watching) = (self.node.clone(), self.hooks.clone(), self.watching.clone());
        Ok(Config { mode, node, namespace, hooks, metrics: self.metrics.clone(), watching })
    }
}

/// The service table and what happens to it. Subscribe before the table's first list is complete.
pub struct Feed {
    pub table: Arc<RwLock<ServiceTable>>,
    pub changes: broadcast::Receiver<Arc<Changes>>,
}

/// What an earlier run left in the kernel: give it to `ServiceTable::with_seed`, and a restart changes nothing.
pub fn found(mode: Mode, namespace: Option<BorrowedFd<'_>>, hooks: Option<&Hooks>) -> Result<Seed, Error> {
    match mode {
        Mode::Nftables => Nftables::new(Socket::open(namespace)?).read(),
        Mode::Iptables | Mode::Userspace => Ok(Seed::default()),
        Mode::Ebpf => Ebpf::new(pinned(namespace, hooks)?).read(),
        Mode::Ipvs => ipvs::Socket::open(namespace).map(|_| Seed::default()).map_err(Error::from),
    }
}

/// Whether this kernel can do what the mode needs. The ebpf mode loads and attaches its programs, which do nothing until
/// they are told of Services.
pub fn prepare(mode: Mode, namespace: Option<BorrowedFd<'_>>, hooks: Option<&Hooks>) -> Result<(), Error> {
    match mode {
        Mode::Nftables | Mode::Iptables | Mode::Userspace => Ok(()),
        Mode::Ipvs => Ok(ipvs::Socket::open(namespace)?.prepare(&[])?),
        Mode::Ebpf => Ok(pinned(namespace, hooks)?.attach()?),
    }
}

pub(crate) fn pinned(namespace: Option<BorrowedFd<'_>>, hooks: Option<&Hooks>) -> Result<Pinned, Error> {
    Ok(Pinned::open(OBJECT, LAYOUT, hooks.ok_or(Error::NoHooks)?.clone(), namespace)?)
}

/// Keeps the kernel true to the table until the token is cancelled; then returns and leaves the rules in place, so that
/// Services go on answering. An error is returned only if the mode cannot start at all.
pub async fn run(
    config: Config,
    feed: Feed,
    status: watch::Sender<Status>,
    token: CancellationToken,
) -> Result<(), Error> {
    let localhost = localhost(&config, &feed, &token)?;
    let result = match open(config).await {
        Ok(opened) => hold(opened, feed, status, token).await.map(drop),
        Err(error) => Err(error),
    };
    if let Some(task) = localhost {
        // It ends with the token; without the mode it is of no use.
        task.abort();
        drop(task.await);
    }
    result
}

/// Relays for node ports on 127.0.0.1 and ::1 beside another mode, if they are asked for: the userspace mode as it is
/// without privileges, over the same table.
pub(crate) fn localhost(
    config: &Config,
    feed: &Feed,
    token: &CancellationToken,
) -> Result<Option<JoinHandle<Result<Kept, Error>>>, Error> {
    if config.mode == Mode::Userspace || !config.node.borrow().relay_localhost {
        return Ok(None);
    }
    let held = config.namespace.as_ref().map(OwnedFd::try_clone).transpose().map_err(Error::Namespace)?;
    let relays = Sockets::new(place(held)?, Handle::current(), eyes::relayed::Witness::blind(), Arc::default());
    let config = Config {
        mode: Mode::Userspace,
        node: config.node.clone(),
        namespace: None,
        hooks: None,
        // Of the mode beside it commits are told.
        metrics: Arc::default(),
        watching: Watching { ejection: false, end_policy: false, ..Watching::default() },
    };
    let feed = Feed { table: feed.table.clone(), changes: feed.changes.resubscribe() };
    let dataplane = Userspace::<Socket, Sockets>::new(None, relays);
    let status = Arc::new(watch::channel(Status::default()).0);
    let kernel = Kernel { dataplane, conntrack: None, leftovers: None };
    Ok(Some(tokio::spawn(Loop::new(kernel, config, feed, status).run(token.clone()))))
}

/// With its programs in place, which do nothing until they are told of Services.
async fn attached(mut kernel: Pinned) -> Result<Pinned, Error> {
    let attach = move || kernel.attach().map(|()| kernel);
    Ok(tokio::task::spawn_blocking(attach).await.map_err(Error::Commit)??)
}

fn place(namespace: Option<OwnedFd>) -> Result<Place, Error> {
    Ok(match namespace {
        Some(namespace) => Place::Within(Netns::from_fd(namespace)?),
        None => Place::Here,
    })
}

/// A mode with all that it needs of the kernel. As long as it does not follow the table it sends no packet anywhere.
pub(crate) struct Opened {
    config: Config,
    namespace: Option<OwnedFd>,
    conntrack: Option<Box<dyn Conntrack>>,
    tools: Open,
}

/// What a mode speaks to the kernel with.
enum Open {
    Nftables(Socket),
    Iptables(Tools),
    Ipvs(ipvs::Socket, Socket),
    Ebpf(Pinned),
    /// Without privileges it has none.
    Userspace(Option<Socket>),
}

/// Opens a mode, which may take a while: the programs of the ebpf mode are verified by the kernel.
pub(crate) async fn open(config: Config) -> Result<Opened, Error> {
    let held = || config.namespace.as_ref().map(OwnedFd::try_clone).transpose().map_err(Error::Namespace);
    let namespace = held()?;
    let place = || namespace.as_ref().map(|namespace| namespace.as_fd());
    let conntrack: Option<Box<dyn Conntrack>> = match conntrack::Socket::open(place()) {
        Ok(socket) => Some(Box::new(socket)),
        // That mode does without, and says what it does not do then.
        Err(error) if config.mode == Mode::Userspace && error.is_forbidden() => None,
        Err(error) => return Err(error.into()),
    };
    if config.mode.is_translated_by_netfilter() {
        match Socket::open(place()).and_then(|mut nft| keeper::keep(&mut nft)) {
            // Without privileges nothing is translated.
            Err(error) if config.mode == Mode::Userspace && error.is_forbidden() => {}
            kept => kept?,
        }
    }
    let tools = match config.mode {
        Mode::Nftables => Open::Nftables(Socket::open(place())?),
        Mode::Iptables => {
            let held = held()?;
            Open::Iptables(tokio::task::spawn_blocking(move || Tools::open(held)).await.map_err(Error::Commit)??)
        }
        Mode::Ipvs => {
            let mut kernel = ipvs::Socket::open(place())?;
            // What is missing is said before anything is promised.
            kernel.prepare(&[])?;
            ipvs::Socket::require(&config.node.borrow().ipvs.scheduler)?;
            Open::Ipvs(kernel, Socket::open(place())?)
        }
        Mode::Ebpf => Open::Ebpf(attached(pinned(place(), config.hooks.as_ref())?).await?),
        Mode::Userspace => Open::Userspace(userspace::open(place())?),
    };
    Ok(Opened { config, namespace, conntrack, tools })
}

/// One mode, and what must outlive it while connections that it took are on their way to it.
pub(crate) async fn hold(
    opened: Opened,
    feed: Feed,
    status: watch::Sender<Status>,
    token: CancellationToken,
) -> Result<Kept, Error> {
    let Opened { config, namespace, conntrack, tools } = opened;
    let held = || namespace.as_ref().map(OwnedFd::try_clone).transpose().map_err(Error::Namespace);
    let leftovers = Some(Leftovers::new(config.mode, config.hooks.clone(), held()?));
    let status = Arc::new(status);
    let watcher = eyes::start_if_wanted(&config, &feed, &status, &token)?;
    match tools {
        Open::Nftables(nft) => {
            let dataplane = Nftables::new(nft);
            Loop::new(Kernel { dataplane, conntrack, leftovers }, config, feed, status)
                .watched_by(watcher)
                .run(token)
                .await
        }
        Open::Iptables(tools) => {
            let dataplane = Iptables::new(tools);
            Loop::new(Kernel { dataplane, conntrack, leftovers }, config, feed, status)
                .watched_by(watcher)
                .run(token)
                .await
        }
        Open::Ipvs(kernel, nft) => {
            let dataplane = Ipvs::new(kernel, nft);
            Loop::new(Kernel { dataplane, conntrack, leftovers }, config, feed, status)
                .watched_by(watcher)
                .run(token)
                .await
        }
        Open::Ebpf(kernel) => {
            let dataplane = Ebpf::new(kernel);
            Loop::new(Kernel { dataplane, conntrack, leftovers }, config, feed, status)
                .watched_by(watcher)
                .run(token)
                .await
        }
        Open::Userspace(nft) => {
            let place = place(held()?)?;
            let (witness, watcher) = eyes::relayed::start(
                &config.watching,
                place.clone(),
                feed.table.clone(),
                status.clone(),
                token.clone(),
            );
            let relays = Sockets::new(place, Handle::current(), witness, config.metrics.tally());
            let leftovers = leftovers.filter(|_| nft.is_some());
            let kernel = Kernel { dataplane: Userspace::new(nft, relays), conntrack, leftovers };
            Loop::new(kernel, config, feed, status).watched_by(Some(watcher)).run(token).await
        }
    }
}
