//! Changes the mode of a node while clients talk.
//!
//! The new mode is opened while the old one goes on, since pods that end wait for a node that does not follow the table. Then
//! the old one stops to follow it and its rules stay; the new one commits its whole plan beside them, and removes them. What
//! it cannot do shows when it is opened or in its first commit; then the old mode goes on as if nothing had been asked.
//!
//! Connections outlive their mode: netfilter goes on to translate those it knows (see `keeper`), a relay's are carried to
//! their end, and relays listen for a while longer, since a first packet that was sent to one may still be on its way.

use std::os::fd::AsFd;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio_util::sync::CancellationToken;

use crate::dataplane::Kept;
use crate::run::{Opened, hold, localhost, open};
use crate::{Config, Error, Feed, Mode, Status, leftovers};

/// How long the last packet to a mode that is gone may take: a client repeats its first packet after one second, and
/// again after two.
const UNDERWAY: Duration = Duration::from_secs(4);

struct Request {
    mode: Mode,
    done: oneshot::Sender<Result<(), Error>>,
}

/// Asks a running proxy for another mode.
#[derive(Clone)]
pub struct Switch(mpsc::Sender<Request>);

/// Where the proxy hears of it.
pub struct Requests(mpsc::Receiver<Request>);

pub fn switch() -> (Switch, Requests) {
    let (sender, receiver) = mpsc::channel(1);
    (Switch(sender), Requests(receiver))
}

impl Switch {
    /// Returns when the kernel holds the whole plan of the new mode and nothing of the old one, or when the old one goes on.
    pub async fn to(&self, mode: Mode) -> Result<(), Error> {
        let (done, answer) = oneshot::channel();
        self.0.send(Request { mode, done }).await.map_err(|_| Error::Ended)?;
        answer.await.map_err(|_| Error::Ended)?
    }
}

/// As [`crate::run`], in the mode of the configuration and then in those that are asked for.
pub async fn run_switchable(
    config: Config,
    feed: Feed,
    status: watch::Sender<Status>,
    mut requests: Requests,
    token: CancellationToken,
) -> Result<(), Error> {
    let mode = config.mode;
    let mut node = Node { config, feed, status, token, localhost: None, retired: JoinSet::new() };
    let result = node.follow(mode, &mut requests).await;
    node.end_localhost();
    result
}

/// One mode at work.
struct Session {
    mode: Mode,
    token: CancellationToken,
    task: JoinHandle<Result<Kept, Error>>,
}

impl Session {
    /// Ends it after the commit that it makes now, if any.
    async fn stop(self) -> Result<Kept, Error> {
        self.token.cancel();
        self.task.await.map_err(Error::Commit)?
    }
}

struct Node {
    config: Config,
    feed: Feed,
    status: watch::Sender<Status>,
    token: CancellationToken,
    /// Relays on 127.0.0.1 and ::1 beside a mode that has none itself.
    localhost: Option<JoinHandle<Result<Kept, Error>>>,
    /// What modes that are gone still hold on to.
    retired: JoinSet<()>,
}

impl Node {
    async fn follow(&mut self, mode: Mode, requests: &mut Requests) -> Result<(), Error> {
        self.relay_beside(mode)?;
        let opened = open(self.config.in_mode(mode)?).await?;
        let mut session = self.begin(mode, opened);
        loop {
            tokio::select! {
                ended = &mut session.task => return ended.map_err(Error::Commit)?.map(drop),
                Some(Request { mode, done }) = requests.0.recv() => {
                    let outcome = if mode == session.mode {
                        Ok(())
                    } else {
                        let (next, outcome) = self.hand_over(session, mode).await?;
                        session = next;
                        self.config.metrics.handed_over(outcome.is_ok());
                        outcome
                    };
                    // Whoever asked may have gone; the mode is what it is.
                    drop(done.send(outcome));
                }
                Some(_) = self.retired.join_next() => {}
            }
        }
    }

