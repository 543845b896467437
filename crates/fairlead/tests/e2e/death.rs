//! What keeps on when parts of Fairlead die: Services always, containers as long as their pods' helpers live, objects ever.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::cluster::{Cluster, kubectls};

const NODES: u8 = 2;
const SECONDS: u32 = 60;

#[test]
fn services_and_pods_outlive_the_processes_that_made_them() {
    let cluster = Cluster::up(&kubectls()[0], NODES);
    let id = status(&cluster)[0].split_whitespace().nth(1).expect("status names the cluster").to_owned();
    expect(&cluster, "kubectl apply -f $EXAMPLES/nginx/");
    expect(
        &cluster,
        "kubectl run count --image=busybox:test1 --restart=Never -- sh -c 'i=0; while :; do i=$((i+1)); echo $i; sleep 0.1; done'",
    );
    expect(&cluster, "kubectl rollout status deployment/nginx-deployment --timeout=60s");
    expect(&cluster, "kubectl wait --for=condition=Ready pod/count --timeout=60s");
    let address = expect(&cluster, "kubectl get service nginx-service -o jsonpath='{.spec.clusterIP}'");
    answers(&cluster, &address, "before anything died");
    let containers = containers(&id);
    assert_eq!(containers.values().filter(|name| name.starts_with("nginx: master")).count(), 2, "{containers:?}");
    let same = |when: &str| {
        assert_eq!(self::containers(&id), containers, "{when}: the same containers, by pid and start time");
        let restarts =
            expect(&cluster, "kubectl get pods -o jsonpath='{.items[*].status.containerStatuses[*].restartCount}'");
        assert_eq!(restarts, "0 0 0", "{when}: no restart is counted");
        whole(&expect(&cluster, "kubectl logs count"), when);
    };

    // The control plane stands still.
    let server = pid_of(&cluster, "control plane");
    signal("STOP", &[server]);
    answers(&cluster, &address, "while the server is stopped");
    signal("CONT", &[server]);
    same("after the server was stopped");

    // The control plane is gone in the middle of writes; what it acknowledged is kept.
    let mut writer = cluster
        .shell("i=0; while kubectl create configmap ack-$i --from-literal=a=b >> $TMP/acked 2> /dev/null; do i=$((i+1)); done", SECONDS)
        .spawn()
        .expect("a writer can be started");
    until("a few writes are acknowledged", || expect(&cluster, "touch $TMP/acked; wc -l < $TMP/acked").trim() >= "3");
    signal("KILL", &[server]);
    answers(&cluster, &address, "while the server is dead");
    writer.wait().expect("the writer can be waited for");
    cluster.start(NODES);
    for line in expect(&cluster, "cat $TMP/acked").lines() {
        let name = line.split_whitespace().next().expect("kubectl says what it created");
        expect(&cluster, &format!("kubectl get {name}"));
    }
    ready(&cluster);
    answers(&cluster, &address, "after the server was killed and started");
    same("after the server was killed");

    // A node's agent is gone, and comes back.
    let agent = pid_of(&cluster, "node-1");
    signal("KILL", &[agent]);
    answers(&cluster, &address, "while an agent is dead");
    expect(&cluster, "fairlead node start --data-dir $DIR node-1");
    ready(&cluster);
    answers(&cluster, &address, "after an agent was killed and started");
    same("after an agent was killed");

    // Everything of ours is gone but the pods' helpers.
    let (helpers, others): (Vec<_>, Vec<_>) =
        ours(&cluster).into_iter().partition(|(_, line)| line.contains("pod-helper"));
    assert!(!helpers.is_empty() && others.len() >= 3, "{helpers:?} {others:?}");
    signal("KILL", &others.iter().map(|(pid, _)| *pid).collect::<Vec<_>>());
    answers(&cluster, &address, "while all but the helpers is dead");
    cluster.start(NODES);
    ready(&cluster);
    answers(&cluster, &address, "after all but the helpers was killed");
    same("after all but the helpers was killed");
    expect(&cluster, "kubectl get deployment/nginx-deployment service/nginx-service configmap/ack-0");

    // Everything is gone: the pods are started again.
    signal("KILL", &ours(&cluster).iter().map(|(pid, _)| *pid).collect::<Vec<_>>());
    until("the containers end with their helpers", || self::containers(&id).is_empty());
    cluster.start(NODES);
    until("nginx runs again", || {
        self::containers(&id).values().filter(|name| name.starts_with("nginx: master")).count() == 2
    });
    expect(&cluster, "kubectl rollout status deployment/nginx-deployment --timeout=60s");
    until("its Service answers again", || cluster.run(&asking(&address), "", SECONDS).success);
    answers(&cluster, &address, "after the helpers were killed");

    cluster.down();
    assert_eq!(leftovers(&cluster, &id), Vec::<String>::new(), "down leaves nothing");
}

/// What a line of `sh` prints, which has to succeed.
pub fn expect(cluster: &Cluster, line: &str) -> String {
    let seen = cluster.run(line, "", SECONDS);
    assert!(seen.success, "{line}\n{}", seen.output);
    seen.output
}

/// Waits for what is no event to a test.
pub fn until(what: &str, done: impl Fn() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(100));
    }
}

