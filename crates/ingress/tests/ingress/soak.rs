//! Routes and certificates change under load at every protocol, each with and without TLS. No request fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::proxy::{NGINX, wanted_changes};
use crate::rollouts::{KINDS, Way, ask, endpoint};
use crate::world::{PATIENCE, World, ingress};

/// The Ingress of a host with TLS, which plain requests may come to as well.
fn of_host(host: &str, name: &str, protocol: &str) -> String {
    let annotations = format!("{NGINX}/ssl-redirect: \"false\", {NGINX}/backend-protocol: {protocol}");
    let tls = format!("tls: [{{hosts: [{host}], secretName: cert-{name}}}], rules:");
    ingress(&annotations)
        .replace("shop.example", host)
        .replace("Ingress shop/web", &format!("Ingress shop/{name}"))
        .replace("rules:", &tls)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn changes_cost_no_protocol_a_request() {
    let hosts = [("plain.example", "plain", "HTTP"), ("grpc.example", "grpc", "GRPC")];
    let lines = hosts.map(|(host, name, protocol)| of_host(host, name, protocol));
    let mut world = World::start(&lines.each_ref().map(String::as_str), |_| {}).await;
    let (one, other) = (endpoint().await, endpoint().await);
    world.serve("web", &[one.0.address, other.0.address]);
    for (host, name, _) in hosts {
        world.secret(&format!("cert-{name}"), host);
    }
    let stop = Arc::new(AtomicBool::new(false));
    let done: [Arc<AtomicUsize>; 2 * KINDS] = std::array::from_fn(|_| Arc::default());
    let mut clients = JoinSet::new();
    for (at, done) in done.iter().enumerate() {
        let way = if at < KINDS { Way::Plain(world.http) } else { Way::Tls(world.https) };
        let (stop, done) = (stop.clone(), done.clone());
        clients.spawn(async move {
            let mut bad = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                match timeout(PATIENCE, ask(at % KINDS, way)).await {
                    Ok(Ok(())) => drop(done.fetch_add(1, Ordering::Relaxed)),
                    Ok(Err(problem)) => bad.push(format!("{at} over {way:?}: {problem}")),
                    Err(_) => bad.push(format!("{at} over {way:?} takes too long")),
                }
            }
            bad
        });
    }
    let wanted = wanted_changes();
    for change in 0..wanted {
        let (host, name, protocol) = hosts[change % 2];
        match change % 3 {
            // Another path beside the one that is asked for.
            0 => {
                let path = format!("path: /extra{change}, pathType: Exact");
                let extra = of_host(host, &format!("extra-{name}"), protocol);
                world.apply(&[&extra.replace("path: /, pathType: Prefix", &path).replace("cert-extra", "cert")]);
            }
            // Another certificate.
            1 => drop(world.secret(&format!("cert-{name}"), host)),
            // The route itself, treated otherwise.
            _ => {
                let timeout = format!("annotations: {{{NGINX}/proxy-read-timeout: \"{}\", ", 60 + change % 7);
                world.apply(&[&of_host(host, name, protocol).replace("annotations: {", &timeout)]);
            }
        }
        if change % 4 != 0 {
            continue;
        }
        // At the pace of the requests: somebody has come through since.
        let sum = || done.iter().map(|done| done.load(Ordering::Relaxed)).sum::<usize>();
        let before = sum();
        timeout(PATIENCE, async {
            while sum() == before {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        })
        .await
        .expect("requests go on");
    }
    // Every protocol has been through the last one.
    let before: Vec<usize> = done.iter().map(|done| done.load(Ordering::Relaxed)).collect();
    timeout(PATIENCE, async {
        while done.iter().zip(&before).any(|(done, before)| done.load(Ordering::Relaxed) < before + 2) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .expect("requests go on at every protocol");
    stop.store(true, Ordering::Relaxed);
    let mut bad = Vec::new();
    while let Some(found) = clients.join_next().await {
        bad.extend(found.expect("no panic"));
    }
    let done: Vec<usize> = done.iter().map(|done| done.load(Ordering::Relaxed)).collect();
    println!("{wanted} changes, {done:?} connections of 20 requests, or 5 echoes, each");
    assert!(bad.is_empty(), "{} failed after {wanted} changes: {bad:?}", bad.len());
    world.end().await;
}
