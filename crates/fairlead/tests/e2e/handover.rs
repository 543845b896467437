//! A node changes its proxy's mode while its Service is asked: no request fails, no connection is lost, and the node keeps
//! the mode when its agent is started again.

use crate::cluster::{Cluster, kubectls};
use crate::death::expect;

const SECONDS: u32 = 120;

/// A connection per request, until there is a file `stop`.
const COMES_AND_GOES: &str = "until [ -e $TMP/stop ]; do \
    curl -sS --max-time 5 -o /dev/null -w '%{http_code}\\n' http://192.168.49.2:30007; sleep 0.02; done";
/// All requests on one connection.
const STAYS: &str = r#"exec 3<>/dev/tcp/192.168.49.2/30007 || exit 1; until [ -e $TMP/stop ]; do
    printf 'HEAD / HTTP/1.1\r\nHost: web\r\n\r\n' >&3
    while IFS= read -r -t 5 -u 3 line; do case $line in HTTP*) echo ${line:9:3};; $'\r') break;; esac; done || { echo lost; exit; }
    sleep 0.05; done"#;

#[test]
fn a_node_changes_its_mode_under_load() {
    let cluster = Cluster::up(&kubectls()[0], 2);
    expect(&cluster, "kubectl apply -f $EXAMPLES/nginx/");
    expect(&cluster, "kubectl rollout status deployment/nginx-deployment --timeout=60s");
    expect(
        &cluster,
        "until fairlead node exec --data-dir $DIR outside -- curl -sf --max-time 3 http://192.168.49.2:30007; do sleep 0.1; done",
    );
    std::fs::write(cluster.dir().join("comes"), COMES_AND_GOES).expect("written");
    std::fs::write(cluster.dir().join("stays"), STAYS).expect("written");
    let outside = "exec fairlead node exec --data-dir $DIR outside -- bash";
    let start = |name: &str| {
        let line = format!("export TMP; {outside} $TMP/{name} > $TMP/{name}.out 2>&1");
        cluster.shell(&line, SECONDS).spawn().expect("a client can be started")
    };
    let clients = [start("comes"), start("stays")];
    let goes_on = || {
        let ten_more = "n=$(wc -l < $f); until [ $(wc -l < $f) -ge $((n + 10)) ]; do sleep 0.1; done";
        expect(&cluster, &format!("for f in $TMP/comes.out $TMP/stays.out; do {ten_more}; done"));
    };
    goes_on();
    let in_mode = |mode: &str| {
        let status = crate::death::status(&cluster).join("\n");
        assert!(status.contains(&format!("proxy {mode} (synced true")), "{status}");
    };
    for mode in ["iptables", "userspace", "iptables"] {
        expect(&cluster, &format!("fairlead node mode --data-dir $DIR node-1 {mode}"));
        in_mode(mode);
        goes_on();
    }
    for line in ["fairlead node stop --data-dir $DIR node-1", "fairlead node start --data-dir $DIR node-1"] {
        expect(&cluster, line);
    }
    in_mode("iptables");
    goes_on();
    expect(&cluster, "touch $TMP/stop");
    for mut client in clients {
        assert!(client.wait().expect("the client can be waited for").success());
    }
    for name in ["comes", "stays"] {
        let answers = std::fs::read_to_string(cluster.dir().join(format!("{name}.out"))).expect("output");
        assert!(answers.lines().all(|line| line == "200"), "{name}: {answers}");
    }
    let events = expect(&cluster, "kubectl get events -A");
    assert!(events.contains("changed from nftables to iptables mode"), "{events}");
    let wrong = cluster.run("fairlead node mode --data-dir $DIR node-1 quantum", "", SECONDS);
    assert!(!wrong.success && wrong.output.contains("use nftables"), "{}", wrong.output);
    cluster.down();
}
