//! Host ports and masquerade become kernel rules: table `inet fairlead-pods`.
//!
//! - `layout`: the rules, which are constant, and the sets and maps that they look things up in
//! - `plan`: what these should hold
//!
//! The table stays when the agent ends, as pods do. An agent that starts compares with what it finds, so a restart
//! changes nothing. A host port does not answer on loopback addresses, and translates only connections that are younger
//! than it: a UDP client that never pauses goes on to where it went before.

mod layout;
mod plan;

use std::time::Duration;

use linux::nft::{Element, Error, Nft, Op, Transaction};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use tokio_util::sync::CancellationToken;

use crate::{HostPort, Masquerade};

pub use layout::{FAMILY, Map, Place, TABLE};
pub use plan::{Elements, Plan, Refusal, plan};

/// How the rules are doing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Status {
    /// How often the kernel was found or made true to a plan since the start.
    pub applied: u64,
    /// Why the last attempt failed; `None` after one that did not.
    pub error: Option<String>,
}

/// What makes of the held elements the wanted ones. Nothing held means no table, or one with other rules.
pub fn difference(held: Option<&Elements>, wanted: &Elements) -> Transaction {
    let nothing = Elements::new();
    let mut transaction = if held.is_some() { Transaction::new(FAMILY, TABLE) } else { layout::lay() };
    let held = held.unwrap_or(&nothing);
    for place in Place::all() {
        let set: Box<str> = place.name().into();
        // Removed first: a port that leads elsewhere now has the same key, and a range may lie over an old one.
        let removed = minus(held, wanted, place);
        if !removed.is_empty() {
            transaction.push(Op::DeleteElements { set: set.clone(), elements: removed });
        }
        let added = minus(wanted, held, place);
        if !added.is_empty() {
            transaction.push(Op::AddElements { set, elements: added });
        }
    }
    transaction
}

fn minus(all: &Elements, known: &Elements, place: Place) -> Vec<Element> {
    let is_known = |element: &Element| known.get(&place).is_some_and(|known| known.contains(element));
    all.get(&place).into_iter().flatten().filter(|element| !is_known(element)).cloned().collect()
}

/// Makes the kernel true to the plan, whatever it holds now.
pub fn apply(nft: &mut impl Nft, plan: &Plan) -> Result<(), Error> {
    let held = read(nft)?;
    let transaction = difference(held.as_ref(), &plan.elements);
    if transaction.is_empty() { Ok(()) } else { nft.commit(&transaction) }
}

fn read(nft: &mut impl Nft) -> Result<Option<Elements>, Error> {
    // Sets of another layout would be misread.
    if !nft.chains(FAMILY, TABLE)?.contains(&layout::mark()) {
        return Ok(None);
    }
    let mut held = Elements::new();
    for place in Place::all() {
        held.insert(place, nft.elements(FAMILY, TABLE, &place.set())?.into_iter().collect());
    }
    Ok(Some(held))
}

/// Keeps the kernel true to host ports and masquerade until `stop`; then leaves the table as it is. What could not be
/// done is tried again, less and less often.
pub async fn run<N: Nft + 'static>(
    mut nft: N,
    mut ports: watch::Receiver<Vec<HostPort>>,
    mut masquerade: watch::Receiver<Masquerade>,
    status: watch::Sender<Status>,
    stop: CancellationToken,
) {
    const FIRST: Duration = Duration::from_millis(500);
    const LAST: Duration = Duration::from_secs(30);
    let mut delay = FIRST;
    let (mut ports_open, mut masquerade_open) = (true, true);
    let mut told = Plan::default();
    loop {
        let wanted = plan(&ports.borrow_and_update(), &masquerade.borrow_and_update());
        for refusal in wanted.refused.difference(&told.refused) {
            tracing::warn!("{refusal}");
        }
        told = wanted.clone();
        // The kernel has one lock over all rules: not on a thread that other tasks share.
        let attempt = tokio::task::spawn_blocking(move || {
            let outcome = apply(&mut nft, &wanted);
            (nft, outcome)
        });
        let outcome = match attempt.await {
            Ok((back, outcome)) => {
                nft = back;
                outcome
            }
            Err(failed) => std::panic::resume_unwind(failed.into_panic()),
        };
        let retry_at = match outcome {
            Ok(()) => {
                delay = FIRST;
                status.send_modify(|status| *status = Status { applied: status.applied + 1, error: None });
                None
            }
            Err(error) => {
                tracing::warn!(%error, retry_in = ?delay, "host ports and masquerade are not what they should be");
                status.send_modify(|status| status.error = Some(error.to_string()));
                let at = Instant::now() + delay;
                delay = (delay * 2).min(LAST);
                Some(at)
            }
        };
        tokio::select! {
            () = stop.cancelled() => return,
            changed = ports.changed(), if ports_open => ports_open = changed.is_ok(),
            changed = masquerade.changed(), if masquerade_open => masquerade_open = changed.is_ok(),
            () = sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry_at.is_some() => {}
        }
    }
}

#[cfg(test)]
mod tests;
