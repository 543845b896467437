//! A kubelet with the real runtime against a small API: pods from spec to status, and kubectl's streams, as root.

mod api;
#[path = "../../../runtime/tests/runtime/image.rs"]
mod image;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use api::FakeApi;
use kubelet::{ClusterDns, KubeletConfig};
use linux::cgroup::Cgroup;
use runtime::image::{PullConfig, tcp_dialer};
use runtime::{Builtin, BuiltinConfig, Isolated};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

type Case = fn(Arc<Lab>) -> futures::future::BoxFuture<'static, Result<()>>;

const CASES: &[(&str, Case)] = &[
    ("a pod runs, is ready, and ends when deleted", |lab| Box::pin(life(lab))),
    ("a pod that Services use ends once no proxy sends it anything", |lab| Box::pin(barrier(lab))),
    ("volumes and environment reach the container", |lab| Box::pin(volumes(lab))),
    ("failures are told as Kubernetes tells them", |lab| Box::pin(failures(lab))),
    ("init containers, restart policy and phases", |lab| Box::pin(phases(lab))),
    ("probes make ready, restart, and are reported", |lab| Box::pin(probes(lab))),
    ("a restarted kubelet keeps its pods; a killed helper is replaced", |lab| Box::pin(restart(lab))),
    ("the node and its lease are kept", |lab| Box::pin(node(lab))),
    ("kubectl reads logs, executes and forwards ports", |lab| Box::pin(kubectl(lab))),
];

fn main() {
    if std::env::var_os("LOG").is_some() {
        tracing_subscriber::fmt().with_max_level(tracing_subscriber::filter::LevelFilter::DEBUG).init();
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(("pod-helper", rest)) = arguments.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        runtime::helper::main(rest);
    }
    let filter = arguments.iter().find(|a| !a.starts_with('-')).cloned().unwrap_or_default();
    if arguments.iter().any(|a| a == "--list") {
        CASES.iter().for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    if !nix::unistd::geteuid().is_root() || !Path::new("/bin/busybox").exists() {
        println!("skipped: needs root and busybox-static");
        return;
    }
    let mut failed = 0;
    match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(tokio) => {
            for (name, case) in CASES.iter().filter(|(name, _)| name.contains(&filter)) {
                let begin = std::time::Instant::now();
                match tokio.block_on(run_case(*case)) {
                    Ok(()) => println!("ok   {name} ({} ms)", begin.elapsed().as_millis()),
                    Err(e) => {
                        failed += 1;
                        println!("FAIL {name}: {e:#}");
                    }
                }
            }
        }
        Err(e) => {
            println!("FAIL no tokio: {e}");
            failed += 1;
        }
    }
    std::process::exit(i32::from(failed > 0));
}

struct Lab {
    root: PathBuf,
    cgroup: PathBuf,
    api: FakeApi,
    address: std::net::SocketAddr,
    runtime: Builtin,
    client: kube::Client,
    token: std::sync::Mutex<CancellationToken>,
    kubelets: tokio::sync::Mutex<tokio::task::JoinSet<()>>,
}

