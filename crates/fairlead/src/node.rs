//! `node exec|stop|kill|start|mode`.

use crate::config::ClusterConfig;
use crate::{cli, local, up};
use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use lab::{Lab, Process};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::OsString;
use std::process::ExitCode;
use std::time::{Duration, Instant};

#[derive(Args, Debug, Clone)]
pub struct NodeArgs {
    #[command(subcommand)]
    command: NodeCommand,
}

#[derive(Subcommand, Debug, Clone)]
enum NodeCommand {
    /// Run a command in a node's network namespace and cgroup; its exit code is the command's.
    Exec {
        #[command(flatten)]
        data: cli::DataDir,
        /// A node, or `outside`.
        place: String,
        #[arg(last = true, required = true)]
        command: Vec<OsString>,
    },
    /// End a node's agent; its pods go on.
    Stop {
        #[command(flatten)]
        data: cli::DataDir,
        node: String,
    },
    /// End everything on a node at once, as a loss of power would.
    Kill {
        #[command(flatten)]
        data: cli::DataDir,
        node: String,
    },
    /// Start a node's agent again.
    Start {
        #[command(flatten)]
        data: cli::DataDir,
        node: String,
    },
    /// Change how Services reach a node's kernel, without losing a connection.
    Mode {
        #[command(flatten)]
        data: cli::DataDir,
        node: String,
        /// nftables, iptables or userspace; the node keeps it when its agent is started again.
        mode: proxy::Mode,
    },
}

/// The lab of a data directory.
pub fn open(data: &cli::DataDir) -> anyhow::Result<Lab> {
    let id = lab::id_of(&data.data_dir)?;
    Lab::open(&id)
        .with_context(|| format!("no cluster runs from {}; `fairlead up` starts one", data.data_dir.display()))
}

pub fn run(args: NodeArgs) -> anyhow::Result<ExitCode> {
    match args.command {
        NodeCommand::Exec { data, place, command } => {
            let lab = open(&data)?;
            let (program, arguments) = command.split_first().context("name a command after --")?;
            let status = lab.command(&place, program, arguments)?.status()?;
            let code = match (status.code(), std::os::unix::process::ExitStatusExt::signal(&status)) {
                (Some(code), _) => code,
                (None, Some(signal)) => 128 + signal,
                (None, None) => 1,
            };
            Ok(ExitCode::from(u8::try_from(code & 0xff).unwrap_or(1)))
        }
        NodeCommand::Stop { data, node } => {
            let lab = open(&data)?;
            lab.node(&node)?;
            let all = lab.processes()?;
            let Some(process) = all.iter().find(|p| p.role == node && p.is_alive()) else {
                bail!("{node} is not running");
            };
            signal(process, Signal::SIGTERM);
            if !wait_gone(process, Duration::from_secs(10)) {
                signal(process, Signal::SIGKILL);
            }
            Ok(ExitCode::SUCCESS)
        }
        NodeCommand::Kill { data, node } => {
            open(&data)?.node(&node)?.kill()?;
            Ok(ExitCode::SUCCESS)
        }
        NodeCommand::Start { data, node } => {
            let lab = open(&data)?;
            lab.node(&node)?;
            if lab.processes()?.iter().any(|p| p.role == node && p.is_alive()) {
                bail!("{node} is running already");
            }
            up::start_node(&lab, &node)?;
            Ok(ExitCode::SUCCESS)
        }
        NodeCommand::Mode { data, node, mode } => {
            let lab = open(&data)?;
            let socket = lab.node(&node)?.dir.join("agent.sock");
            tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(local::ask(
                &socket,
                "POST",
                "/mode",
                mode.to_string().into_bytes(),
            ))?;
            ClusterConfig::keep_proxy_mode(&data.data_dir, &node, mode)
                .with_context(|| format!("{node} is in {mode} mode now, but only until its agent ends"))?;
            println!("{node} is in {mode} mode");
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Signals a recorded process. It may have ended meanwhile, which is what was wanted.
pub fn signal(process: &Process, signal: Signal) {
    if let Ok(pid) = i32::try_from(process.pid)
        && process.is_alive()
    {
        kill(Pid::from_raw(pid), signal).ok();
    }
}

/// Whether the process ended in time.
pub fn wait_gone(process: &Process, patience: Duration) -> bool {
    let until = Instant::now() + patience;
    while process.is_alive() {
        if Instant::now() > until {
            return false;
        }
        std::thread::park_timeout(Duration::from_millis(10));
    }
    true
}
