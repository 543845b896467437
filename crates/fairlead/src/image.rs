//! `image import|ls|rm`: the images of a cluster on this machine, which all its nodes share.

use crate::cli;
use anyhow::Context;
use clap::{Args, Subcommand};
use runtime::image::ImageStore;
use std::path::PathBuf;
use std::process::ExitCode;

#[derive(Args, Debug, Clone)]
pub struct ImageArgs {
    #[command(flatten)]
    data: cli::DataDir,
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Subcommand, Debug, Clone)]
enum ImageCommand {
    /// Import an OCI or docker-save archive (plain, gzip or zstd) for every node of the cluster.
    Import { archive: PathBuf },
    /// List images.
    Ls,
    /// Remove an image by name.
    Rm { name: String },
}

pub fn run(args: ImageArgs) -> anyhow::Result<ExitCode> {
    // All nodes of one machine read one store, so what is imported once is on every node.
    let store = ImageStore::open(args.data.data_dir.join("images"))?;
    match args.command {
        ImageCommand::Import { archive } => {
            let file = std::fs::File::open(&archive).with_context(|| format!("open {}", archive.display()))?;
            for image in store.import(file, None)? {
                for name in image.status().repo_tags {
                    println!("{name}");
                }
            }
        }
        ImageCommand::Ls => {
            println!("{:<60} {:>10}  ID", "IMAGE", "SIZE");
            for image in store.list()? {
                let status = image.status();
                for name in &status.repo_tags {
                    println!("{name:<60} {:>7} MB  {}", status.size / 1_000_000, status.id);
                }
            }
        }
        ImageCommand::Rm { name } => store.remove(&name)?,
    }
    Ok(ExitCode::SUCCESS)
}
