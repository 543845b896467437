//! `fairlead vip`: holds addresses on an interface of this host, for API servers or for anything else, as keepalived does: by VRRP
//! among the hosts that may, as long as what they are for answers here.

mod check;
mod file;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use api::duration::GoDuration;
use clap::Args;
use loadbalancer::vrrp::holder::{Holder, Notice};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::{cli, local};
use check::{Check, Verdict};
use file::{RouterFile, VipFile};

#[derive(Args, Debug, Clone)]
pub struct VipArgs {
    /// Virtual routers, YAML; see docs/vip.md. Or one by the other flags.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["interface", "id", "address", "peer", "check"])]
    pub config: Option<PathBuf>,
    /// Where the addresses are put, and where the other hosts are.
    #[arg(long, value_name = "LINK", required_unless_present = "config")]
    pub interface: Option<String>,
    /// The number of the virtual router, the same on all hosts.
    #[arg(long, value_name = "1-255", required_unless_present = "config", value_parser = clap::value_parser!(u8).range(1..))]
    pub id: Option<u8>,
    /// An address to hold, of either family; may be repeated.
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',', required_unless_present = "config")]
    pub address: Vec<IpAddr>,
    /// The greatest of all hosts holds them; 255 is for their owner.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u8).range(1..))]
    pub priority: u8,
    /// Between advertisements, in steps of 10ms. A dead host is followed after three of them.
    #[arg(long, value_name = "DURATION", default_value = "1s")]
    pub interval: GoDuration,
    /// Leave the addresses where they are when a host of a greater priority comes back.
    #[arg(long)]
    pub no_preempt: bool,
    /// Another host, told alone instead of all by multicast; may be repeated.
    #[arg(long, value_name = "ADDRESS", value_delimiter = ',')]
    pub peer: Vec<IpAddr>,
    /// What has to answer here, or nothing is held: tcp://ADDRESS:PORT, http://ADDRESS:PORT/PATH or https://…; may be repeated.
    #[arg(long, value_name = "URL")]
    pub check: Vec<String>,
}

pub fn run(args: VipArgs) -> anyhow::Result<ExitCode> {
    cli::start_logging();
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(start(args))
}

fn read(args: VipArgs) -> anyhow::Result<VipFile> {
    let Some(path) = args.config else {
        let router = RouterFile {
            name: "vip".into(),
            interface: args.interface.context("--interface is missing")?,
            id: args.id.context("--id is missing")?,
            priority: args.priority,
            interval: args.interval,
            preempt: !args.no_preempt,
            addresses: args.address,
            peers: args.peer,
            checks: args.check.iter().map(|url| file::CheckFile::of(url)).collect(),
            ..RouterFile::default()
        };
        return Ok(VipFile { routers: vec![router] });
    };
    let text = std::fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
    serde_saphyr::from_str(&text).with_context(|| path.display().to_string())
}

/// What decides how much a virtual router is worth here.
struct Worth {
    /// As the file says.
    priority: u8,
    /// What a failed check takes off; `None`: all of it.
    weights: Vec<Option<u8>>,
    verdicts: Vec<Verdict>,
}

impl Worth {
    /// `None`: nothing is held until all checks have said what they think, and while one fails that has no weight.
    fn now(&self) -> Option<u8> {
        let mut priority = self.priority;
        for (verdict, weight) in self.verdicts.iter().zip(&self.weights) {
            match (verdict, weight) {
                (Verdict::Good, _) => {}
                (Verdict::Bad, Some(weight)) => priority = priority.saturating_sub(*weight).max(1),
                (Verdict::Bad, None) | (Verdict::Unknown, _) => return None,
            }
        }
        Some(priority)
    }
}

async fn start(args: VipArgs) -> anyhow::Result<ExitCode> {
    let file = read(args)?;
    if file.routers.is_empty() {
        bail!("there are no routers in the file; write one, as docs/vip.md shows");
    }
    let mut worths: BTreeMap<String, Worth> = BTreeMap::new();
    let mut configs = Vec::new();
    let mut checks: Vec<(String, usize, Check)> = Vec::new();
    for router in &file.routers {
        for config in router.configs()? {
            let name = config.name.clone();
            let mut weights = Vec::new();
            for (place, check) in router.checks.iter().enumerate() {
                weights.push(check.weight);
                checks.push((name.clone(), place, check.parse().with_context(|| format!("router {}", router.name))?));
            }
            let verdicts = vec![Verdict::Unknown; weights.len()];
            let worth = Worth { priority: router.priority, weights, verdicts };
            if worths.insert(name.clone(), worth).is_some() {
                bail!("two routers are called {name:?}; give each a name of its own");
            }
            configs.push(config);
        }
    }
    let holder = Holder::start(configs, |notice| match notice {
        Notice::Took(router) => println!("{router}: held here"),
        Notice::GaveUp(router) => println!("{router}: not held here"),
    })?;
    let (token, mut tasks) = (CancellationToken::new(), JoinSet::new());
    let (said, mut heard) = mpsc::channel(64);
    for (name, place, check) in checks {
        let (said, token) = (said.clone(), token.clone());
        tasks.spawn(
            async move { check.run(|verdict| said.try_send((name.clone(), place, verdict)).is_ok(), token).await },
        );
    }
    let end = local::wait_for_end();
    tokio::pin!(end);
    let ended = loop {
        tokio::select! {
            ended = &mut end => break ended,
            Some((name, place, verdict)) = heard.recv() => {
                let Some(worth) = worths.get_mut(&name) else { continue };
                worth.verdicts[place] = verdict;
                holder.set_priority(&name, worth.now());
            }
        }
    };
    token.cancel();
    while tasks.join_next().await.is_some() {}
    // It gives up when it is dropped, which waits for its thread.
    drop(holder);
    ended.map(|()| ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checks_decide_what_a_router_is_worth() {
        let worth = |verdicts: &[Verdict]| {
            Worth { priority: 100, weights: vec![None, Some(30), Some(90)], verdicts: verdicts.to_vec() }.now()
        };
        use Verdict::{Bad, Good, Unknown};
        for (verdicts, expected) in [
            ([Good, Good, Good], Some(100)),
            ([Good, Bad, Good], Some(70)),
            ([Good, Bad, Bad], Some(1)),
            ([Bad, Good, Good], None),
            ([Unknown, Good, Good], None),
            ([Good, Unknown, Good], None),
        ] {
            assert_eq!(worth(&verdicts), expected, "{verdicts:?}");
        }
    }
}
