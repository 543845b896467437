//! A rolling update under load fails no request, although the containers end at once when they are told to.

use std::time::Instant;

use lab::Lab;

use crate::cluster::{Cluster, kubectls};
use crate::load::{Load, Manner};
use crate::many_cases;

const NODES: u8 = 2;
const SECONDS: u32 = 120;
/// nginx ends at once on SIGTERM, in the middle of an answer too, and answers in one write.
const WEB: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 6
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      containers:
        - name: nginx
          image: nginx:test1
          ports: [{containerPort: 80}]
          readinessProbe: {httpGet: {path: /, port: 80}, periodSeconds: 1}
---
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  selector: {app: web}
  ports: [{port: 80, nodePort: 30011}]
"#;

#[test]
fn a_rolling_update_fails_no_request_with_nftables() {
    rolling_update("nftables", &[]);
}

#[test]
fn a_rolling_update_fails_no_request_with_iptables() {
    rolling_update("iptables", &[]);
}

#[test]
fn a_rolling_update_fails_no_request_with_userspace() {
    rolling_update("userspace", &[]);
}

#[test]
fn a_rolling_update_fails_no_request_with_ebpf() {
    rolling_update("ebpf", &[]);
}

#[test]
fn a_rolling_update_fails_no_request_while_the_mode_changes_twice() {
    rolling_update("nftables", &["iptables", "nftables"]);
}

#[test]
fn a_rolling_update_fails_no_request_while_relays_take_over_and_give_back() {
    rolling_update("iptables", &["userspace", "iptables"]);
}

#[test]
fn a_rolling_update_fails_no_request_while_ebpf_takes_over_and_gives_back() {
    rolling_update("nftables", &["ebpf", "nftables"]);
}

/// The modes that follow are those that every node changes to while its pods are replaced.
fn rolling_update(mode: &str, then: &[&str]) {
    let cluster = Cluster::up_with(&kubectls()[0], NODES, &["--proxy-mode", mode]);
    let expect = |line: &str, input: &str| {
        let seen = cluster.run(line, input, SECONDS);
        assert!(seen.success, "{mode}: {line}\n{}", seen.output);
        seen.output
    };
    expect("kubectl apply -f -", WEB);
    expect("kubectl rollout status deployment/web --timeout=60s", "");
    let service = expect("kubectl get service web -o jsonpath='{.spec.clusterIP}'", "");
    let service = format!("{}:80", service.trim()).parse().expect("an address");

    // Eight clients: two manners, from outside through each node and on each node to the cluster IP.
    let per_second = if many_cases() { 62 } else { 20 };
    let id = lab::id_of(cluster.data_dir().as_ref()).expect("the cluster has an id");
    let lab = Lab::open(&id).expect("the cluster is a lab");
    let mut load = Load::start();
    for manner in [Manner::Fresh, Manner::KeepAlive] {
        for node in lab.nodes() {
            let port = format!("{}:30011", node.addresses()[0]).parse().expect("an address");
            load.add(lab.outside().expect("the outside is there"), port, manner, per_second);
            load.add_on(&cluster, &node.name, service, manner, per_second);
        }
    }
    expect("kubectl annotate service web fairlead.io/end-policy=sometimes", "");
    let begun = Instant::now();
    let before = expect("kubectl get pods -l app=web -o name", "");
    for round in 0..if many_cases() { 10 } else { 1 } {
        // `kubectl rollout restart` would refuse a second time within a second.
        let template =
            format!(r#"{{"spec": {{"template": {{"metadata": {{"annotations": {{"round": "{round}"}}}}}}}}}}"#);
        expect(&format!("kubectl patch deployment web -p '{template}'"), "");
        for next in then {
            for node in lab.nodes() {
                expect(&format!("fairlead node mode --data-dir $DIR {} {next}", node.name), "");
            }
        }
        expect("kubectl rollout status deployment/web --timeout=100s", "");
    }
    let old: String = before.split_whitespace().map(|name| format!("{name} ")).collect();
    expect(&format!("kubectl wait --for=delete {old} --timeout=60s"), "");
    let lasted = begun.elapsed();
    let tally = load.end();
    println!(
        "{mode} {then:?}: {} answers in {lasted:.1?}, {} requests repeated on a new connection, the slowest took {:?}",
        tally.answers, tally.repeats, tally.slowest
    );
    let enough = 8.0 * f64::from(per_second) * lasted.as_secs_f64() / 2.0;
    assert!(tally.answers as f64 > enough, "{mode}: only {} answers in {lasted:?}", tally.answers);
    if !tally.failures.is_empty() {
        // What was not waited for is what failed, mostly.
        let said = cluster
            .run(
                "grep -rhaE 'stopped (before|with)|mode has taken over|cannot' $DIR --include='*.log' | tail -60",
                "",
                SECONDS,
            )
            .output;
        panic!("{mode}: {} failures\n{}\n{said}", tally.failures.len(), tally.failures.join("\n"));
    }
    let reports = expect("kubectl get leases -n kube-system -l fairlead.io/component=proxy -o name", "");
    assert_eq!(reports.lines().count(), usize::from(NODES), "{mode}: every proxy reports: {reports}");
    let documents = [
        include_str!("../../../../docs/rolling-updates.md"),
        include_str!("../../../../docs/endpoint-selection.md"),
        include_str!("../../../../docs/dsr.md"),
    ];
    for command in documents.iter().flat_map(|text| text.lines()) {
        if let Some(command) = command.trim_start().strip_prefix("$ ") {
            expect(command, "");
        }
    }
    if !then.is_empty() {
        let events = expect("kubectl get events -A --field-selector reason=ProxyModeChanged", "");
        for next in then {
            assert!(events.contains(&format!("to {next} mode")), "{mode}: {events}");
        }
    }
    let events = expect("kubectl get events --field-selector reason=NotUnderstood,involvedObject.name=web", "");
    assert!(
        events.contains("annotation fairlead.io/end-policy is \"sometimes\", which is not keep"),
        "{mode}: {events}"
    );
}