fn ready(cluster: &Cluster) {
    expect(cluster, "kubectl wait --for=condition=Ready node --all --timeout=30s");
}

/// Asks for the page by node port from outside and by cluster IP from both nodes, a few times each.
pub fn asking(address: &str) -> String {
    format!(
        "set -e; for i in 1 2 3; do
        for node in 192.168.49.2 192.168.49.3; do
            fairlead node exec --data-dir $DIR outside -- curl -sSf --max-time 3 http://$node:30007
        done
        for node in node-1 node-2; do fairlead node exec --data-dir $DIR $node -- curl -sSf --max-time 3 http://{address}; done
        done"
    )
}

pub fn answers(cluster: &Cluster, address: &str, when: &str) {
    let seen = cluster.run(&asking(address), "", SECONDS);
    let pages = seen.output.lines().filter(|line| line.starts_with("nginx:test1 on nginx-deployment-")).count();
    assert!(seen.success && pages == 12, "{when}: {pages} of 12 answers\n{}", seen.output);
}

/// The counter's lines: from the first one on, none missing, none twice.
fn whole(log: &str, when: &str) {
    let broken = log.lines().enumerate().find(|(index, line)| line.trim() != (index + 1).to_string());
    assert!(broken.is_none() && !log.is_empty(), "{when}: the log has a line {broken:?} (counted from 0)");
}

/// The lines of `status` about this cluster, the first one naming it.
pub fn status(cluster: &Cluster) -> Vec<String> {
    // It fails if anything is wrong with any cluster of this machine, and other tests have theirs.
    let all = cluster.run("fairlead status", "", SECONDS).output;
    let first = format!(" in {}", cluster.data_dir());
    let mut lines = all.lines().skip_while(|line| !line.ends_with(&first)).map(str::to_owned);
    let head = lines.next().unwrap_or_else(|| panic!("status shows this cluster:\n{all}"));
    std::iter::once(head).chain(lines.take_while(|line| line.starts_with(' '))).collect()
}

pub fn pid_of(cluster: &Cluster, role: &str) -> u32 {
    let lines = status(cluster);
    let line = lines.iter().find(|line| line.trim().starts_with(role)).expect("status shows every role");
    let pid = line.split("pid ").nth(1).and_then(|rest| rest.split(',').next());
    pid.and_then(|pid| pid.trim().parse().ok()).unwrap_or_else(|| panic!("no pid in {line:?}"))
}

pub fn signal(name: &str, pids: &[u32]) {
    let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
    let done = Command::new("kill").arg(format!("-{name}")).args(&pids).status().expect("kill can be run");
    assert!(done.success(), "kill -{name} {pids:?}");
}

/// Every process with its command line, words joined by blanks.
fn processes() -> Vec<(u32, String)> {
    let entries = fs::read_dir("/proc").expect("/proc can be read").flatten();
    let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    // A process may end while it is looked at.
    pids.filter_map(|pid| {
        let bytes = fs::read(format!("/proc/{pid}/cmdline")).ok()?;
        let line = String::from_utf8_lossy(&bytes).replace('\0', " ");
        (!line.is_empty()).then_some((pid, line))
    })
    .collect()
}

/// The processes of this cluster that are Fairlead's: server, agents, helpers.
fn ours(cluster: &Cluster) -> Vec<(u32, String)> {
    let dir = cluster.data_dir();
    let is_ours =
        |line: &str| ["server ", "agent ", "pod-helper "].iter().any(|role| line.contains(role)) && line.contains(&dir);
    processes().into_iter().filter(|(_, line)| is_ours(line)).collect()
}

/// The processes in pods' containers by pid and start time. Those that come and go are left out.
pub fn containers(id: &str) -> BTreeMap<(u32, String), String> {
    let lasting = |line: &str| line.starts_with("nginx: ") || line.starts_with("sh -c ");
    let found = processes().into_iter().filter(|(_, line)| lasting(line));
    found
        .filter_map(|(pid, line)| {
            let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
            let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
            // The name in parentheses may hold blanks; the start time is the 20th field after it.
            let start = stat.rsplit(')').next()?.split_whitespace().nth(19)?.to_owned();
            cgroup.contains(&format!("fairlead-{id}")).then_some(((pid, start), line))
        })
        .collect()
}

/// What is still there of a cluster that is down, but for its data directory.
pub fn leftovers(cluster: &Cluster, id: &str) -> Vec<String> {
    let mut left: Vec<String> = ours(cluster).into_iter().map(|(pid, line)| format!("process {pid} {line}")).collect();
    left.extend(containers(id).into_values());
    let run = Path::new("/run/fairlead").join(id);
    left.extend(run.exists().then(|| run.display().to_string()));
    let mounts = fs::read_to_string("/proc/self/mounts").expect("mounts can be read");
    let dir = cluster.data_dir();
    left.extend(mounts.lines().filter(|line| line.contains(&dir) || line.contains(id)).map(str::to_owned));
    let found = cluster.run(
        &format!("find /sys/fs/cgroup -type d -name '*{id}*'; ip -o link | grep {id}; ls -d /run/netns/*{id}*"),
        "",
        SECONDS,
    );
    left.extend(
        found.output.lines().filter(|line| line.contains(id) && !line.contains("cannot access")).map(str::to_owned),
    );
    left
}
