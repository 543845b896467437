//! Kubernetes in one binary, built around its Service network: flags, certificates, wiring, drain.
//!
//! Two hidden subcommands run before any thread exists: `enter` moves into a node and becomes another program, `pod-helper`
//! holds a pod.

mod access;
mod agent;
mod await_dns;
mod barrier;
mod cli;
mod client;
mod components;
mod config;
mod connector;
mod dns;
mod down;
mod dsr;
mod explain;
mod image;
mod ingress;
mod join;
mod kubeconfig;
mod loadbalancer;
mod local;
mod node;
mod node_object;
mod pki;
mod proxy;
mod publish;
mod serve;
mod server;
mod service_cidrs;
mod signer;
mod status;
mod top;
mod up;
mod vip;
mod warnings;

use clap::Parser;
use std::process::ExitCode;

/// The whole program.
pub fn main() -> ExitCode {
    let mut arguments = std::env::args_os();
    arguments.next();
    match arguments.next().as_deref().and_then(|a| a.to_str()) {
        Some("enter") => match linux::enter::main(arguments) {
            Ok(never) => match never {},
            Err(error) => {
                eprintln!("fairlead: {error}");
                return ExitCode::from(127);
            }
        },
        Some("pod-helper") => {
            let arguments: Vec<String> = arguments.map(|a| a.to_string_lossy().into_owned()).collect();
            runtime::helper::main(&arguments);
        }
        _ => {}
    }
    linux::memory::keep_large_apart();
    let cli = cli::Cli::parse();
    match cli.run() {
        Ok(code) => code,
        Err(error) => {
            eprintln!("fairlead: {error:#}");
            ExitCode::FAILURE
        }
    }
}
