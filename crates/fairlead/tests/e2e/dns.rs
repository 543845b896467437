//! Cluster DNS as pods ask it, on every node and by its node's own address; alone, with its own rights; and while the API is
//! gone.

use std::fmt::Write as _;

use crate::alone::MOUNT_BINARY;
use crate::cluster::{Cluster, kubectls};
use crate::death::{expect, pid_of, signal, until};

const NODES: u8 = 2;
const SERVICES: usize = 20;
const SECONDS: u32 = 120;
const LOCAL: &str = "169.254.20.10";

/// A type, a name and what the answer has to hold, one a line: asked one after the other, and what differs is printed.
const ASK: &str = r#"while read type name want; do
        answer=$(nslookup -type=$type $name $SERVER 2>&1)
        case "$answer" in *"$want"*) ;; *) echo "$type $name: wanted $want, got $answer";; esac
    done"#;

fn services() -> String {
    let mut text = String::new();
    for number in 1..=SERVICES {
        let _ = write!(
            text,
            "---\napiVersion: v1\nkind: Service\nmetadata: {{name: asked-{number}}}\nspec:\n  ipFamilyPolicy: RequireDualStack\n  \
             ports: [{{name: http, port: 80}}]\n  selector: {{app: nobody}}\n"
        );
    }
    text
}

/// 100 questions: five of each Service.
fn questions(cluster: &Cluster) -> String {
    let path = "{range .items[*]}{.metadata.name} {.spec.clusterIPs[*]}{\"\\n\"}{end}";
    let listed = expect(cluster, &format!("kubectl get services -o jsonpath='{path}'"));
    let mut lines = String::new();
    for line in listed.lines().filter(|line| line.starts_with("asked-")) {
        let line = line.replace(['[', ']', '"', ','], " ");
        let words: Vec<&str> = line.split_whitespace().collect();
        let [name, v4, v6] = words[..] else { panic!("a name and two addresses: {line:?}") };
        let full = format!("{name}.default.svc.cluster.local");
        let reversed = v4.split('.').rev().collect::<Vec<_>>().join(".");
        let _ = writeln!(lines, "a {full} {v4}\naaaa {full} {v6}\nsrv _http._tcp.{full} {full}");
        let _ = writeln!(lines, "ptr {reversed}.in-addr.arpa {full}\na not-{full} NXDOMAIN");
    }
    assert_eq!(lines.lines().count(), 100);
    lines
}

/// Asks from a pod; whatever is printed differs.
fn ask(cluster: &Cluster, pod: &str, server: &str, questions: &str) {
    let line = format!("kubectl exec -i {pod} -- sh -c '{}'", ASK.replace("$SERVER", server));
    let seen = cluster.run(&line, questions, SECONDS);
    assert!(seen.success && seen.output.trim().is_empty(), "from {pod} at {server:?}:\n{}", seen.output);
}

#[test]
fn pods_of_every_node_are_answered() {
    let cluster = Cluster::up_with(&kubectls()[0], NODES, &["--dns-local-address", LOCAL]);
    let cluster = &cluster;
    assert!(cluster.run("kubectl apply -f -", &services(), SECONDS).success);
    for node in 1..=NODES {
        let place = format!("{{\"spec\":{{\"nodeName\":\"node-{node}\"}}}}");
        expect(cluster, &format!("kubectl run asker-{node} --image=busybox:test1 --overrides='{place}' -- sleep 3600"));
    }
    expect(cluster, "kubectl wait --for=condition=Ready pod/asker-1 pod/asker-2 --timeout=60s");
    let questions = questions(cluster);
    for pod in ["asker-1", "asker-2"] {
        let conf = expect(cluster, &format!("kubectl exec {pod} -- cat /etc/resolv.conf"));
        let servers: Vec<&str> = conf.lines().filter_map(|line| line.strip_prefix("nameserver ")).collect();
        assert_eq!(servers[..2], [LOCAL, "10.96.0.10"], "{conf}");
        for server in [LOCAL, "10.96.0.10"] {
            ask(cluster, pod, server, &questions);
        }
    }

    // Alone, by the manifest, with its own rights.
    let deploy = format!(
        "set -e\nkubectl apply -f $EXAMPLES/dns/dns.yaml\nkind=deployment name=fairlead-cluster-dns\n{MOUNT_BINARY}\n\
         kubectl --namespace=kube-system rollout status deployment/fairlead-cluster-dns --timeout=60s"
    );
    expect(cluster, &deploy.replace("$BINARY", env!("CARGO_BIN_EXE_fairlead")));
    let address = "kubectl --namespace=kube-system get service fairlead-cluster-dns -o jsonpath='{.spec.clusterIP}'";
    let address = expect(cluster, address);
    ask(cluster, "asker-1", &address, &questions);
    let account = "system:serviceaccount:kube-system:fairlead-cluster-dns";
    for (line, allowed) in [
        ("watch services -A", true),
        ("watch endpointslices -A", true),
        ("list namespaces", true),
        ("list pods -A", false),
        ("list secrets -A", false),
        ("create services", false),
    ] {
        let seen = cluster.run(&format!("kubectl auth can-i --as={account} {line}"), "", SECONDS);
        assert_eq!(seen.success, allowed, "{line}: {}", seen.output);
    }

    // The API is gone: names stay, and a metric says so.
    let metrics = |part: &str| {
        let line = "fairlead node exec --data-dir $DIR node-1 -- curl -s --max-time 3 http://192.168.49.2:9153/metrics";
        expect(cluster, line).lines().any(|line| line == part)
    };
    assert!(metrics("fairlead_dns_api_connected 1"));
    let server = pid_of(cluster, "control plane");
    signal("KILL", &[server]);
    until("the outage is told of", || metrics("fairlead_dns_api_connected 0"));
    let line =
        format!("fairlead node exec --data-dir $DIR node-1 -- dig +short @{LOCAL} asked-1.default.svc.cluster.local");
    let want = questions.lines().next().and_then(|line| line.split(' ').nth(2)).expect("an address");
    assert_eq!(expect(cluster, &line).trim(), want);
    cluster.start(NODES);
    until("the API is back", || metrics("fairlead_dns_api_connected 1"));
}

#[test]
fn flags_that_cannot_be_meant_are_refused() {
    let cluster = Cluster::new(&kubectls()[0]);
    for (flags, part) in [
        ("--listen 127.0.0.1", "invalid socket address"),
        ("--kubeconfig /nowhere", "/nowhere"),
        ("--dns-upstream nowhere", "by address"),
        ("--dns-upstream-ca /dev/null", "there is none"),
        ("--dns-hosts /nowhere", "/nowhere"),
        ("--listen 127.0.0.1:0 --metrics-bind-address 127.0.0.1:0", "there is no --kubeconfig, and this is no pod"),
    ] {
        let seen = cluster.run(&format!("fairlead dns {flags}"), "", SECONDS);
        assert!(!seen.success && seen.output.contains(part), "{flags}: {}", seen.output);
    }
}
