//! `fairlead logs`: what a pod's containers wrote.

use std::io;
use std::process::ExitCode;

use anyhow::Context;
use api::ObjectExt;
use clap::Args;
use http_body_util::BodyExt;
use serde_json::Value;

use super::discovery::{Kind, Kinds};
use super::session::{Connection, JSON, Session, complain, encode, fail};
use super::{ended, items};

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
    use serde_json::json;

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
}
