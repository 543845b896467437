//! `fairlead apply|get|delete|logs`: thin clients of the API, for machines without kubectl.
//!
//! They know no kind: names are resolved by discovery, tables come from the server, changes are server-side apply.

mod discovery;
mod files;
pub(crate) mod session;
mod table;

use std::io;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use api::ObjectExt;
use clap::{Args, ValueEnum};
use http_body_util::BodyExt;
use reconcile::ApiError;
use serde::Serialize;
use serde_json::{Value, json};

use discovery::{Kind, Kinds};
use session::{Connection, JSON, Session, TABLE, complain, complaint, encode, fail, say};
use table::{Printer, Style};

const MANAGER: &str = "fairlead";

/// A command's end. A reader that went away (`| head`) is no failure.
fn ended(result: anyhow::Result<bool>) -> anyhow::Result<ExitCode> {
    match result {
        Ok(true) => Ok(ExitCode::SUCCESS),
        Ok(false) => Ok(ExitCode::FAILURE),
        Err(error) => {
            let is_closed = |cause: &(dyn std::error::Error + 'static)| {
                cause.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
            };
            if error.chain().any(is_closed) { Ok(ExitCode::SUCCESS) } else { Err(error) }
        }
    }
}

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

/// The namespace of an object in a file.
fn place(session: &Session, kind: &Kind, object: &Value) -> anyhow::Result<String> {
    if !kind.namespaced {
        return Ok(String::new());
    }
    match object.namespace() {
        "" => Ok(session.namespace.clone()),
        own if session.is_given && own != session.namespace => bail!(
            "the namespace from the provided object {own:?} does not match the namespace {:?}: leave -n out, or give -n {own}",
            session.namespace
        ),
        own => Ok(own.to_string()),
    }
}

#[derive(ValueEnum, Debug, Clone, Copy, PartialEq, Eq)]
enum Output {
    Json,
    Yaml,
    Wide,
    Name,
}

#[derive(Args, Debug)]
pub struct GetArgs {
    /// RESOURCE[,RESOURCE…] [NAME…], or RESOURCE/NAME…: pods, deploy nginx, svc/web, all.
    #[arg(required = true, value_name = "RESOURCE")]
    what: Vec<String>,
    /// Of all namespaces.
    #[arg(short = 'A', long)]
    all_namespaces: bool,
    /// Only objects with these labels: app=web,tier!=test
    #[arg(short = 'l', long, value_name = "LABELS", default_value = "", hide_default_value = true)]
    selector: String,
    /// Only objects with these fields: metadata.name=web
    #[arg(long, value_name = "FIELDS", default_value = "", hide_default_value = true)]
    field_selector: String,
    #[arg(short, long)]
    output: Option<Output>,
    /// Go on, and show what changes.
    #[arg(short, long)]
    watch: bool,
    /// Leave the table's headers out.
    #[arg(long)]
    no_headers: bool,
    #[command(flatten)]
    connection: Connection,
}

/// A kind, and the objects of it that are meant by name; all of them when there is none.
struct Target<'a> {
    kind: &'a Kind,
    names: Vec<String>,
}

/// Reads `RESOURCE NAME…` or `RESOURCE/NAME…`.
fn targets<'a>(kinds: &'a Kinds, what: &[String]) -> anyhow::Result<Vec<Target<'a>>> {
    let (first, rest) = what.split_first().context("say what is meant, such as pods or svc/NAME")?;
    if !first.contains('/') {
        let found = kinds.several(first)?;
        if found.len() > 1 && !rest.is_empty() {
            bail!("names go with one resource; say RESOURCE/NAME for objects of several");
        }
        if let Some(wrong) = rest.iter().find(|name| name.contains('/')) {
            bail!("{wrong:?} is not a name: give RESOURCE NAME… or RESOURCE/NAME…, not both");
        }
        return Ok(found.into_iter().map(|kind| Target { kind, names: rest.to_vec() }).collect());
    }
    let mut targets: Vec<Target<'a>> = Vec::new();
    for word in what {
        let split = word.split_once('/').filter(|(kind, name)| !kind.is_empty() && !name.is_empty());
        let (kind, name) = split.with_context(|| format!("{word:?} is not RESOURCE/NAME"))?;
        let kind = kinds.one(kind)?;
        match targets.last_mut().filter(|t| t.kind == kind) {
            Some(target) => target.names.push(name.to_string()),
            None => targets.push(Target { kind, names: vec![name.to_string()] }),
        }
    }
    Ok(targets)
}

