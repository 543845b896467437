//! `fairlead delete`: objects by name, label or file, and the wait until they are gone.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::bail;
use api::ObjectExt;
use clap::{Args, ValueEnum};
use reconcile::ApiError;
use serde_json::{Value, json};

use super::discovery::{Kind, Kinds};
use super::session::{Connection, JSON, Session, complain, complaint, encode, fail, say};
use super::{Target, ended, files, items, place, targets};

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
enum Cascade {
    Background,
    Foreground,
    Orphan,
}

impl Cascade {
    fn policy(self) -> &'static str {
        match self {
            Cascade::Background => "Background",
            Cascade::Foreground => "Foreground",
            Cascade::Orphan => "Orphan",
        }
    }
}

#[derive(Args, Debug)]
pub struct DeleteArgs {
    /// RESOURCE NAME…, or RESOURCE/NAME…
    #[arg(value_name = "RESOURCE", required_unless_present = "filename")]
    what: Vec<String>,
    /// The objects of a file, a directory, or - for standard input.
    #[arg(short, long, value_name = "FILE|DIR|-", conflicts_with_all = ["what", "selector", "all"])]
    filename: Vec<PathBuf>,
    /// All objects with these labels.
    #[arg(short = 'l', long, value_name = "LABELS", default_value = "", hide_default_value = true)]
    selector: String,
    /// All objects of the resource in the namespace.
    #[arg(long)]
    all: bool,
    /// An object that is not there counts as deleted.
    #[arg(long)]
    ignore_not_found: bool,
    /// Seconds a pod has to end.
    #[arg(long, value_name = "SECONDS")]
    grace_period: Option<i64>,
    /// What becomes of objects that belong to the deleted one.
    #[arg(long, default_value = "background")]
    cascade: Cascade,
    /// Return before the objects are gone.
    #[arg(long)]
    no_wait: bool,
    #[command(flatten)]
    connection: Connection,
}

/// One object to delete.
struct Doomed<'a> {
    kind: &'a Kind,
    namespace: String,
    name: String,
}

impl DeleteArgs {
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        ended(self.delete().await)
    }

    async fn delete(self) -> anyhow::Result<bool> {
        let objects = if self.filename.is_empty() { Vec::new() } else { files::read(&self.filename)? };
        let session = self.connection.open().await?;
        let kinds = Kinds::discover(&session).await?;
        let mut good = true;
        let mut doomed = Vec::new();
        for object in &objects {
            let (api_version, kind) = (object.text("/apiVersion"), object.text("/kind"));
            match kinds.of(api_version, kind) {
                Some(kind) => {
                    let namespace = place(&session, kind, object)?;
                    doomed.push(Doomed { kind, namespace, name: object.name().to_string() });
                }
                None => {
                    complain(&format!("no matches for kind {kind:?} in version {api_version:?}"));
                    good = false;
                }
            }
        }
        if objects.is_empty() {
            for target in targets(&kinds, &self.what)? {
                let names = self.names(&session, &target).await?;
                let namespace = if target.kind.namespaced { session.namespace.clone() } else { String::new() };
                let kind = target.kind;
                doomed.extend(names.into_iter().map(|name| Doomed { kind, namespace: namespace.clone(), name }));
            }
        }
        if doomed.is_empty() && good {
            complain("No resources found.");
        }
        let mut going = Vec::new();
        for object in doomed {
            match self.ask(&session, &object).await {
                Ok(answer) => {
                    say(&format!("{} {:?} deleted\n", object.kind.label(), object.name))?;
                    going.push((uid(&answer), object));
                }
                Err(error) if error.is_not_found() && self.ignore_not_found => {}
                Err(error @ ApiError::Status(_)) => {
                    complain(&complaint(&error));
                    good = false;
                }
                Err(error) => return Err(fail(error)),
            }
        }
        if !self.no_wait {
            for (uid, object) in &going {
                gone(&session, object, uid).await.map_err(fail)?;
            }
        }
        Ok(good)
    }

    /// The names meant: those given, or those that a list gives.
    async fn names(&self, session: &Session, target: &Target<'_>) -> anyhow::Result<Vec<String>> {
        let by_list = self.all || !self.selector.is_empty();
        if !target.names.is_empty() {
            if by_list {
                bail!("names do not go together with --all or a selector");
            }
            return Ok(target.names.clone());
        }
        if !by_list {
            bail!("say which {}: give names, -l LABELS or --all", target.kind.plural);
        }
        let path = format!("{}?labelSelector={}", target.kind.path(&session.namespace), encode(&self.selector));
        let list = session.get(&path, JSON).await.map_err(fail)?;
        Ok(items(target.kind, list).iter().map(|o| o.name().to_string()).collect())
    }

    async fn ask(&self, session: &Session, object: &Doomed<'_>) -> Result<Value, ApiError> {
        let mut options =
            json!({"apiVersion": "v1", "kind": "DeleteOptions", "propagationPolicy": self.cascade.policy()});
        if let Some(seconds) = self.grace_period {
            options["gracePeriodSeconds"] = json!(seconds);
        }
        let path = object.kind.object_path(&object.namespace, &object.name);
        session.json("DELETE", &path, JSON, JSON, options.to_string().into_bytes()).await
    }
}

/// Of what was deleted, whether the server answered with the object or with a Status.
fn uid(answer: &Value) -> String {
    let uid = if answer.uid().is_empty() { answer.text("/details/uid") } else { answer.uid() };
    uid.to_string()
}

/// Waits until the object is not there any more, or another has taken its name.
async fn gone(session: &Session, object: &Doomed<'_>, uid: &str) -> Result<(), ApiError> {
    let selector = format!("fieldSelector={}", encode(&format!("metadata.name={}", object.name)));
    let collection = object.kind.path(&object.namespace);
    loop {
        let list = session.get(&format!("{collection}?{selector}"), JSON).await?;
        let version = list.text("/metadata/resourceVersion").to_string();
        let is_same = |o: &Value| uid.is_empty() || o.uid() == uid;
        if !items(object.kind, list).iter().any(is_same) {
            return Ok(());
        }
        let path = format!("{collection}?watch=true&resourceVersion={}&{selector}", encode(&version));
        let mut events = match session.lines(&path, JSON).await {
            Err(error) if error.is_expired() => continue,
            other => other?,
        };
        loop {
            match events.next().await {
                Ok(Some((kind, object))) if kind == "DELETED" && is_same(&object) => return Ok(()),
                Ok(Some(_)) => {}
                Ok(None) => break,
                Err(error) if error.is_expired() => break,
                Err(error) => return Err(error),
            }
        }
    }
}
