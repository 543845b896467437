//! Of all that run the proxy one writes events and status: who holds the Lease. Routes do not depend on it.

use std::time::Duration;

use anyhow::Context;
use api::ObjectExt;
use api::kinds::LEASES;
use api::object::Key;
use jiff::Timestamp;
use reconcile::Api;
use serde_json::{Value, json};
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::debug;

/// How long a Lease holds.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// After so long without a renewal the Lease is anybody's.
    pub life: Duration,
    pub renewal: Duration,
}

impl Terms {
    /// For what may rest for a while.
    pub const CALM: Terms = Terms { life: Duration::from_secs(15), renewal: Duration::from_secs(5) };
    /// For what people wait for.
    pub const QUICK: Terms = Terms { life: Duration::from_secs(3), renewal: Duration::from_secs(1) };
}

/// How long the end may wait for a Lease to be given up.
const GIVING_UP: Duration = Duration::from_millis(200);

/// What was last seen of somebody else's Lease, and when: by our own clock, as theirs may differ.
struct Seen {
    version: String,
    at: Instant,
}

/// Holds the Lease when it can, and says in `leads` whether it does, until the token is cancelled.
pub async fn run(
    client: kube::Client,
    lease: Key,
    identity: String,
    terms: Terms,
    leads: watch::Sender<bool>,
    token: CancellationToken,
) {
    let leases = Api::new(&client, &LEASES);
    let mut seen: Option<Seen> = None;
    let mut held_until: Option<Instant> = None;
    loop {
        // Others count from when they saw it renewed, which is after now; and ours ends a while before.
        let asked = Instant::now();
        held_until = held_until.filter(|until| asked < *until);
        // A host that is cut off may wait for an answer for minutes: what it holds ends meanwhile.
        let answer = tokio::select! {
            answer = take(&leases, &lease, &identity, terms.life, &mut seen) => Some(answer),
            () = lapsed(held_until) => None,
            () = tokio::time::sleep(terms.life) => None,
            () = token.cancelled() => break,
        };
        match answer {
            Some(Ok(true)) => held_until = Some(asked + terms.life - terms.renewal),
            Some(Ok(false)) => held_until = None,
            // The API may be away: who holds it does so for the rest of its time.
            Some(Err(error)) => debug!(error = format!("{error:#}"), "the Lease was not renewed"),
            None => debug!("the API server does not answer"),
        }
        let is_held = held_until.is_some_and(|until| Instant::now() < until);
        leads.send_if_modified(|leads| std::mem::replace(leads, is_held) != is_held);
        tokio::select! {
            () = tokio::time::sleep(terms.renewal) => {}
            () = lapsed(held_until.filter(|_| is_held)) => {}
            () = token.cancelled() => break,
        }
    }
    if *leads.borrow() {
        // So that the next one need not wait. What goes wrong here ends by itself, and an API server that ends, too, may never
        // answer.
        tokio::time::timeout(GIVING_UP, give_up(&leases, &lease, &identity)).await.ok();
    }
}

/// Waits until a Lease that is held is held no more.
async fn lapsed(held_until: Option<Instant>) {
    match held_until {
        Some(until) => tokio::time::sleep_until(until).await,
        None => std::future::pending().await,
    }
}

/// Whether it is ours now.
async fn take(
    leases: &Api,
    lease: &Key,
    identity: &str,
    life: Duration,
    seen: &mut Option<Seen>,
) -> anyhow::Result<bool> {
    let now = api::time::micros(Timestamp::now());
    let Some(mut held) = leases.find(&lease.namespace, &lease.name).await? else {
        let object = json!({"apiVersion": LEASES.api_version(), "kind": LEASES.kind,
            "metadata": {"namespace": lease.namespace, "name": lease.name},
            "spec": {"holderIdentity": identity, "leaseDurationSeconds": life.as_secs(), "acquireTime": now, "renewTime": now, "leaseTransitions": 0}});
        return match leases.create(&lease.namespace, &object).await {
            Ok(_) => Ok(true),
            Err(error) if error.is_already_exists() => Ok(false),
            Err(error) => Err(error.into()),
        };
    };
    let holder = held.text("/spec/holderIdentity").to_owned();
    let version = held.resource_version().to_owned();
    if holder != identity && !holder.is_empty() {
        let is_new = seen.as_ref().is_none_or(|seen| seen.version != version);
        if is_new {
            *seen = Some(Seen { version, at: Instant::now() });
        }
        if seen.as_ref().is_some_and(|seen| seen.at.elapsed() < life) {
            return Ok(false);
        }
    }
    let spec = held.get_mut("spec").and_then(Value::as_object_mut).context("a Lease has a spec")?;
    if holder != identity {
        let changes = spec.get("leaseTransitions").and_then(Value::as_u64).unwrap_or_default();
        spec.insert("leaseTransitions".into(), json!(changes + 1));
        spec.insert("acquireTime".into(), json!(now));
    }
    spec.insert("holderIdentity".into(), json!(identity));
    spec.insert("leaseDurationSeconds".into(), json!(life.as_secs()));
    spec.insert("renewTime".into(), json!(now));
    match leases.replace(&held).await {
        Ok(_) => Ok(true),
        // Somebody else was faster.
        Err(error) if error.is_conflict() => Ok(false),
        Err(error) => Err(error.into()),
    }
}

async fn give_up(leases: &Api, lease: &Key, identity: &str) -> anyhow::Result<()> {
    let mut held = leases.get(&lease.namespace, &lease.name).await?;
    if held.text("/spec/holderIdentity") == identity {
        held["spec"]["holderIdentity"] = json!("");
        leases.replace(&held).await?;
    }
    Ok(())
}
