//! What talks to the kernel, and one attempt at a commit.

use std::time::Duration;

use linux::conntrack::Conntrack;

use crate::dataplane::{Answerers, Change, Dataplane};
use crate::leftovers::Leftovers;
use crate::{Error, stale};

/// Everything that talks to the kernel; it moves to a thread of its own for each commit.
pub struct Kernel<D> {
    pub dataplane: D,
    /// `None` where no rule of ours makes flows.
    pub conntrack: Option<Box<dyn Conntrack>>,
    /// Goes once this mode's first plan is in place: so that there is always one, and translated connections live on.
    pub leftovers: Option<Leftovers>,
}

impl<D: Dataplane> Kernel<D> {
    /// Does what only time brings; when to call again.
    pub fn tend(&mut self) -> Result<Option<Duration>, Error> {
        let left = self.leftovers.as_mut().and_then(Leftovers::tend);
        Ok(self.dataplane.tend()?.into_iter().chain(left).min())
    }
}

/// How the next commit is made.
#[derive(Clone, Copy, PartialEq)]
pub enum Attempt {
    /// Read the kernel, commit everything.
    Whole,
    /// What changed, in one transaction.
    Together,
    /// What changed, one transaction each, so that one bad frontend holds up nobody else.
    Apart,
}

impl Attempt {
    /// What to try when this has failed.
    pub fn next(self) -> Attempt {
        match self {
            Attempt::Together => Attempt::Apart,
            // Perhaps the kernel does not hold what we think: somebody may have flushed it.
            Attempt::Apart | Attempt::Whole => Attempt::Whole,
        }
    }
}

pub fn commit<D: Dataplane>(
    kernel: &mut Kernel<D>,
    whole: bool,
    apart: bool,
    base: Option<&D::Base>,
    changes: &[Change<D::Entries>],
    answerers: Answerers,
) -> Result<(), Error> {
    let dataplane = &mut kernel.dataplane;
    if whole {
        dataplane.read()?;
    }
    if apart {
        // The first error is told; the others have had their chance.
        let results: Vec<_> = changes.chunks(1).map(|change| dataplane.commit(None, change)).collect();
        results.into_iter().collect::<Result<(), Error>>()?;
    } else if base.is_some() || !changes.is_empty() {
        dataplane.commit(base, changes)?;
    }
    if let Some(leftovers) = &mut kernel.leftovers {
        leftovers.clear()?;
    }
    // Only now: before, the old rules would have made the same flows again.
    let deleted = match &mut kernel.conntrack {
        Some(conntrack) => stale::sweep(&mut **conntrack, &kernel.dataplane.answerers(answerers))?,
        None => 0,
    };
    if deleted > 0 {
        tracing::info!("proxy: forgot {deleted} UDP flows to endpoints that have gone");
    }
    Ok(())
}