async fn run_case(case: Case) -> Result<()> {
    let mut unique = [0; 4];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut unique)?;
    let name = format!("flk-{:08x}", u32::from_ne_bytes(unique));
    let root = std::env::temp_dir().join(&name);
    std::fs::create_dir_all(&root)?;
    let cgroup = PathBuf::from("/").join(&name);
    let result = async {
        let (api, address) = FakeApi::start().await?;
        let runtime = open(&root, &cgroup).await?;
        let archive = image::busybox("busybox:test")?;
        runtime.images().import(&archive[..], None)?;
        let client = kube::Client::try_from(kube::Config::new(format!("http://{address}").parse()?))?;
        let (token, kubelets) = Default::default();
        let (r, c) = (root.clone(), cgroup.clone());
        let lab = Arc::new(Lab { root: r, cgroup: c, api, address, runtime, client, token, kubelets });
        lab.start_kubelet(lab.runtime.clone()).await;
        let result = tokio::time::timeout(Duration::from_secs(100), case(lab.clone())).await;
        lab.token.lock().expect("no panic").cancel();
        // Its workers finish what they have begun.
        while lab.kubelets.lock().await.join_next().await.is_some() {}
        result.context("the case took too long")?
    }
    .await;
    // A worker may be in the middle of something: repeat until it has seen its end.
    let everything = Cgroup::new(&cgroup)?;
    let mut cleaned = Ok(());
    for _ in 0..20 {
        cleaned = everything.kill(Duration::from_secs(10)).and_then(|()| everything.remove());
        if cleaned.is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    cleaned.context("clearing a case's cgroup")?;
    linux::mount::unmount_below(&root)?;
    for _ in 0..20 {
        if std::fs::remove_dir_all(&root).is_ok() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    ensure!(!root.exists(), "{} cannot be removed", root.display());
    result
}

async fn open(root: &Path, cgroup: &Path) -> Result<Builtin> {
    let config = BuiltinConfig {
        root: root.join("root"),
        run: root.join("run"),
        images: root.join("images"),
        cgroup_parent: cgroup.to_owned(),
        helper: std::env::current_exe()?,
        helper_arguments: vec!["pod-helper".to_owned()],
        pull: PullConfig { dialer: tcp_dialer(), insecure_registries: vec![], certificate_authorities: None },
    };
    Ok(Builtin::open(config, Arc::new(Isolated)).await?)
}

impl Lab {
    async fn start_kubelet(&self, runtime: Builtin) {
        let token = CancellationToken::new();
        *self.token.lock().expect("no panic") = token.clone();
        let config = KubeletConfig {
            node_name: "node-1".to_owned(),
            node_ips: vec![[192, 0, 2, 1].into()],
            root: self.root.join("kubelet"),
            logs: self.root.join("logs"),
            cluster_dns: ClusterDns { servers: vec![[10, 96, 0, 10].into()], domain: "cluster.local".to_owned() },
            resolv_conf: "/etc/resolv.conf".into(),
            labels: Default::default(),
            taints: vec![],
            pod_cidrs: vec!["10.244.0.0/24".to_owned()],
            max_pods: 110,
            port: 10250,
            version: "v1.33.0".to_owned(),
        };
        self.api.set_kubelet(kubelet::Server::new(Arc::new(runtime.clone()), self.root.join("logs")));
        let images = Arc::new(runtime.clone());
        let run = kubelet::run(config, self.client.clone(), Arc::new(runtime), images, token);
        self.kubelets.lock().await.spawn(async move {
            if let Err(e) = run.await {
                println!("     the kubelet failed: {e}");
            }
        });
    }

    fn pod(&self, name: &str, spec: Value) {
        let mut pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": "default", "labels": {"app": name}},
            "spec": {"nodeName": "node-1", "terminationGracePeriodSeconds": 2},
        });
        for (key, value) in spec.as_object().into_iter().flatten() {
            pod["spec"][key] = value.clone();
        }
        self.api.put(&path(name), pod);
    }

    async fn until(&self, name: &str, what: &str, holds: impl Fn(&Value) -> bool) -> Result<Value> {
        self.api.until(&path(name), what, |pod| pod.is_some_and(|p| holds(&p["status"]))).await?;
        Ok(self.api.get(&path(name)).context("the pod has gone")?["status"].clone())
    }

    fn delete(&self, name: &str) {
        self.delete_within(name, 2);
    }

    fn delete_within(&self, name: &str, seconds: u32) {
        if let Some(mut pod) = self.api.get(&path(name)) {
            pod["metadata"]["deletionTimestamp"] = json!("2026-01-01T00:00:00Z");
            pod["metadata"]["deletionGracePeriodSeconds"] = json!(seconds);
            self.api.put(&path(name), pod);
        }
    }

    fn log(&self, name: &str, container: &str) -> String {
        let found = std::fs::read_dir(self.root.join("logs")).into_iter().flatten().flatten();
        let directory = found.map(|e| e.path()).find(|p| p.to_string_lossy().contains(&format!("default_{name}_")));
        let text = directory.and_then(|d| std::fs::read_to_string(d.join(container).join("0.log")).ok());
        let text = text.unwrap_or_default();
        text.lines().filter_map(|l| l.splitn(4, ' ').nth(3)).map(|l| format!("{l}\n")).collect()
    }

    /// Waits for an event about a pod: they are written beside everything else.
    async fn event(&self, name: &str, reason: &str) -> Result<()> {
        let mut reasons = Vec::new();
        for _ in 0..500 {
            let events = self.api.all("/api/v1/namespaces/default/events");
            let about = events.iter().filter(|e| e["involvedObject"]["name"] == name);
            reasons = about.filter_map(|e| e["reason"].as_str().map(str::to_owned)).collect();
            if reasons.iter().any(|r| r == reason) {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        anyhow::bail!("no event {reason} about {name} in {reasons:?}")
    }
}

fn path(name: &str) -> String {
    format!("/api/v1/namespaces/default/pods/{name}")
}

fn shell(script: &str) -> Value {
    json!({"name": "main", "image": "busybox:test", "command": ["sh", "-c", script]})
}

fn is_ready(status: &Value) -> bool {
    let all = status["conditions"].as_array();
    all.is_some_and(|all| all.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"))
}

async fn life(lab: Arc<Lab>) -> Result<()> {
    let begin = std::time::Instant::now();
    lab.pod("web", json!({"containers": [shell("trap 'exit 0' TERM; echo up; while :; do sleep 0.1; done")]}));
    let status = lab.until("web", "ready", is_ready).await?;
    println!("     create to ready: {} ms", begin.elapsed().as_millis());
    ensure!(status["phase"] == "Running" && status["podIP"] == "127.0.0.1" && status["hostIP"] == "192.0.2.1");
    ensure!(status["qosClass"] == "BestEffort" && status["startTime"].is_string());
    let container = &status["containerStatuses"][0];
    ensure!(container["state"]["running"]["startedAt"].is_string() && container["restartCount"] == 0, "{container}");
    ensure!(container["containerID"].as_str().is_some_and(|id| id.starts_with("fairlead://")));
    for reason in ["Pulled", "Created", "Started"] {
        lab.event("web", reason).await?;
    }
    lab.delete("web");
    lab.api.until(&path("web"), "gone", |pod| pod.is_none()).await?;
    ensure!(Cgroup::new(&lab.cgroup)?.processes().is_empty(), "processes are left");
    ensure!(std::fs::read_dir(lab.root.join("kubelet/pods"))?.next().is_none(), "files are left");
    // Removed by force, without a word to the kubelet.
    lab.pod("forced", json!({"containers": [shell("sleep 1000")]}));
    lab.until("forced", "ready", is_ready).await?;
    lab.api.remove(&path("forced"));
    while !Cgroup::new(&lab.cgroup)?.processes().is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

async fn barrier(lab: Arc<Lab>) -> Result<()> {
    let at = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/web-1";
    let slice = |uid: &Value, terminating: bool| {
        json!({
            "metadata": {"name": "web-1", "namespace": "default", "uid": "slice-1", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": [{"port": 80}],
            "endpoints": [{"addresses": ["192.0.2.7"], "targetRef": {"kind": "Pod", "uid": uid},
                "conditions": {"ready": !terminating, "serving": true, "terminating": terminating}}],
        })
    };
    let report = |applied: Value| {
        let lease = json!({
            "metadata": {"name": "fairlead-proxy-node-2", "namespace": "kube-system",
                "labels": {"fairlead.io/component": "proxy"}, "annotations": {"fairlead.io/applied-slices": applied.to_string()}},
            "spec": {"holderIdentity": "node-2"},
        });
        lab.api.put("/apis/coordination.k8s.io/v1/namespaces/kube-system/leases/fairlead-proxy-node-2", lease);
    };
    let ready = json!({"conditions": [{"type": "Ready", "status": "True"}]});
    lab.api.put("/api/v1/nodes/node-2", json!({"metadata": {"name": "node-2"}, "status": ready}));
    report(json!({}));
    let script = "trap 'echo told; exit 0' TERM; while :; do sleep 0.02; done";
    for (name, is_reported) in [("told", true), ("untold", false)] {
        lab.pod(name, json!({"containers": [shell(script)]}));
        lab.until(name, "ready", is_ready).await?;
        let uid = lab.api.get(&path(name)).context("the pod is there")?["metadata"]["uid"].clone();
        lab.api.put(at, slice(&uid, false));
        let begun = std::time::Instant::now();
        lab.delete_within(name, 30);
        lab.event(name, "Killing").await?;
        lab.api.put(at, slice(&uid, true));
        let version = lab.api.get(at).context("the slice is there")?["metadata"]["resourceVersion"].clone();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let early = lab.log(name, "main");
        // Later than that it goes on without the proxy, and this machine was too slow to tell.
        if begun.elapsed() < Duration::from_millis(950) {
            ensure!(early.is_empty(), "stopped before node-2's proxy let go of it");
        }
        if is_reported {
            report(json!({"slice-1": version}));
        }
        lab.api.until(&path(name), "gone", |pod| pod.is_none()).await?;
        println!("     {name}: {} ms from its deletion to its end", begun.elapsed().as_millis());
    }
    Ok(())
}

async fn volumes(lab: Arc<Lab>) -> Result<()> {
    let map = json!({"metadata": {"name": "conf", "namespace": "default"}, "data": {"key": "value", "other": "x"}});
    lab.api.put("/api/v1/namespaces/default/configmaps/conf", map);
    let secret = json!({"metadata": {"name": "sec", "namespace": "default"}, "data": {"pass": "czNjcmV0"}});
    lab.api.put("/api/v1/namespaces/default/secrets/sec", secret);
    let script = "cat /conf/key; echo; cat /one; echo; cat /sec/pass; echo; cat /var/run/token/token; echo; \
                  cat /var/run/token/labels; echo; echo $FROM $NAME $PASS $IP; cat /proc/mounts | grep -c ' /mem tmpfs'; \
                  echo hi >/empty/f; cat /sub/f; ls -l /conf | grep -c data; grep -c cluster.local /etc/resolv.conf; \
                  grep pod-v /etc/hosts; echo bye >/dev/termination-log; exit 3";
    let mut container = shell(script);
    container["env"] = json!([
        {"name": "FROM", "valueFrom": {"configMapKeyRef": {"name": "conf", "key": "key"}}},
        {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "PASS", "valueFrom": {"secretKeyRef": {"name": "sec", "key": "pass"}}},
        {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
    ]);
    container["volumeMounts"] = json!([
        {"name": "conf", "mountPath": "/conf"}, {"name": "conf", "mountPath": "/one", "subPath": "other"},
        {"name": "sec", "mountPath": "/sec", "readOnly": true}, {"name": "token", "mountPath": "/var/run/token"},
        {"name": "mem", "mountPath": "/mem"}, {"name": "empty", "mountPath": "/empty"},
        {"name": "empty", "mountPath": "/sub/", "subPath": "."},
    ]);
    container["volumeMounts"][6] = json!({"name": "shared", "mountPath": "/sub", "subPath": "a/b"});
    container["volumeMounts"][5] = json!({"name": "shared", "mountPath": "/empty", "subPath": "a/b"});
    lab.pod(
        "pod-v",
        json!({"restartPolicy": "Never", "containers": [container], "volumes": [
            {"name": "conf", "configMap": {"name": "conf"}}, {"name": "sec", "secret": {"secretName": "sec"}},
            {"name": "token", "projected": {"sources": [
                {"serviceAccountToken": {"path": "token", "expirationSeconds": 3600}},
                {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
            ]}},
            {"name": "mem", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}}, {"name": "shared", "emptyDir": {}},
        ]}),
    );
    let status = lab.until("pod-v", "failed", |s| s["phase"] == "Failed").await?;
    let expected =
        "value\nx\ns3cret\na-token\napp=\"pod-v\"\nvalue pod-v s3cret 127.0.0.1\n1\nhi\n2\n1\n127.0.0.1\tpod-v\n";
    let log = lab.log("pod-v", "main");
    ensure!(log == expected, "{log}");
    let ended = &status["containerStatuses"][0]["state"]["terminated"];
    ensure!(ended["exitCode"] == 3 && ended["message"] == "bye\n" && ended["reason"] == "Error", "{ended}");
    Ok(())
}

async fn failures(lab: Arc<Lab>) -> Result<()> {
    let waiting = |reason: &'static str| {
        move |s: &Value| s["containerStatuses"][0]["state"]["waiting"]["reason"].as_str() == Some(reason)
    };
    let mut never = shell("true");
    never["image"] = json!("nobody/has-this:1");
    never["imagePullPolicy"] = json!("Never");
    lab.pod("never", json!({"containers": [never]}));
    lab.until("never", "ErrImageNeverPull", waiting("ErrImageNeverPull")).await?;
    let mut pull = shell("true");
    pull["image"] = json!("localhost:1/nothing:1");
    lab.pod("pull", json!({"containers": [pull]}));
    lab.until("pull", "ErrImagePull", waiting("ErrImagePull")).await?;
    let status = lab.until("pull", "ImagePullBackOff", waiting("ImagePullBackOff")).await?;
    ensure!(status["phase"] == "Pending");
    let mut name = shell("true");
    name["image"] = json!("Not A Name");
    lab.pod("name", json!({"containers": [name]}));
    lab.until("name", "InvalidImageName", waiting("InvalidImageName")).await?;
    let mut config = shell("true");
    config["env"] = json!([{"name": "X", "valueFrom": {"configMapKeyRef": {"name": "missing", "key": "k"}}}]);
    lab.pod("config", json!({"containers": [config]}));
    let status = lab.until("config", "CreateContainerConfigError", waiting("CreateContainerConfigError")).await?;
    let message = &status["containerStatuses"][0]["state"]["waiting"]["message"];
    ensure!(message == "configmap \"missing\" not found", "{message}");
    lab.pod("volume", json!({"containers": [shell("true")], "volumes": [{"name": "v", "configMap": {"name": "no"}}]}));
    lab.event("volume", "FailedMount").await?;
    lab.pod("crash", json!({"containers": [shell("exit 7")]}));
    let status = lab.until("crash", "CrashLoopBackOff", waiting("CrashLoopBackOff")).await?;
    let container = &status["containerStatuses"][0];
    ensure!(container["restartCount"] == 1 && container["lastState"]["terminated"]["exitCode"] == 7, "{container}");
    ensure!(status["phase"] == "Running", "{status}");
    lab.event("crash", "BackOff").await?;
    let mut hungry = shell("exec tail /dev/zero");
    hungry["resources"] = json!({"limits": {"memory": "16Mi"}});
    lab.pod("hungry", json!({"restartPolicy": "Never", "containers": [hungry]}));
    let status = lab.until("hungry", "failed", |s| s["phase"] == "Failed").await?;
    ensure!(status["containerStatuses"][0]["state"]["terminated"]["reason"] == "OOMKilled", "{status}");
    Ok(())
}

async fn phases(lab: Arc<Lab>) -> Result<()> {
    let named = |name: &str, script: &str| {
        let mut container = shell(script);
        container["name"] = json!(name);
        container
    };
    lab.pod(
        "init",
        json!({
            "restartPolicy": "Never", "volumes": [{"name": "v", "emptyDir": {}}],
            "initContainers": [
                {"name": "first", "image": "busybox:test", "command": ["sh", "-c", "echo first >/v/f"],
                 "volumeMounts": [{"name": "v", "mountPath": "/v"}]},
                {"name": "side", "image": "busybox:test", "restartPolicy": "Always",
                 "command": ["sh", "-c", "trap 'exit 0' TERM; while :; do sleep 0.1; done"]},
            ],
            "containers": [{"name": "main", "image": "busybox:test", "command": ["cat", "/v/f"],
                            "volumeMounts": [{"name": "v", "mountPath": "/v"}]}],
        }),
    );
    let status = lab.until("init", "succeeded", |s| s["phase"] == "Succeeded").await?;
    ensure!(lab.log("init", "main") == "first\n");
    ensure!(status["initContainerStatuses"][0]["state"]["terminated"]["reason"] == "Completed", "{status}");
    lab.until("init", "without its sidecar", |s| s["initContainerStatuses"][1]["state"]["running"].is_null()).await?;
    lab.pod(
        "initfail",
        json!({
            "restartPolicy": "Never", "initContainers": [named("i", "exit 4")], "containers": [shell("true")]
        }),
    );
    let status = lab.until("initfail", "failed", |s| s["phase"] == "Failed").await?;
    ensure!(status["containerStatuses"][0]["state"]["waiting"]["reason"] == "PodInitializing", "{status}");
    lab.pod(
        "onfail",
        json!({
            "restartPolicy": "OnFailure", "volumes": [{"name": "v", "emptyDir": {}}],
            "containers": [{"name": "main", "image": "busybox:test", "volumeMounts": [{"name": "v", "mountPath": "/v"}],
                            "command": ["sh", "-c", "test -f /v/f && exit 0; touch /v/f; exit 1"]}],
        }),
    );
    let status = lab.until("onfail", "succeeded", |s| s["phase"] == "Succeeded").await?;
    ensure!(status["containerStatuses"][0]["restartCount"] == 1, "{status}");
    Ok(())
}

async fn probes(lab: Arc<Lab>) -> Result<()> {
    let mut container = shell("touch /tmp/live; sleep 1.5; touch /tmp/ready; sleep 1000");
    container["readinessProbe"] = json!({"exec": {"command": ["cat", "/tmp/ready"]}, "periodSeconds": 1});
    container["livenessProbe"] =
        json!({"exec": {"command": ["cat", "/tmp/live"]}, "periodSeconds": 1, "failureThreshold": 1});
    lab.pod("probed", json!({"containers": [container]}));
    let status = lab.until("probed", "running", |s| s["phase"] == "Running").await?;
    ensure!(!is_ready(&status), "ready before its probe");
    let status = lab.until("probed", "ready", is_ready).await?;
    let id = status["containerStatuses"][0]["containerID"].as_str().unwrap_or_default().replace("fairlead://", "");
    use runtime::RuntimeService;
    lab.runtime
        .exec_sync(
            &id,
            vec!["sh".into(), "-c".into(), "echo >/dev/null; busybox rm /tmp/live".into()],
            Duration::from_secs(5),
        )
        .await?;
    let status =
        lab.until("probed", "restarted", |s| s["containerStatuses"][0]["restartCount"] == 1 && is_ready(s)).await?;
    ensure!(status["containerStatuses"][0]["lastState"]["terminated"].is_object());
    lab.event("probed", "Unhealthy").await?;
    lab.event("probed", "Killing").await?;
    let mut http = shell("echo ok >/tmp/index.html; httpd -f -p 8081 -h /tmp");
    http["ports"] = json!([{"name": "web", "containerPort": 8081}]);
    // Nothing listens in the node's own namespace: the probe of this isolated pod cannot succeed.
    http["readinessProbe"] =
        json!({"httpGet": {"path": "/", "port": "web"}, "periodSeconds": 1, "failureThreshold": 1});
    lab.pod("http", json!({"containers": [http]}));
    lab.event("http", "Unhealthy").await
}

async fn restart(lab: Arc<Lab>) -> Result<()> {
    lab.pod("keep", json!({"containers": [shell("sleep 1000")]}));
    let before = lab.until("keep", "ready", is_ready).await?;
    lab.token.lock().expect("no panic").cancel();
    // A pod is deleted while no kubelet is here, another comes.
    lab.pod("new", json!({"containers": [shell("sleep 1000")]}));
    let second = open(&lab.root, &lab.cgroup).await?;
    lab.start_kubelet(second.clone()).await;
    lab.until("new", "ready", is_ready).await?;
    let after = lab.api.get(&path("keep")).context("there")?["status"].clone();
    ensure!(before["containerStatuses"] == after["containerStatuses"], "{before:#} became {after:#}");
    use runtime::RuntimeService;
    let pods = second.list_pod_sandboxes().await?;
    let helper = pods.iter().find(|p| p.config.name == "keep").and_then(|p| p.pid).context("a helper")?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(helper), nix::sys::signal::Signal::SIGKILL)?;
    let status =
        lab.until("keep", "replaced", |s| s["containerStatuses"][0]["restartCount"] == 1 && is_ready(s)).await?;
    ensure!(status["containerStatuses"][0]["lastState"]["terminated"]["exitCode"] == 137, "{status}");
    Ok(())
}

async fn node(lab: Arc<Lab>) -> Result<()> {
    let ready = |node: &Value| {
        let conditions = node["status"]["conditions"].as_array();
        conditions.is_some_and(|all| all.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"))
    };
    lab.api.until("/api/v1/nodes/node-1", "ready", |node| node.is_some_and(ready)).await?;
    let node = lab.api.get("/api/v1/nodes/node-1").context("there")?;
    ensure!(node["spec"]["podCIDR"] == "10.244.0.0/24" && node["status"]["capacity"]["pods"] == "110", "{node}");
    let lease = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases/node-1";
    lab.api.until(lease, "there", |lease| lease.is_some_and(|l| l["spec"]["renewTime"].is_string())).await
}

async fn kubectl(lab: Arc<Lab>) -> Result<()> {
    let script = "echo line; echo inside >/tmp/index.html; httpd -p 7777 -h /tmp; while read x; do echo got $x; done";
    let mut container = shell(script);
    container["stdin"] = json!(true);
    lab.pod("p", json!({"containers": [container]}));
    lab.until("p", "ready", is_ready).await?;
    let binaries = binaries();
    if binaries.is_empty() {
        println!("     no kubectl here: the streams were not tried");
        return Ok(());
    }
    for (number, kubectl) in binaries.iter().enumerate() {
        let name = kubectl.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let run = |arguments: &[&str]| {
            let mut command = tokio::process::Command::new(kubectl);
            command.arg("--server").arg(format!("http://{}", lab.address));
            command.arg("--cache-dir").arg(lab.root.join("cache")).args(arguments);
            command.env("KUBECONFIG", "/dev/null").kill_on_drop(true);
            command
        };
        let out = run(&["logs", "p"]).output().await?;
        ensure!(out.stdout.starts_with(b"line\n"), "{name} logs: {out:?}");
        let out = run(&["exec", "p", "--", "sh", "-c", "echo out; echo err >&2; exit 5"]).output().await?;
        let seen = (out.stdout.as_slice(), out.status.code());
        ensure!(seen == (b"out\n".as_slice(), Some(5)) && out.stderr.starts_with(b"err\n"), "{name} exec: {out:?}");
        let mut cat = run(&["exec", "-i", "p", "--", "cat"]);
        let mut child =
            cat.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped()).spawn().context("spawned")?;
        let big = "0123456789".repeat(30_000);
        let mut stdin = child.stdin.take().context("stdin")?;
        let sent = big.clone();
        let writing = tokio::spawn(async move {
            tokio::io::AsyncWriteExt::write_all(&mut stdin, sent.as_bytes()).await?;
            tokio::io::AsyncWriteExt::shutdown(&mut stdin).await
        });
        let out = tokio::time::timeout(Duration::from_secs(20), child.wait_with_output()).await.context("cat")??;
        writing.await??;
        ensure!(out.stdout == big.as_bytes(), "{name} exec -i: {} bytes came back", out.stdout.len());
        let pty = format!(
            "{} --server http://{} exec -it p -- sh -c 'test -t 0 && echo is a terminal && exit 4'",
            kubectl.display(),
            lab.address
        );
        let mut script = tokio::process::Command::new("script");
        script.args(["-qec", &pty, "/dev/null"]).env("KUBECONFIG", "/dev/null").stdin(std::process::Stdio::null());
        let out = tokio::time::timeout(Duration::from_secs(10), script.output()).await.context("exec -it")??;
        let text = String::from_utf8_lossy(&out.stdout);
        ensure!(out.status.code() == Some(4) && text.contains("is a terminal\r\n"), "{name} -it: {text}");
        let follow = run(&["logs", "-f", "--tail=1", "p"]).stdout(std::process::Stdio::piped()).spawn()?;
        let mut attach = run(&["attach", "-i", "p"]);
        attach.stdin(std::process::Stdio::piped()).stdout(std::process::Stdio::piped());
        let mut attached = attach.spawn()?;
        let mut stdin = attached.stdin.take().context("stdin")?;
        tokio::io::AsyncWriteExt::write_all(&mut stdin, format!("word{number}\n").as_bytes()).await?;
        let word = format!("got word{number}");
        for (what, mut child) in [("attach", attached), ("logs -f", follow)] {
            let output = tokio::io::BufReader::new(child.stdout.take().context("stdout")?);
            let mut lines = tokio::io::AsyncBufReadExt::lines(output);
            let seen = async {
                while let Some(line) = lines.next_line().await? {
                    if line == word {
                        return Ok(());
                    }
                }
                anyhow::bail!("{name} {what} ended without {word}")
            };
            tokio::time::timeout(Duration::from_secs(10), seen).await.with_context(|| format!("{name} {what}"))??;
            child.kill().await?;
        }
        let mut forward = run(&["port-forward", "p", ":7777"]);
        let mut child = forward.stdout(std::process::Stdio::piped()).stderr(std::process::Stdio::piped()).spawn()?;
        let mut lines =
            tokio::io::AsyncBufReadExt::lines(tokio::io::BufReader::new(child.stdout.take().context("out")?));
        let line = tokio::time::timeout(Duration::from_secs(10), lines.next_line()).await.context("forward")??;
        let port: u16 = line
            .as_deref()
            .and_then(|l| l.split(':').nth(1)?.split(' ').next()?.parse().ok())
            .with_context(|| format!("{name} said {line:?}"))?;
        let mut text = String::new();
        let mut stream = tokio::net::TcpStream::connect(("127.0.0.1", port)).await?;
        tokio::io::AsyncWriteExt::write_all(&mut stream, b"GET / HTTP/1.0\r\n\r\n").await?;
        let read = tokio::io::AsyncReadExt::read_to_string(&mut stream, &mut text);
        tokio::time::timeout(Duration::from_secs(10), read).await.context("reading a forwarded port")??;
        ensure!(text.ends_with("inside\n"), "{name} port-forward: {text:?}");
        child.kill().await?;
        println!("     {name}: logs, logs -f, exec, exec -i, exec -it, attach, port-forward");
    }
    Ok(())
}

/// The versioned ones beside the dispatcher where they are, else whatever is on PATH.
fn binaries() -> Vec<PathBuf> {
    let Some(found) = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .map(|d| d.join("kubectl"))
        .find(|p| p.exists())
        .and_then(|p| p.canonicalize().ok())
    else {
        return Vec::new();
    };
    let beside = |minor: u32| found.with_file_name(format!("kubectl.1.{minor}"));
    let versions: Vec<PathBuf> = [33, 30, 29].into_iter().map(beside).filter(|p| p.exists()).collect();
    if versions.is_empty() { vec![found] } else { versions }
}
