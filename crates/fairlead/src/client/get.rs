//! `fairlead get`: tables as the server makes them, or whole objects.

use std::process::ExitCode;

use anyhow::{Context, bail};
use api::ObjectExt;
use clap::{Args, ValueEnum};
use reconcile::ApiError;
use serde::Serialize;
use serde_json::{Value, json};

use super::discovery::{Kind, Kinds};
use super::session::{Connection, JSON, Session, TABLE, complain, complaint, encode, fail, say};
use super::table::{Printer, Style};
use super::{Target, ended, items, targets};

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

#[cfg(test)]
mod tests {
    use super::*;

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
}
