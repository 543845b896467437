//! `fairlead apply`: objects from files, by server-side apply.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use api::ObjectExt;
use clap::Args;

use super::discovery::Kinds;
use super::session::{Connection, JSON, complain, complaint, say};
use super::{ended, files, place};

const MANAGER: &str = "fairlead";

#[derive(Args, Debug)]
pub struct ApplyArgs {
    /// A file, a directory of them, or - for standard input; may be repeated.
    #[arg(short, long, required = true, value_name = "FILE|DIR|-")]
    filename: Vec<PathBuf>,
    /// Take over fields that another manager owns.
    #[arg(long)]
    force_conflicts: bool,
    #[command(flatten)]
    connection: Connection,
}

impl ApplyArgs {
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        ended(self.apply().await)
    }

    async fn apply(self) -> anyhow::Result<bool> {
        let objects = files::read(&self.filename)?;
        let session = self.connection.open().await?;
        let mut kinds = Kinds::discover(&session).await?;
        let mut good = true;
        for object in objects {
            let (api_version, kind) = (object.text("/apiVersion").to_string(), object.text("/kind").to_string());
            if kinds.of(&api_version, &kind).is_none() {
                // Perhaps a kind that an earlier object of these files has defined.
                kinds = Kinds::discover(&session).await?;
            }
            let Some(kind) = kinds.of(&api_version, &kind) else {
                complain(&format!("no matches for kind {kind:?} in version {api_version:?}"));
                good = false;
                continue;
            };
            let namespace = place(&session, kind, &object)?;
            let path = format!(
                "{}?fieldManager={MANAGER}&fieldValidation=Strict&force={}",
                kind.object_path(&namespace, object.name()),
                self.force_conflicts
            );
            let body = serde_json::to_vec(&object).context("write the object")?;
            match session.open("PATCH", &path, JSON, "application/apply-patch+yaml", body).await {
                Ok(answer) => {
                    let word = if answer.status().as_u16() == 201 { "created" } else { "configured" };
                    say(&format!("{}/{} {word}\n", kind.label(), object.name()))?;
                }
                Err(error) => {
                    complain(&format!("{}/{}: {}", kind.label(), object.name(), complaint(&error)));
                    good = false;
                }
            }
        }
        Ok(good)
    }
}
