//! Holding Ctrl-C off while something must not be left half done.

use anyhow::{Context, Result};
use nix::sys::signal::{SigSet, Signal};

/// While this lives, SIGINT, SIGTERM and SIGHUP wait: for us, and for every program we start meanwhile
/// (a child inherits the mask).
pub struct Held(SigSet);

impl Held {
    pub fn new() -> Result<Held> {
        let set: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
        set.thread_block().context("cannot hold signals off")?;
        Ok(Held(set))
    }

    /// Takes what a parent held off back to normal, in a process that should end on Ctrl-C.
    pub fn release_inherited() -> Result<()> {
        let set: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
        set.thread_unblock().context("cannot let signals through")
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Fails only for a wrong argument, and this set was accepted when it was blocked.
        let _ = self.0.thread_unblock();
    }
}
