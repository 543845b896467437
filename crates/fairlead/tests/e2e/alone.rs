//! `fairlead proxy` in kube-proxy's place: the only proxy of every node, with the rights of `system:node-proxier` and no
//! others.

use std::process::{Child, Stdio};

use crate::cluster::{Cluster, kubectls};
use crate::death::{expect, until};

const NODES: u8 = 2;
const SECONDS: u32 = 60;
/// Longer than the test: the proxies end when it does.
const LIFE: u32 = 600;

/// A kubeconfig for the proxy's service account, which leads to the API server as nodes see it.
const KUBECONFIG: &str = "set -e
    kubectl --namespace=kube-system create serviceaccount kube-proxy
    kubectl create clusterrolebinding kube-proxy --clusterrole=system:node-proxier --serviceaccount=kube-system:kube-proxy
    cp $KUBECONFIG $TMP/proxy.conf
    token=$(kubectl --namespace=kube-system create token kube-proxy)
    export KUBECONFIG=$TMP/proxy.conf
    kubectl config set-cluster fairlead --server=https://192.168.49.1:6443
    kubectl config unset users
    kubectl config set-credentials fairlead-user --token=$token";

/// What a person would put into the ConfigMap of the DaemonSet.
const CONFIGURATION: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: MODE
clusterCIDR: 10.244.0.0/16,fd00:10:244::/56
nodePortAddresses: [192.168.49.0/24, fd00:c0a8:31::/64]
metricsBindAddress: 0.0.0.0:10249
bindAddressHardFail: true
oomScoreAdj: 0
";

/// A proxy in a node; gone when dropped, its rules not.
struct Proxy(Child);

impl Proxy {
    fn start(cluster: &Cluster, node: &str) -> Self {
        let line = format!(
            "exec fairlead node exec --data-dir $DIR {node} -- $(command -v fairlead) proxy --kubeconfig $TMP/proxy.conf \
             --config $TMP/proxy.yaml --hostname-override {node} 2>> $TMP/proxy-{node}.log"
        );
        let mut command = cluster.shell(&line, LIFE);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().expect("a proxy can be started");
        Proxy(child)
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        // `timeout`, which is what was started, hands the signal on to all of its group.
        let pid = self.0.id().to_string();
        if !std::process::Command::new("kill").arg(pid).status().is_ok_and(|done| done.success()) {
            eprintln!("a proxy had ended before it was told to");
        }
        if let Err(error) = self.0.wait() {
            eprintln!("a proxy cannot be waited for: {error}");
        }
    }
}

fn asks(cluster: &Cluster, place: &str, url: &str) -> Option<String> {
    let line = format!("fairlead node exec --data-dir $DIR {place} -- curl -sSk --max-time 3 --include {url}");
    let seen = cluster.run(&line, "", SECONDS);
    seen.success.then_some(seen.output)
}

fn has(cluster: &Cluster, place: &str, url: &str, part: &str) -> bool {
    asks(cluster, place, url).is_some_and(|answer| answer.contains(part))
}

fn configure(cluster: &Cluster, mode: &str) {
    let text = CONFIGURATION.replace("MODE", mode);
    assert!(cluster.run("cat > $TMP/proxy.yaml", &text, SECONDS).success);
}

/// The rules of node-1, without what packets change.
fn rules(cluster: &Cluster) -> String {
    let list = "fairlead node exec --data-dir $DIR node-1 -- nft list table inet fairlead | grep -v expires";
    expect(cluster, list)
}

fn serves_everything(cluster: &Cluster, address: &str) {
    for node in ["192.168.49.2", "192.168.49.3"] {
        until("node ports answer", || has(cluster, "outside", &format!("http://{node}:30007"), "nginx:test1 on "));
    }
    for node in ["node-1", "node-2"] {
        until("cluster IPs answer", || has(cluster, node, &format!("http://{address}"), "nginx:test1 on "));
    }
    // Names and the API server are Services, too.
    expect(cluster, "kubectl exec asker -- wget -q -O - http://nginx-service.default");
    assert!(has(cluster, "node-1", "https://10.96.0.1/livez", "HTTP/"));
}

