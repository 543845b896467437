//! `down`: ends a cluster and leaves nothing but its data directory.

use crate::cli;
use anyhow::Context;
use clap::Args;
use lab::Lab;
use std::process::ExitCode;
use std::time::Duration;

#[derive(Args, Debug, Clone)]
pub struct DownArgs {
    #[command(flatten)]
    pub data: cli::DataDir,
    /// End every cluster of this machine, also those whose directory is gone.
    #[arg(long)]
    pub all: bool,
}

pub fn run(args: &DownArgs) -> anyhow::Result<ExitCode> {
    if args.all {
        for (id, cluster) in Lab::list()? {
            let place = cluster.map(|c| c.config.data_dir.display().to_string()).unwrap_or_default();
            end(&id)?;
            println!("ended {id} {place}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let id = lab::id_of(&args.data.data_dir)
        .with_context(|| format!("find the cluster of {}", args.data.data_dir.display()))?;
    end(&id)?;
    Ok(ExitCode::SUCCESS)
}

/// Ends one cluster: the control plane first, so that nothing is scheduled anew, then all the rest at once.
pub fn end(id: &str) -> anyhow::Result<()> {
    if let Ok(lab) = Lab::open(id) {
        for process in lab.processes()?.iter().filter(|p| p.role == "server" && p.is_alive()) {
            crate::node::signal(process, nix::sys::signal::Signal::SIGTERM);
            crate::node::wait_gone(process, Duration::from_secs(5));
        }
        unmount_data(&lab.config().data_dir);
    }
    Lab::destroy(id)?;
    Ok(())
}

/// Mounts of pods below the data directory that are visible in this mount namespace.
fn unmount_data(dir: &std::path::Path) {
    if let Err(error) = linux::mntns::unmount_below(dir) {
        eprintln!("fairlead: unmount below {}: {error}", dir.display());
    }
}
