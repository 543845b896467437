//! The story in its order: images, nodes, objects, packets.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::{Options, balancer, ingress, names, rules, traffic};
use crate::cluster::Cluster;
use crate::{image, shell};

const NAME: &str = "http://nginx-service.default.svc.cluster.local";
const NODE_PORT: u16 = 30007;
const REPLICAS: usize = 2;

pub fn tell(cluster: &Cluster, options: &Options) -> Result<()> {
    println!("== images");
    image::run(&[])?;

    println!("\n== {}", if options.standalone { "hosts: one server, an agent on each" } else { "up" });
    let flags = [&["--proxy-mode".to_owned(), options.proxy_mode.clone()], options.up.as_slice()].concat();
    cluster.start(options.nodes, &flags)?;
    for name in ["nginx:test1", "nginx:test2", "busybox:test1"] {
        cluster.import(&image::archive_path(name)?, options.nodes)?;
    }

    println!("\n== apply");
    let examples = shell::root().join("examples/nginx");
    for file in ["deployment.yaml", "service.yaml"] {
        let file = examples.join(file);
        shell::step(&mut cluster.kubectl(&["apply", "-f", &file.to_string_lossy()]))?;
    }
    let pods = ready_pods(cluster)?;
    for words in [&["get", "nodes", "-o", "wide"][..], &["get", "pods", "-o", "wide"], &["get", "services"]] {
        shell::step(&mut cluster.kubectl(words))?;
    }
    shell::step(&mut cluster.kubectl(&["get", "endpoints", "nginx-service"]))?;
    shell::step(&mut cluster.kubectl(&["get", "endpointslices", "-l", "kubernetes.io/service-name=nginx-service"]))?;

    println!("\n== packets: {} requests on each way in, one connection each", traffic::REQUESTS);
    let service = cluster.get(&["service", "nginx-service"])?;
    let cluster_ip = text(&service, "/spec/clusterIP")?;
    let dns = cluster.get(&["service", "kube-dns", "-n", "kube-system"])?;
    ways_in(cluster, options, &pods, cluster_ip, text(&dns, "/spec/clusterIP")?)?;

    if cluster.has_kubectl() {
        println!("\n== names, asked for by a pod");
        names::ask(cluster)?;
    }

    // Hosts that are joined by hand serve Ingresses only when somebody labels them for it.
    if !options.standalone {
        println!("\n== an Ingress: a host, two paths and TLS");
        ingress::ask(cluster, options)?;
    }

    // Clusters of hosts begin without a pool of addresses.
    let mut balanced = None;
    if !options.standalone {
        println!("\n== an address of its own");
        balanced = Some(balancer::ask(cluster, &pods.names)?);
    }

    println!("\n== the rules on node-1 that carry these packets ({})", options.proxy_mode);
    let words: Vec<String> = [cluster_ip.to_owned(), NODE_PORT.to_string()].into_iter().chain(pods.ips).collect();
    rules::show(cluster, &options.proxy_mode, &words)?;

    if let Some(address) = balanced {
        println!("\n== the node that announces {address} dies");
        balancer::kill(cluster, &address)?;
    }
    Ok(())
}

struct Pods {
    names: BTreeSet<String>,
    ips: Vec<String>,
}

fn ready_pods(cluster: &Cluster) -> Result<Pods> {
    if cluster.has_kubectl() {
        let mut wait = cluster.kubectl(&["rollout", "status", "deployment/nginx-deployment", "--timeout=120s"]);
        shell::step(&mut wait)?;
    } else {
        shell::until("both pods are ready", || {
            let deployment = cluster.get(&["deployment", "nginx-deployment"])?;
            Ok(deployment.pointer("/status/readyReplicas") == Some(&Value::from(REPLICAS)))
        })?;
    }
    let list = cluster.get(&["pods", "-l", "app=nginx"])?;
    let items = list["items"].as_array().context("the pod list has no items")?;
    let mut pods = Pods { names: BTreeSet::new(), ips: Vec::new() };
    for pod in items.iter().filter(|pod| pod.pointer("/metadata/deletionTimestamp").is_none()) {
        pods.names.insert(text(pod, "/metadata/name")?.to_owned());
        pods.ips.push(text(pod, "/status/podIP")?.to_owned());
    }
    if pods.names.len() != REPLICAS {
        bail!("{} pods are there instead of {REPLICAS}: {:?}", pods.names.len(), pods.names);
    }
    Ok(pods)
}

fn ways_in(cluster: &Cluster, options: &Options, pods: &Pods, cluster_ip: &str, dns_ip: &str) -> Result<()> {
    let address = format!("http://{cluster_ip}");
    let resolv = resolv_conf(&options.data_dir, dns_ip)?;
    traffic::count("node-1 -> cluster IP", &pods.names, cluster.on("node-1", &traffic::curl(&address)))?;
    let by_name = traffic::curl_with_resolv_conf(&resolv, NAME);
    traffic::count("node-1 -> DNS name", &pods.names, cluster.on("node-1", &by_name))?;

    if cluster.has_kubectl() {
        for (way, url) in [("a pod -> cluster IP", address.as_str()), ("a pod -> DNS name", NAME)] {
            let script = traffic::wget_script(url);
            let exec = cluster.kubectl(&["exec", "deploy/nginx-deployment", "--", "sh", "-c", &script]);
            traffic::count(way, &pods.names, exec)?;
        }
    } else {
        println!("  (a pod's own requests need `kubectl exec`, and there is no kubectl on this machine)");
    }

    let nodes = cluster.get(&["nodes"])?;
    for node in nodes["items"].as_array().context("the node list has no items")? {
        let name = text(node, "/metadata/name")?;
        let url = format!("http://{}:{NODE_PORT}", internal_ipv4(node).with_context(|| format!("{name} has no IPv4"))?);
        let way = format!("outside -> {name}:{NODE_PORT}");
        traffic::count(&way, &pods.names, cluster.on("outside", &traffic::curl(&url)))?;
    }
    Ok(())
}

/// A node resolves names as its host does; this is the file that points one command at cluster DNS.
fn resolv_conf(data_dir: &Path, dns_ip: &str) -> Result<String> {
    let file = data_dir.join("demo-resolv.conf");
    fs::write(&file, format!("nameserver {dns_ip}\n"))?;
    Ok(file.to_string_lossy().into_owned())
}

pub fn internal_ipv4(node: &Value) -> Option<&str> {
    let addresses = node.pointer("/status/addresses")?.as_array()?;
    let internal = addresses.iter().filter(|address| address["type"] == "InternalIP");
    internal.filter_map(|address| address["address"].as_str()).find(|ip| ip.contains('.'))
}

pub fn text<'a>(value: &'a Value, pointer: &str) -> Result<&'a str> {
    value
        .pointer(pointer)
        .and_then(Value::as_str)
        .with_context(|| format!("no {pointer} in {}", value["metadata"]["name"]))
}
