//! From outside through an Ingress: a host, two paths and TLS, at the node ports of the Service `fairlead-ingress`.

use std::fs;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};
use serde_json::json;

use super::Options;
use super::story::{internal_ipv4, text};
use crate::cluster::Cluster;
use crate::shell;

const HOST: &str = "shop.example";
/// Each path, and what the pods behind it say.
const PATHS: [(&str, &str); 2] = [("/", "nginx:test1 on "), ("/second/page", "nginx:test2 on ")];
const REQUESTS: usize = 50;

pub fn ask(cluster: &Cluster, options: &Options) -> Result<()> {
    let dir = &options.data_dir;
    let (certificate, key) = (dir.join("demo-shop.crt"), dir.join("demo-shop.key"));
    let mut make = Command::new("openssl");
    make.args(["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]);
    make.args(["-subj", &format!("/CN={HOST}"), "-addext", &format!("subjectAltName=DNS:{HOST}")]);
    make.arg("-out").arg(&certificate).arg("-keyout").arg(&key);
    shell::output(&mut make)?;
    let secret = json!({"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls", "metadata": {"name": "shop", "namespace": "default"},
        "stringData": {"tls.crt": fs::read_to_string(&certificate)?, "tls.key": fs::read_to_string(&key)?}});
    let file = dir.join("demo-shop.json");
    fs::write(&file, secret.to_string())?;
    shell::step(&mut cluster.kubectl(&["apply", "-f", &file.to_string_lossy()]))?;
    let example = shell::root().join("examples/more/ingress.yaml");
    shell::step(&mut cluster.kubectl(&["apply", "-f", &example.to_string_lossy()]))?;

    let service = cluster.get(&["service", "fairlead-ingress", "-n", "kube-system"])?;
    let ports = service["spec"]["ports"].as_array().context("fairlead-ingress has no ports")?;
    let https = ports.iter().find(|port| port["name"] == "https").context("fairlead-ingress has no port https")?;
    let port = https["nodePort"].as_u64().context("fairlead-ingress has no node port")?;
    let nodes = cluster.get(&["nodes"])?;
    for node in nodes["items"].as_array().context("the node list has no items")? {
        let name = text(node, "/metadata/name")?;
        let ip = internal_ipv4(node).with_context(|| format!("{name} has no IPv4"))?;
        for (path, image) in PATHS {
            let curl = |count: usize| -> Result<(bool, String)> {
                let url = format!("https://{HOST}:{port}{path}?[1-{count}]");
                let resolve = format!("{HOST}:{port}:{ip}");
                let authority = certificate.to_string_lossy();
                let words =
                    ["curl", "-sS", "--fail", "--max-time", "30", "--cacert", &authority, "--resolve", &resolve, &url];
                let done = cluster.on("outside", &words).stdin(Stdio::null()).output().context("cannot run curl")?;
                let text = String::from_utf8_lossy(if done.status.success() { &done.stdout } else { &done.stderr });
                Ok((done.status.success(), text.into_owned()))
            };
            // Its pods may have to start.
            shell::until(&format!("{name} answers {path}"), || Ok(curl(1)?.0))?;
            let (succeeded, pages) = curl(REQUESTS)?;
            let answers = pages.lines().filter(|line| line.starts_with(image)).count();
            let way = format!("outside -> {name}, {path}");
            println!("  {way:<34}{answers} of {REQUESTS} from {}", image.trim_end_matches(" on "));
            if !succeeded || answers != REQUESTS {
                bail!("{way}: {answers} answers of {image:?} to {REQUESTS} requests: {pages}");
            }
        }
    }
    shell::step(&mut cluster.kubectl(&["get", "ingress"]))
}
