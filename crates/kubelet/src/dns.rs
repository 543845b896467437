//! A pod's resolv.conf and /etc/hosts. Pure.

use std::net::IpAddr;

use runtime::DnsConfig;

use crate::pod::Pod;

/// The cluster's side of name resolution.
#[derive(Debug, Clone, Default)]
pub struct ClusterDns {
    pub servers: Vec<IpAddr>,
    /// `cluster.local`
    pub domain: String,
}

/// What the pod's dnsPolicy makes of the cluster's and the node's name servers.
pub fn pod_dns(pod: &Pod, cluster: &ClusterDns, node: &DnsConfig) -> DnsConfig {
    let policy = match pod.spec.dns_policy.as_str() {
        // On the node's network, ClusterFirst means the node's.
        "ClusterFirst" | "" if pod.spec.host_network => "Default",
        "" => "ClusterFirst",
        "ClusterFirstWithHostNet" => "ClusterFirst",
        other => other,
    };
    let mut dns = match policy {
        "None" => DnsConfig::default(),
        "ClusterFirst" if !cluster.servers.is_empty() => {
            let domain = &cluster.domain;
            let mut searches =
                vec![format!("{}.svc.{domain}", pod.metadata.namespace), format!("svc.{domain}"), domain.clone()];
            searches.extend(node.searches.iter().filter(|s| *s != ".").cloned());
            DnsConfig {
                servers: cluster.servers.iter().map(IpAddr::to_string).collect(),
                searches,
                options: vec!["ndots:5".to_owned()],
            }
        }
        _ => node.clone(),
    };
    let extra = &pod.spec.dns_config;
    let add = |list: &mut Vec<String>, more: &[String]| {
        for item in more {
            if !list.contains(item) {
                list.push(item.clone());
            }
        }
    };
    add(&mut dns.servers, &extra.nameservers);
    add(&mut dns.searches, &extra.searches);
    for option in &extra.options {
        let written = match &option.value {
            Some(value) => format!("{}:{value}", option.name),
            None => option.name.clone(),
        };
        dns.options.retain(|o| o.split(':').next() != Some(&option.name));
        dns.options.push(written);
    }
    // What a resolver reads at most.
    dns.servers.truncate(3);
    dns.searches.truncate(32);
    dns
}

/// The lines of a resolv.conf that pods inherit.
pub fn parse_resolv_conf(text: &str) -> DnsConfig {
    let mut dns = DnsConfig::default();
    for line in text.lines() {
        let mut words = line.split_whitespace();
        match words.next() {
            Some("nameserver") => dns.servers.extend(words.next().map(str::to_owned)),
            Some("search") => dns.searches = words.map(str::to_owned).collect(),
            Some("options") => dns.options = words.map(str::to_owned).collect(),
            _ => {}
        }
    }
    dns
}

/// The file that is mounted at /etc/hosts. `node` is the node's own file, for pods on its network.
pub fn hosts_file(pod: &Pod, ips: &[IpAddr], domain: &str, node: Option<&str>) -> String {
    let mut text = match node {
        Some(node) => format!("# Kubernetes-managed hosts file (host network).\n{node}"),
        None => {
            let mut text = "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost \
                            ip6-loopback\nfe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\n\
                            fe00::2\tip6-allrouters\n"
                .to_owned();
            let host = pod.hostname();
            for ip in ips {
                text.push_str(&match pod.spec.subdomain.as_str() {
                    "" => format!("{ip}\t{host}\n"),
                    sub => format!("{ip}\t{host}.{sub}.{}.svc.{domain}\t{host}\n", pod.metadata.namespace),
                });
            }
            text
        }
    };
    if !pod.spec.host_aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
        for alias in &pod.spec.host_aliases {
            text.push_str(&format!("{}\t{}\n", alias.ip, alias.hostnames.join("\t")));
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn each_policy_has_its_servers_and_searches() {
        let cluster = ClusterDns { servers: vec![[10, 96, 0, 10].into()], domain: "cluster.local".into() };
        let node = parse_resolv_conf("# x\nnameserver 192.0.2.1\nsearch example.com\noptions timeout:1\n");
        for (spec, expected) in [
            (json!({}), "10.96.0.10 | web.svc.cluster.local svc.cluster.local cluster.local example.com | ndots:5"),
            (json!({"hostNetwork": true, "dnsPolicy": "ClusterFirst"}), "192.0.2.1 | example.com | timeout:1"),
            (
                json!({"hostNetwork": true, "dnsPolicy": "ClusterFirstWithHostNet"}),
                "10.96.0.10 | web.svc.cluster.local svc.cluster.local cluster.local example.com | ndots:5",
            ),
            (json!({"dnsPolicy": "Default"}), "192.0.2.1 | example.com | timeout:1"),
            (
                json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["1.1.1.1"], "searches": ["a"],
                       "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]}}),
                "1.1.1.1 | a | ndots:2 edns0",
            ),
        ] {
            let pod: Pod =
                serde_json::from_value(json!({"metadata": {"namespace": "web"}, "spec": spec})).expect("pod");
            let dns = pod_dns(&pod, &cluster, &node);
            let text = format!("{} | {} | {}", dns.servers.join(" "), dns.searches.join(" "), dns.options.join(" "));
            assert_eq!(text, expected);
        }
    }
}