#[test]
fn a_proxy_alone_serves_a_cluster_with_the_rights_of_kube_proxy() {
    let cluster = Cluster::up_with(&kubectls()[0], NODES, &["--proxy-mode", "none"]);
    let cluster = &cluster;
    expect(cluster, KUBECONFIG);
    expect(cluster, "kubectl apply -f $EXAMPLES/nginx/");
    expect(cluster, "kubectl run asker --image=busybox:test1 -- sleep 3600");
    expect(cluster, "kubectl rollout status deployment/nginx-deployment --timeout=60s");
    expect(cluster, "kubectl wait --for=condition=Ready pod/asker --timeout=60s");
    let address = expect(cluster, "kubectl get service nginx-service -o jsonpath='{.spec.clusterIP}'");
    assert_eq!(asks(cluster, "node-1", &format!("http://{address}")), None, "no node has a proxy yet");
    // Its identity may do what it needs and nothing else.
    for (line, allowed) in [("list endpointslices -A", true), ("list secrets -A", false), ("create leases", false)] {
        let ask = "fairlead node exec --data-dir $DIR node-1 -- $(command -v kubectl) --kubeconfig=$TMP/proxy.conf auth can-i";
        let seen = cluster.run(&format!("{ask} {line}"), "", SECONDS);
        assert_eq!(seen.success, allowed, "{line}: {}", seen.output);
    }

    configure(cluster, "nftables");
    let first = Proxy::start(cluster, "node-1");
    let _second = Proxy::start(cluster, "node-2");
    serves_everything(cluster, &address);
    let node = "http://192.168.49.2";
    let health = |part| has(cluster, "outside", &format!("{node}:10256/healthz"), part);
    assert!(health("200 OK") && health("\"nodeEligible\":true"));
    assert!(has(cluster, "outside", &format!("{node}:10249/proxyMode"), "nftables"));
    let metrics = asks(cluster, "outside", &format!("{node}:10249/metrics")).expect("metrics");
    for part in [
        "kubeproxy_sync_proxy_rules_duration_seconds_count",
        "rest_client_requests_total{code=\"200\"",
        "_healthz_total{code=\"200\"} ",
    ] {
        assert!(metrics.contains(part), "{part} is not in\n{metrics}");
    }
    assert!(!metrics.contains("code=\"403\""), "it asked for more than it may:\n{metrics}");

    // An autoscaler is about to remove the node: load balancers turn away, the kubelet does not restart the proxy.
    expect(cluster, "kubectl taint node node-1 ToBeDeletedByClusterAutoscaler=now:NoSchedule");
    until("the taint is seen", || health("503 Service Unavailable"));
    assert!(has(cluster, "outside", &format!("{node}:10256/livez"), "200 OK"));
    expect(cluster, "kubectl taint node node-1 ToBeDeletedByClusterAutoscaler-");
    until("the taint is gone", || health("200 OK"));

    // It ends, its rules stay, and the next start changes none of them.
    let before = rules(cluster);
    drop(first);
    until("the proxy has ended", || asks(cluster, "outside", &format!("{node}:10256/livez")).is_none());
    assert_eq!(rules(cluster), before);
    serves_everything(cluster, &address);
    let first = Proxy::start(cluster, "node-1");
    until("it is back", || health("200 OK"));
    assert_eq!(rules(cluster), before);

    // A load balancer learns which node has an endpoint.
    expect(cluster, "kubectl expose pod asker --name=balanced --type=LoadBalancer --port=80");
    expect(cluster, "kubectl patch service balanced -p '{\"spec\":{\"externalTrafficPolicy\":\"Local\"}}'");
    let port = expect(cluster, "kubectl get service balanced -o jsonpath='{.spec.healthCheckNodePort}'");
    let home = expect(cluster, "kubectl get pod asker -o jsonpath='{.status.hostIP}'");
    for node in ["192.168.49.2", "192.168.49.3"] {
        let expected = if node == home { "weight: 1" } else { "503 Service Unavailable" };
        until("the health check answers", || has(cluster, "outside", &format!("http://{node}:{port}/"), expected));
    }
    expect(cluster, "kubectl delete service balanced");

    // Another mode, and then nothing at all.
    drop(first);
    until("the proxy has ended", || asks(cluster, "outside", &format!("{node}:10256/livez")).is_none());
    configure(cluster, "iptables");
    let first = Proxy::start(cluster, "node-1");
    until("it is back", || health("200 OK"));
    serves_everything(cluster, &address);
    let list = |what: &str| expect(cluster, &format!("fairlead node exec --data-dir $DIR node-1 -- {what}"));
    assert!(!list("nft list tables").lines().any(|line| line == "table inet fairlead"));
    drop(first);
    until("the proxy has ended", || asks(cluster, "outside", &format!("{node}:10256/livez")).is_none());
    list("$(command -v fairlead) proxy --cleanup");
    let left = list("iptables-save");
    assert!(!left.contains("KUBE-SVC") && !left.contains("KUBE-SERVICES"), "{left}");
    assert_eq!(asks(cluster, "node-1", &format!("http://{address}")), None);

    // Without rights it says which, and whom to ask.
    expect(cluster, "kubectl delete clusterrolebinding kube-proxy");
    let line = "fairlead node exec --data-dir $DIR node-1 -- $(command -v fairlead) proxy --kubeconfig $TMP/proxy.conf \
                --hostname-override node-1 --metrics-bind-address= --healthz-port=0";
    let seen = cluster.run(line, "", SECONDS);
    assert!(
        !seen.success && seen.output.contains("services") && seen.output.contains("system:node-proxier"),
        "{}",
        seen.output
    );
}
