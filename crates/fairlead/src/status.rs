//! `status`: what runs where and what is wrong, on one screen.

use crate::config::ClusterConfig;
use crate::{cli, local};
use clap::Args;
use lab::Lab;
use serde_json::Value;
use std::process::ExitCode;

#[derive(Args, Debug, Clone)]
pub struct StatusArgs {
    #[command(flatten)]
    pub data: cli::DataDir,
    /// Print what a node's proxy put into the kernel.
    #[arg(long, value_name = "NODE")]
    pub plan: Option<String>,
}

pub fn run(args: &StatusArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    if let Some(name) = &args.plan {
        let lab = crate::node::open(&args.data)?;
        let socket = lab.node(name)?.dir.join("agent.sock");
        print!("{}", runtime.block_on(local::ask(&socket, "GET", "/plan", Vec::new()))?);
        return Ok(ExitCode::SUCCESS);
    }
    let clusters = Lab::list()?;
    if clusters.is_empty() {
        println!("no cluster runs on this machine; `fairlead up` starts one");
        return Ok(ExitCode::SUCCESS);
    }
    let mut wrong = 0;
    for (id, cluster) in clusters {
        let Some(cluster) = cluster else {
            println!("cluster {id}: its description is unreadable; `fairlead down --all` ends it");
            wrong += 1;
            continue;
        };
        println!("cluster {id} in {}", cluster.config.data_dir.display());
        if !cluster.config.data_dir.exists() {
            println!("  the data directory is gone; `fairlead down --all` ends it");
            wrong += 1;
        }
        let lab = Lab::open(&id)?;
        let config = ClusterConfig::load(&cluster.config.data_dir).ok().flatten();
        let processes = lab.processes()?;
        let state = |role: &str| match processes.iter().find(|p| p.role == role) {
            Some(process) if process.is_alive() => format!("running, pid {}", process.pid),
            Some(_) => "not running".to_string(),
            None => "never started".to_string(),
        };
        let server = state("server");
        wrong += i32::from(!server.starts_with("running"));
        let port =
            config.as_ref().map_or(String::new(), |c| format!(", https://127.0.0.1:{}, store {}", c.api_port, c.store));
        println!("  control plane  {server}{port}");
        for node in lab.nodes() {
            let addresses: Vec<String> = node.addresses().iter().map(ToString::to_string).collect();
            let mut line = format!("  {:<14} {}, {}", node.name, state(&node.name), addresses.join(" "));
            let socket = node.dir.join("agent.sock");
            match runtime.block_on(local::ask(&socket, "GET", "/status", Vec::new())) {
                Ok(text) => {
                    let status: Value = serde_json::from_str(&text)?;
                    let field = |pointer: &str| status.pointer(pointer).map(ToString::to_string).unwrap_or_default();
                    line += &format!(
                        ", proxy {} (synced {}, {} commits, {} pending), {} services",
                        field("/proxyMode").trim_matches('"'),
                        field("/proxy/synced"),
                        field("/proxy/commits"),
                        field("/proxy/pending"),
                        field("/services")
                    );
                    if let Some(about) =
                        status.pointer("/proxy/about").and_then(Value::as_str).filter(|a| !a.is_empty())
                    {
                        line += &format!("\n                 {about}");
                    }
                    if let Some(error) = status.pointer("/proxy/error").and_then(Value::as_str) {
                        line += &format!("\n      wrong: {error}");
                        wrong += 1;
                    }
                }
                Err(_) => {
                    line += "; its agent does not answer";
                    wrong += 1;
                }
            }
            println!("{line}");
        }
    }
    Ok(if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
