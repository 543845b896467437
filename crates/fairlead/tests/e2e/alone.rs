//! `fairlead proxy` in kube-proxy's place: the only proxy of every node, with the rights of `system:node-proxier` and no
//! others.

use std::process::{Child, Stdio};

use crate::cluster::{Cluster, kubectls};
use crate::death::{expect, until};

const NODES: u8 = 2;
const SECONDS: u32 = 60;
/// Longer than the test: the proxies end when it does.
const LIFE: u32 = 600;

/// Gives the pods of $kind $name the binary under test and the libraries it needs, from this machine: nobody has published an
/// image.
pub const MOUNT_BINARY: &str = r#"
    at=/spec/template/spec
    patch="[{\"op\": \"replace\", \"path\": \"$at/containers/0/image\", \"value\": \"busybox:test1\"},
        {\"op\": \"add\", \"path\": \"$at/containers/0/command\", \"value\": [\"$BINARY\"]}"
    for list in volumes containers/0/volumeMounts; do
        present=$(kubectl --namespace=kube-system get $kind $name -o jsonpath="{.spec.template.spec.$(echo $list | sed 's|/0/|[0].|')}")
        test -n "$present" || patch="$patch, {\"op\": \"add\", \"path\": \"$at/$list\", \"value\": []}"
    done
    number=0
    for directory in $(dirname $BINARY) $(ldd $BINARY | grep -o '/[^ ]*' | xargs -n 1 dirname | sort -u); do
        number=$((number + 1))
        patch="$patch,
        {\"op\": \"add\", \"path\": \"$at/volumes/-\",
            \"value\": {\"name\": \"test-$number\", \"hostPath\": {\"path\": \"$directory\"}}},
        {\"op\": \"add\", \"path\": \"$at/containers/0/volumeMounts/-\",
            \"value\": {\"name\": \"test-$number\", \"mountPath\": \"$directory\", \"readOnly\": true}}"
    done
    kubectl --namespace=kube-system patch $kind $name --type=json --patch="$patch]""#;

/// The manifest as it is, but for its image.
const DAEMONSET: &str = "set -e
    kubectl apply -f $EXAMPLES/proxy/daemonset.yaml
    kind=daemonset name=fairlead-service-proxy";
const ROLLED_OUT: &str =
    "kubectl --namespace=kube-system rollout status daemonset/fairlead-service-proxy --timeout=45s";

/// A kubeconfig of the manifest's service account that leads to the API server as nodes see it, and its configuration.
const KUBECONFIG: &str = r"set -e
    kubectl --namespace=kube-system get configmap fairlead-service-proxy -o jsonpath='{.data.config\.yaml}' > $TMP/proxy.yaml
    cp $KUBECONFIG $TMP/proxy.conf
    token=$(kubectl --namespace=kube-system create token fairlead-service-proxy)
    export KUBECONFIG=$TMP/proxy.conf
    kubectl config set-cluster fairlead --server=https://192.168.49.1:6443
    kubectl config unset users
    kubectl config set-credentials fairlead-user --token=$token";

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
    expect(cluster, "kubectl apply -f $EXAMPLES/nginx/");
    expect(cluster, "kubectl run asker --image=busybox:test1 -- sleep 3600");
    expect(cluster, "kubectl rollout status deployment/nginx-deployment --timeout=60s");
    expect(cluster, "kubectl wait --for=condition=Ready pod/asker --timeout=60s");
    let address = expect(cluster, "kubectl get service nginx-service -o jsonpath='{.spec.clusterIP}'");
    assert_eq!(asks(cluster, "node-1", &format!("http://{address}")), None, "no node has a proxy yet");

    // As pods of a DaemonSet; when it is deleted, what it has put into the kernel stays.
    let deploy = format!("{DAEMONSET}\n{MOUNT_BINARY}\n{ROLLED_OUT}");
    expect(cluster, &deploy.replace("$BINARY", env!("CARGO_BIN_EXE_fairlead")));
    serves_everything(cluster, &address);
    expect(cluster, "kubectl --namespace=kube-system delete daemonset fairlead-service-proxy");
    until("its pods have ended", || asks(cluster, "outside", "http://192.168.49.2:10256/livez").is_none());
    serves_everything(cluster, &address);

    // Its identity may do what it needs and nothing else.
    expect(cluster, KUBECONFIG);
    for (line, allowed) in [("list endpointslices -A", true), ("list secrets -A", false), ("create leases", false)] {
        let ask = "fairlead node exec --data-dir $DIR node-1 -- $(command -v kubectl) --kubeconfig=$TMP/proxy.conf auth can-i";
        let seen = cluster.run(&format!("{ask} {line}"), "", SECONDS);
        assert_eq!(seen.success, allowed, "{line}: {}", seen.output);
    }

    // By hand.
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
    expect(cluster, "sed -i 's/mode: nftables/mode: iptables/' $TMP/proxy.yaml");
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
    // What leads pods out of the node is not the proxy's, and neither is what announces addresses.
    let tables = list("nft list tables");
    let of_others = ["inet fairlead-pods", "netdev fairlead-layer2", "ip fairlead-moved", "ip6 fairlead-moved"];
    let is_left = |line: &&str| line.contains("fairlead") && !of_others.contains(&line.trim_start_matches("table "));
    assert_eq!(tables.lines().filter(is_left).collect::<Vec<_>>(), Vec::<&str>::new());
    assert_eq!(asks(cluster, "node-1", &format!("http://{address}")), None);

    // Without rights it says which, and whom to ask.
    expect(cluster, "kubectl delete clusterrolebinding fairlead-service-proxy");
    let line = "fairlead node exec --data-dir $DIR node-1 -- $(command -v fairlead) proxy --kubeconfig $TMP/proxy.conf \
                --hostname-override node-1 --metrics-bind-address= --healthz-port=0";
    let seen = cluster.run(line, "", SECONDS);
    assert!(
        !seen.success && seen.output.contains("services") && seen.output.contains("system:node-proxier"),
        "{}",
        seen.output
    );
}