    /// Starts the relays on loopback addresses for a mode that needs them, ends them for one that does not.
    fn relay_beside(&mut self, mode: Mode) -> Result<(), Error> {
        match (&self.localhost, mode) {
            (_, Mode::Userspace) => self.end_localhost(),
            (Some(_), _) => {}
            (None, _) => self.localhost = localhost(&self.config.in_mode(mode)?, &self.feed, &self.token)?,
        }
        Ok(())
    }

    fn end_localhost(&mut self) {
        if let Some(task) = self.localhost.take() {
            task.abort();
        }
    }

    fn begin(&self, mode: Mode, opened: Opened) -> Session {
        // What happened before is in the table, which is read as a whole first.
        let feed = Feed { table: self.feed.table.clone(), changes: self.feed.changes.resubscribe() };
        let (token, status) = (self.token.child_token(), self.status.clone());
        let work = hold(opened, feed, self.status.clone(), token.clone());
        let task = tokio::spawn(async move {
            let result = work.await;
            if let Err(error) = &result {
                status.send_modify(|status| status.error = Some(error.to_string()));
            }
            result
        });
        Session { mode, token, task }
    }

    /// The session that goes on, and whether it is the one that was asked for. An error is the end of both.
    async fn hand_over(&mut self, session: Session, to: Mode) -> Result<(Session, Result<(), Error>), Error> {
        let from = session.mode;
        let refused = |cause: String| {
            let error = Error::HandOver { from, to, cause };
            tracing::warn!("proxy: {error}");
            error
        };
        let opened = match open(self.config.in_mode(to)?).await {
            Ok(opened) => opened,
            Err(error) => {
                // What it has opened before it failed.
                let (hooks, held) = (self.config.hooks.clone(), self.config.in_mode(to)?.namespace);
                let clear = move || leftovers::clear_unused(to, hooks.as_ref(), held.as_ref().map(AsFd::as_fd));
                if let Err(error) = tokio::task::spawn_blocking(clear).await.map_err(Error::Commit)? {
                    tracing::warn!("proxy: {error}");
                }
                return Ok((session, Err(refused(error.to_string()))));
            }
        };
        let kept = session.stop().await?;
        self.status.send_modify(|status| status.error = None);
        if from == Mode::Userspace {
            self.relay_beside(to)?;
        }
        let next = self.begin(to, opened);
        let settled = self.settled(to).await;
        let outcome = match settled {
            Ok(()) => {
                tracing::info!("proxy: {to} mode has taken over from {from} mode");
                self.relay_beside(to)?;
                Ok((next, Ok(())))
            }
            Err(cause) => {
                let error = refused(cause);
                // What it says when it ends is the same again.
                if let Ok(kept) = next.stop().await {
                    self.retire(kept);
                }
                self.relay_beside(from)?;
                let back = open(self.config.in_mode(from)?).await?;
                Ok((self.begin(from, back), Err(error)))
            }
        };
        self.retire(kept);
        outcome
    }

    /// Waits for the first commit of a mode; why it failed, if it did.
    async fn settled(&self, mode: Mode) -> Result<(), String> {
        let mut status = self.status.subscribe();
        let settled = status.wait_for(|status| status.mode == Some(mode) || status.error.is_some());
        tokio::select! {
            settled = settled => match settled {
                Ok(status) => match &status.error {
                    Some(error) if status.mode != Some(mode) => Err(error.clone()),
                    _ => Ok(()),
                },
                Err(_) => Err(Error::Ended.to_string()),
            },
            // The session ends by itself, and all of this with it.
            () = self.token.cancelled() => Ok(()),
        }
    }

    fn retire(&mut self, kept: Kept) {
        if let Some(kept) = kept {
            self.retired.spawn(async move {
                tokio::time::sleep(UNDERWAY).await;
                drop(kept);
            });
        }
    }
}