impl GetArgs {
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        ended(self.get().await)
    }

    async fn get(self) -> anyhow::Result<bool> {
        let session = self.connection.open().await?;
        let kinds = Kinds::discover(&session).await?;
        let targets = targets(&kinds, &self.what)?;
        let has_names = targets.iter().any(|t| !t.names.is_empty());
        if has_names && !(self.selector.is_empty() && self.field_selector.is_empty()) {
            bail!("names and selectors do not go together");
        }
        if has_names && self.all_namespaces {
            bail!("an object cannot be retrieved by name across all namespaces");
        }
        if self.watch {
            let [target] = targets.as_slice() else { bail!("--watch follows one resource; say which") };
            if target.names.len() > 1 {
                bail!("--watch follows one object or all; say which");
            }
            return self.follow(&session, target).await;
        }
        match self.output {
            None | Some(Output::Wide) => self.tables(&session, &targets).await,
            Some(output) => self.objects(&session, &targets, output).await,
        }
    }

    fn namespace<'a>(&self, session: &'a Session) -> &'a str {
        if self.all_namespaces { "" } else { &session.namespace }
    }

    fn style(&self, kind: &Kind, several: bool) -> Style {
        Style {
            wide: self.output == Some(Output::Wide),
            with_namespace: self.all_namespaces && kind.namespaced,
            name_prefix: several.then(|| kind.label()),
            no_headers: self.no_headers,
        }
    }

    /// Tables, one for each kind, with an empty line between.
    async fn tables(&self, session: &Session, targets: &[Target<'_>]) -> anyhow::Result<bool> {
        let (mut good, mut printed) = (true, false);
        for target in targets {
            let pages = self.read(session, target, TABLE, &mut good).await?;
            let text = Printer::new(self.style(target.kind, targets.len() > 1)).print(&pages);
            if text.is_empty() {
                continue;
            }
            say(&if printed { format!("\n{text}") } else { text })?;
            printed = true;
        }
        if !printed && good {
            let place = match targets.iter().any(|t| t.kind.namespaced) && !self.all_namespaces {
                true => format!(" in {} namespace", session.namespace),
                false => String::new(),
            };
            complain(&format!("No resources found{place}."));
        }
        Ok(good)
    }

    async fn objects(&self, session: &Session, targets: &[Target<'_>], output: Output) -> anyhow::Result<bool> {
        let mut good = true;
        let mut found = Vec::new();
        for target in targets {
            for page in self.read(session, target, JSON, &mut good).await? {
                found.extend(items(target.kind, page).into_iter().map(|object| (target.kind, object)));
            }
        }
        if output == Output::Name {
            let lines = found.iter().map(|(kind, object)| format!("{}/{}\n", kind.label(), object.name()));
            say(&lines.collect::<String>())?;
            return Ok(good);
        }
        let is_one = targets.len() == 1 && targets[0].names.len() == 1;
        let mut objects: Vec<Value> = found.into_iter().map(|(_, object)| object).collect();
        let whole = match is_one {
            true => match objects.pop() {
                Some(object) => object,
                None => return Ok(good),
            },
            false => json!({"apiVersion": "v1", "kind": "List", "metadata": {"resourceVersion": ""}, "items": objects}),
        };
        say(&write(&whole, output)?)?;
        Ok(good)
    }

    /// The answers for one kind: each named object, or the pages of a list. Complaints about single objects are told here.
    async fn read(
        &self,
        session: &Session,
        target: &Target<'_>,
        accept: &str,
        good: &mut bool,
    ) -> anyhow::Result<Vec<Value>> {
        let namespace = self.namespace(session);
        let mut answers = Vec::new();
        for name in &target.names {
            match session.get(&target.kind.object_path(namespace, name), accept).await {
                Ok(answer) => answers.push(answer),
                Err(error @ ApiError::Status(_)) => {
                    complain(&complaint(&error));
                    *good = false;
                }
                Err(error) => return Err(fail(error)),
            }
        }
        if !target.names.is_empty() {
            return Ok(answers);
        }
        let mut more = String::new();
        loop {
            let path = format!("{}?limit=500{}{more}", target.kind.path(namespace), self.selectors());
            let page = session.get(&path, accept).await.map_err(fail)?;
            let next = page.text("/metadata/continue");
            let is_last = next.is_empty();
            more = format!("&continue={}", encode(next));
            answers.push(page);
            if is_last {
                return Ok(answers);
            }
        }
    }

    fn selectors(&self) -> String {
        let pairs = [("labelSelector", &self.selector), ("fieldSelector", &self.field_selector)];
        let given = pairs.iter().filter(|(_, value)| !value.is_empty());
        given.map(|(key, value)| format!("&{key}={}", encode(value))).collect()
    }

    /// Shows what is there, and then each change, until the server ends the watch or the reader goes away.
    async fn follow(&self, session: &Session, target: &Target<'_>) -> anyhow::Result<bool> {
        let output = self.output.filter(|o| *o != Output::Wide);
        let accept = if output.is_some() { JSON } else { TABLE };
        let selectors = match target.names.first() {
            // An object that is not there is said to be so, as without --watch.
            Some(name) => {
                let path = target.kind.object_path(self.namespace(session), name);
                session.get(&path, JSON).await.map_err(fail)?;
                format!("&fieldSelector={}", encode(&format!("metadata.name={name}")))
            }
            None => self.selectors(),
        };
        let collection = target.kind.path(self.namespace(session));
        let list = session.get(&format!("{collection}?{}", selectors.trim_start_matches('&')), accept).await;
        let list = list.map_err(fail)?;
        let version = list.text("/metadata/resourceVersion").to_string();
        let mut printer = Printer::new(self.style(target.kind, false));
        match output {
            Some(output) => {
                for object in items(target.kind, list) {
                    say(&one(target.kind, &object, output)?)?;
                }
            }
            None => say(&printer.print([&list]))?,
        }
        let path = format!("{collection}?watch=true&resourceVersion={}{selectors}", encode(&version));
        let mut events = session.lines(&path, accept).await.map_err(fail)?;
        while let Some((kind, object)) = events.next().await.map_err(fail)? {
            match output {
                _ if kind == "BOOKMARK" => {}
                Some(output) => say(&one(target.kind, &object, output)?)?,
                None => say(&printer.print([&object]))?,
            }
        }
        Ok(true)
    }
}

/// The objects of an answer, each with its head: servers leave it out of lists.
fn items(kind: &Kind, answer: Value) -> Vec<Value> {
    let mut answer = answer;
    let mut objects = match answer.get_mut("items").map(Value::take) {
        Some(Value::Array(items)) => items,
        _ => vec![answer],
    };
    objects.retain(Value::is_object);
    for object in &mut objects {
        object["apiVersion"] = json!(kind.api_version());
        object["kind"] = json!(kind.kind);
        object.metadata_mut().remove("managedFields");
    }
    objects
}

fn one(kind: &Kind, object: &Value, output: Output) -> anyhow::Result<String> {
    match output {
        Output::Name => Ok(format!("{}/{}\n", kind.label(), object.name())),
        Output::Yaml => Ok(format!("---\n{}", write(object, output)?)),
        _ => write(object, output),
    }
}

fn write(object: &Value, output: Output) -> anyhow::Result<String> {
    if output == Output::Yaml {
        let mut text = serde_saphyr::to_string(object).context("write YAML")?;
        if !text.ends_with('\n') {
            text.push('\n');
        }
        return Ok(text);
    }
    let mut bytes = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    let mut writer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
    object.serialize(&mut writer).context("write JSON")?;
    bytes.push(b'\n');
    String::from_utf8(bytes).context("write JSON")
}

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

#[derive(Args, Debug)]
pub struct LogsArgs {
    /// A pod, or RESOURCE/NAME of something that has pods.
    #[arg(value_name = "POD|RESOURCE/NAME")]
    what: String,
    /// The container; needed where a pod has several.
    #[arg(short, long)]
    container: Option<String>,
    /// Go on while the container writes.
    #[arg(short, long)]
    follow: bool,
    /// Only the last lines.
    #[arg(long, value_name = "LINES")]
    tail: Option<u64>,
    /// Of the container before its last restart.
    #[arg(short, long)]
    previous: bool,
    /// Each line with its time.
    #[arg(long)]
    timestamps: bool,
    /// Only what is younger.
    #[arg(long, value_name = "SECONDS")]
    since_seconds: Option<u64>,
    #[command(flatten)]
    connection: Connection,
}

impl LogsArgs {
    pub async fn run(self) -> anyhow::Result<ExitCode> {
        ended(self.logs().await)
    }

    async fn logs(self) -> anyhow::Result<bool> {
        let session = self.connection.open().await?;
        let pod = match self.what.split_once('/') {
            None => self.what.clone(),
            Some((kind, name)) => {
                let kinds = Kinds::discover(&session).await?;
                pod_of(&session, &kinds, kinds.one(kind)?, name).await?
            }
        };
        let path =
            format!("/api/v1/namespaces/{}/pods/{}/log?{}", encode(&session.namespace), encode(&pod), self.query());
        let mut body = session.open("GET", &path, "*/*", "", Vec::new()).await.map_err(fail)?.into_body();
        let mut out = io::stdout();
        while let Some(frame) = body.frame().await {
            let frame = frame.context("the log broke off")?;
            if let Some(data) = frame.data_ref() {
                // Bytes as they are: a log need not be text.
                io::Write::write_all(&mut out, data).and_then(|()| io::Write::flush(&mut out))?;
            }
        }
        Ok(true)
    }

    fn query(&self) -> String {
        let mut query = Vec::new();
        if let Some(container) = &self.container {
            query.push(format!("container={}", encode(container)));
        }
        for (key, is_set) in [("follow", self.follow), ("previous", self.previous), ("timestamps", self.timestamps)] {
            if is_set {
                query.push(format!("{key}=true"));
            }
        }
        for (key, number) in [("tailLines", self.tail), ("sinceSeconds", self.since_seconds)] {
            if let Some(number) = number {
                query.push(format!("{key}={number}"));
            }
        }
        query.join("&")
    }
}

/// A pod of a workload or Service: by its selector, a running one where there is one.
async fn pod_of(session: &Session, kinds: &Kinds, kind: &Kind, name: &str) -> anyhow::Result<String> {
    let pods = kinds.one("pods")?;
    if kind == pods {
        return Ok(name.to_string());
    }
    let object = session.get(&kind.object_path(&session.namespace, name), JSON).await.map_err(fail)?;
    let selector = selector_of(&object).with_context(|| format!("{}/{name} selects no pods", kind.label()))?;
    let path = format!("{}?labelSelector={}", pods.path(&session.namespace), encode(&selector));
    let found = items(pods, session.get(&path, JSON).await.map_err(fail)?);
    let running = found.iter().find(|p| p.text("/status/phase") == "Running").or(found.first());
    let pod = running.with_context(|| format!("{}/{name} has no pods", kind.label()))?.name().to_string();
    if found.len() > 1 {
        complain(&format!("Found {} pods, using pod/{pod}", found.len()));
    }
    Ok(pod)
}

/// The label selector of an object's pods, as a query has it.
fn selector_of(object: &Value) -> Option<String> {
    let selector = object.pointer("/spec/selector")?;
    let is_structured = selector.get("matchLabels").is_some() || selector.get("matchExpressions").is_some();
    let labels = if is_structured { selector.get("matchLabels") } else { Some(selector) };
    let mut terms: Vec<String> = Vec::new();
    for (key, value) in labels.and_then(Value::as_object).into_iter().flatten() {
        terms.push(format!("{key}={}", value.as_str()?));
    }
    for expression in selector.get("matchExpressions").and_then(Value::as_array).into_iter().flatten() {
        let values = expression.get("values").and_then(Value::as_array);
        let values: Vec<&str> = values.into_iter().flatten().filter_map(Value::as_str).collect();
        let (key, values) = (expression.text("/key"), values.join(","));
        terms.push(match expression.text("/operator") {
            "In" => format!("{key} in ({values})"),
            "NotIn" => format!("{key} notin ({values})"),
            "Exists" => key.to_string(),
            "DoesNotExist" => format!("!{key}"),
            _ => return None,
        });
    }
    (!terms.is_empty()).then(|| terms.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_selector_is_written_as_a_query_has_it() {
        let service = json!({"spec": {"selector": {"app": "web", "tier": "front"}}});
        assert_eq!(selector_of(&service).as_deref(), Some("app=web,tier=front"));
        let deployment = json!({"spec": {"selector": {"matchLabels": {"app": "web"},
            "matchExpressions": [{"key": "env", "operator": "In", "values": ["a", "b"]}, {"key": "old", "operator": "DoesNotExist"}]}}});
        assert_eq!(selector_of(&deployment).as_deref(), Some("app=web,env in (a,b),!old"));
        assert_eq!(selector_of(&json!({"spec": {}})), None);
    }

    #[test]
    fn objects_are_shown_with_their_head_and_without_field_managers() {
        let kind = Kind {
            group: "apps".into(),
            version: "v1".into(),
            plural: "deployments".into(),
            singular: "deployment".into(),
            kind: "Deployment".into(),
            short_names: Vec::new(),
            categories: Vec::new(),
            namespaced: true,
            verbs: Vec::new(),
        };
        let list = json!({"items": [{"metadata": {"name": "a", "managedFields": [1]}}]});
        let objects = items(&kind, list);
        assert_eq!(objects, [json!({"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "a"}})]);
        let text = write(&objects[0], Output::Json).expect("JSON");
        assert!(text.starts_with("{\n    \"apiVersion\": \"apps/v1\",\n"), "{text}");
        let yaml = write(&objects[0], Output::Yaml).expect("YAML");
        let back: Value = serde_saphyr::from_str(&yaml).expect("readable");
        assert_eq!(back, objects[0]);
        assert_eq!(one(&kind, &objects[0], Output::Name).expect("a name"), "deployment.apps/a\n");
    }

    #[test]
    fn a_readers_end_is_no_failure() {
        let closed = anyhow::Error::from(io::Error::from(io::ErrorKind::BrokenPipe)).context("write");
        assert!(ended(Err(closed)).is_ok());
        assert!(ended(Err(anyhow::anyhow!("else"))).is_err());
    }
}
