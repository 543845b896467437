//! A list of 10,000 pods over TLS.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use super::{ROUNDS, Row, median, milliseconds, with_cluster};
use crate::cluster::Cluster;
use crate::shell;

const PODS: usize = 10_000;

pub fn measure() -> Result<Vec<Row>> {
    with_cluster(1, |cluster| {
        let client = Client::new(cluster)?;
        client.create_pods(PODS)?;
        let mut times = Vec::new();
        let mut size = 0;
        for _ in 0..ROUNDS {
            let (time, bytes) = client.list()?;
            times.push(time);
            size = bytes;
        }
        let what = format!("list of {PODS} pods, {:.1} MB", size as f64 / 1e6);
        Ok(vec![Row { what, measured: milliseconds(median(times)), wanted: String::new() }])
    })
}

/// curl with the client certificate of the kubeconfig: kubectl would be slower than what it measures.
struct Client {
    server: String,
    dir: std::path::PathBuf,
}

impl Client {
    fn new(cluster: &Cluster) -> Result<Client> {
        let text = shell::output(&mut cluster.kubectl(&["config", "view", "--raw", "--flatten", "-o", "json"]))?;
        let config: Value = serde_json::from_str(&text)?;
        let dir = cluster.data_dir().join("bench-client");
        fs::create_dir_all(&dir)?;
        let files = [
            ("ca", "/clusters/0/cluster/certificate-authority-data"),
            ("cert", "/users/0/user/client-certificate-data"),
            ("key", "/users/0/user/client-key-data"),
        ];
        for (name, pointer) in files {
            let encoded = config.pointer(pointer).and_then(Value::as_str);
            decode(encoded.with_context(|| format!("the kubeconfig has no {pointer}"))?, &dir.join(name))?;
        }
        let server = config.pointer("/clusters/0/cluster/server").and_then(Value::as_str);
        Ok(Client { server: server.context("the kubeconfig names no server")?.to_owned(), dir })
    }

    fn curl(&self) -> Command {
        let mut command = Command::new("curl");
        command.current_dir(&self.dir);
        command.args(["-sS", "--fail", "--cacert", "ca", "--cert", "cert", "--key", "key", "-o", "/dev/null"]);
        command
    }

    /// No scheduler answers to their scheduler's name: they stay as they were made.
    fn create_pods(&self, count: usize) -> Result<()> {
        let mut requests = String::new();
        for index in 0..count {
            let file = format!("pod-{index}");
            fs::write(self.dir.join(&file), pod(index).to_string())?;
            let url = format!("{}/api/v1/namespaces/default/pods", self.server);
            requests.push_str(&format!("url = \"{url}\"\ndata = \"@{file}\"\noutput = /dev/null\n"));
            requests.push_str("header = \"Content-Type: application/json\"\n");
            for (option, value) in [("cacert", "ca"), ("cert", "cert"), ("key", "key")] {
                requests.push_str(&format!("{option} = {value}\n"));
            }
            requests.push_str(if index + 1 < count { "fail\nsilent\nnext\n" } else { "fail\nsilent\n" });
        }
        fs::write(self.dir.join("requests"), requests)?;
        let mut command = Command::new("curl");
        command.current_dir(&self.dir).args(["--parallel", "--parallel-max", "32", "--config", "requests"]);
        shell::output(&mut command).map(drop)
    }

    fn list(&self) -> Result<(Duration, u64)> {
        let mut command = self.curl();
        command.args(["-w", "%{time_total} %{size_download}"]).arg(format!("{}/api/v1/pods", self.server));
        let text = shell::output(&mut command)?;
        let Some((seconds, bytes)) = text.trim().split_once(' ') else { bail!("curl printed {text:?}") };
        Ok((Duration::from_secs_f64(seconds.parse()?), bytes.parse()?))
    }
}

fn pod(index: usize) -> Value {
    json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": { "name": format!("listed-{index:05}"), "labels": { "app": "listed" } },
        "spec": {
            "schedulerName": "nobody",
            "containers": [{ "name": "web", "image": "nginx:test1", "ports": [{ "containerPort": 80 }] }],
        },
    })
}

fn decode(base64: &str, file: &Path) -> Result<()> {
    let encoded = file.with_extension("base64");
    fs::write(&encoded, base64)?;
    let bytes = shell::bytes(Command::new("base64").arg("--decode").arg(&encoded))?;
    Ok(fs::write(file, bytes)?)
}
