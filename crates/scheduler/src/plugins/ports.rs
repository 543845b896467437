//! Two pods of a node cannot have the same port of the node.

use super::{Filter, Judge};
use crate::objects::{ContainerPort, Pod};
use crate::snapshot::Snapshot;

pub struct Free;

impl Filter for Free {
    fn judge<'a>(&self, pod: &'a Pod, _: &'a Snapshot) -> Judge<'a> {
        let wanted: Vec<_> = pod.host_ports().collect();
        Box::new(move |node| {
            let mut taken = node.pods.values().flat_map(|p| p.host_ports());
            if !wanted.is_empty() && taken.any(|t| wanted.iter().any(|w| collide(w, t))) {
                return Err(vec!["node(s) didn't have free ports for the requested pod ports".into()]);
            }
            Ok(())
        })
    }
}

fn collide(a: &ContainerPort, b: &ContainerPort) -> bool {
    let is_any = |ip: &str| matches!(ip, "" | "0.0.0.0" | "::");
    let protocol = |p: &ContainerPort| if p.protocol.is_empty() { "TCP".to_string() } else { p.protocol.clone() };
    a.host_port == b.host_port
        && protocol(a) == protocol(b)
        && (is_any(&a.host_ip) || is_any(&b.host_ip) || a.host_ip == b.host_ip)
}
