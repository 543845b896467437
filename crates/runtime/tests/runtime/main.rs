//! Real containers from a real image, as root: sandboxes, output, exec, limits, and life without an agent.
//!
//! Everything is below one scratch directory and one cgroup, and is removed also when a case fails.

mod image;
mod registry;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use linux::cgroup::Cgroup;
use runtime::image::{PullConfig, tcp_dialer};
use runtime::{
    Builtin, BuiltinConfig, ContainerConfig, ContainerState, ContainerStatus, ExecRequest, ImageService, Isolated,
    Resources, RuntimeService, SandboxConfig, SandboxState, Security,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

type Case = fn(Arc<Lab>) -> futures::future::BoxFuture<'static, Result<()>>;

/// Every case, in the order they run.
const CASES: &[(&str, Case)] = &[
    ("containers of a pod share localhost, and their output is logged", |lab| Box::pin(shared_localhost(lab))),
    ("an exit code, a missing command and a signal are told apart", |lab| Box::pin(exit_codes(lab))),
    ("exec has its own streams, exit code and terminal", |lab| Box::pin(exec(lab))),
    ("a container that takes too much memory is killed for it", |lab| Box::pin(memory_limit(lab))),
    ("a container is confined: user, capabilities, read-only root, masked paths", |lab| Box::pin(confinement(lab))),
    ("a pod of the node's own sees the node", |lab| Box::pin(host_pod(lab))),
    ("stop asks first and kills after the grace period", |lab| Box::pin(stop(lab))),
    ("attach sees output from now on and can write", |lab| Box::pin(attach(lab))),
    ("containers share a process namespace when asked to", |lab| Box::pin(shared_processes(lab))),
    ("a connection can be made inside the pod", |lab| Box::pin(dial(lab))),
    ("a new agent finds the same containers, and logs have no hole", |lab| Box::pin(adoption(lab))),
    ("a killed helper leaves no orphan", |lab| Box::pin(killed_helper(lab))),
    ("images: names, sharing, removal, damage", |lab| Box::pin(images(lab))),
    ("images are pulled with a token, and checked", |lab| Box::pin(pull(lab))),
    ("a removed sandbox leaves nothing", |lab| Box::pin(nothing_left(lab))),
];

fn main() {
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
    let tokio = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let mut failed = 0;
    match tokio {
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

/// One runtime with a directory and a cgroup of its own.
struct Lab {
    root: PathBuf,
    cgroup: PathBuf,
    runtime: Builtin,
}

async fn run_case(case: Case) -> Result<()> {
    let mut unique = [0; 4];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom")?, &mut unique)?;
    let name = format!("flt-{:08x}", u32::from_ne_bytes(unique));
    let root = std::env::temp_dir().join(&name);
    std::fs::create_dir_all(&root)?;
    let cgroup = PathBuf::from("/").join(&name);
    let result = async {
        let runtime = open(&root, &cgroup).await?;
        let lab = Arc::new(Lab { root: root.clone(), cgroup: cgroup.clone(), runtime });
        let archive = image::busybox("busybox:test")?;
        lab.runtime.images().import(&archive[..], None)?;
        tokio::time::timeout(Duration::from_secs(60), case(lab)).await.context("the case took too long")?
    }
    .await;
    // Whatever the case did: processes, then cgroups, then files.
    let everything = Cgroup::new(&cgroup)?;
    everything.kill(Duration::from_secs(10)).context("killing what a case left")?;
    everything.remove().context("removing a case's cgroup")?;
    linux::mount::unmount_below(&root)?;
    std::fs::remove_dir_all(&root).context("removing a case's directory")?;
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
    async fn pod(&self, change: impl FnOnce(&mut SandboxConfig)) -> Result<String> {
        let mut config = SandboxConfig {
            uid: "u-1".to_owned(),
            namespace: "default".to_owned(),
            name: "pod".to_owned(),
            hostname: "pod".to_owned(),
            ..SandboxConfig::default()
        };
        config.dns.servers.push("10.96.0.10".to_owned());
        change(&mut config);
        Ok(self.runtime.run_pod_sandbox(config).await?.id)
    }

    /// Creates and starts `sh -c script`.
    async fn start(
        &self,
        pod: &str,
        name: &str,
        script: &str,
        change: impl FnOnce(&mut ContainerConfig),
    ) -> Result<String> {
        let mut config = self.config(name, &["sh", "-c", script]);
        change(&mut config);
        let id = self.runtime.create_container(pod, config).await?;
        self.runtime.start_container(&id).await?;
        Ok(id)
    }

    fn config(&self, name: &str, command: &[&str]) -> ContainerConfig {
        ContainerConfig {
            name: name.to_owned(),
            image: "busybox:test".to_owned(),
            command: command.iter().map(|s| (*s).to_owned()).collect(),
            log_path: self.log(name),
            ..ContainerConfig::default()
        }
    }

    fn log(&self, name: &str) -> PathBuf {
        self.root.join("logs").join(name).join("0.log")
    }

    /// The text of a container's log, without times.
    fn output(&self, name: &str) -> String {
        let text = std::fs::read_to_string(self.log(name)).unwrap_or_default();
        text.lines().filter_map(|l| l.splitn(4, ' ').nth(3)).map(|l| format!("{l}\n")).collect()
    }

    async fn ended(&self, id: &str) -> Result<runtime::Exit> {
        let mut events = self.runtime.events();
        loop {
            if let Some(exit) = self.runtime.container_status(id).await?.state.exit() {
                return Ok(exit.clone());
            }
            tokio::time::timeout(Duration::from_secs(20), events.recv()).await.context("no end")??;
        }
    }

    async fn run(&self, id: &str, command: &[&str]) -> Result<(String, i32)> {
        let command = command.iter().map(|s| (*s).to_owned()).collect();
        let output = self.runtime.exec_sync(id, command, Duration::from_secs(20)).await?;
        Ok((String::from_utf8_lossy(&output.stdout).into_owned(), output.exit_code))
    }
}

async fn shared_localhost(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod(|_| ()).await?;
    let server = "echo hello >/tmp/index.html; echo up; echo oops >&2; exec httpd -f -p 127.0.0.1:8080 -h /tmp";
    lab.start(&pod, "server", server, |_| ()).await?;
    let script = "for i in 1 2 3 4 5 6 7 8 9; do nc 127.0.0.1 8080 </dev/null && break; sleep 0.1; done; \
                  printf 'GET /index.html HTTP/1.0\\r\\n\\r\\n' | nc 127.0.0.1 8080 | tail -1; hostname; \
                  cat /etc/resolv.conf; printf no-newline";
    let client = lab.start(&pod, "client", script, |_| ()).await?;
    let exit = lab.ended(&client).await?;
    ensure!(exit.code == 0, "client ended with {exit:?}");
    let output = lab.output("client");
    ensure!(output.ends_with("hello\npod\nnameserver 10.96.0.10\nno-newline\n"), "client said {output:?}");
    let raw = std::fs::read_to_string(lab.log("client"))?;
    ensure!(raw.ends_with("stdout P no-newline\n"), "the last part is not marked: {raw}");
    let server = std::fs::read_to_string(lab.log("server"))?;
    ensure!(server.contains(" stdout F up\n") && server.contains(" stderr F oops\n"), "server said {server:?}");
    Ok(())
}

async fn exit_codes(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod(|_| ()).await?;
    let seven = lab.start(&pod, "seven", "exit 7", |_| ()).await?;
    ensure!(lab.ended(&seven).await?.code == 7);
    let killed = lab.start(&pod, "killed", "kill -9 $$; sleep 100", |_| ()).await;
    // Process 1 of a namespace ignores its own kill; the runtime's arrives.
    let killed = killed?;
    lab.runtime.stop_container(&killed, Duration::ZERO).await?;
    let exit = lab.ended(&killed).await?;
    ensure!(exit.code == 137 && exit.signal == Some(9), "killed: {exit:?}");
    let missing = lab.config("missing", &["/no/such/command"]);
    let missing = lab.runtime.create_container(&pod, missing).await?;
    let Err(error) = lab.runtime.start_container(&missing).await else { bail!("a missing command started") };
    ensure!(error.to_string().contains("/no/such/command"), "{error}");
    ensure!(lab.ended(&missing).await?.code == 128);
    let many: Vec<String> = {
        let mut ids = Vec::new();
        for i in 0..5 {
            ids.push(lab.start(&pod, &format!("m{i}"), "true", |_| ()).await?);
        }
        ids
    };
    for id in many {
        ensure!(lab.ended(&id).await?.code == 0, "a short container's end was lost");
    }
    Ok(())
}

async fn exec(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod(|_| ()).await?;
    let id = lab
        .start(&pod, "main", "sleep 1000", |c| {
            c.env.push(("GREETING".to_owned(), "hi".to_owned()));
            c.working_dir = Some("/tmp".to_owned());
        })
        .await?;
    ensure!(lab.run(&id, &["sh", "-c", "echo $GREETING; pwd; exit 3"]).await? == ("hi\n/tmp\n".to_owned(), 3));
    let Err(e) = lab.run(&id, &["no-such"]).await else { bail!("no-such ran") };
    ensure!(e.to_string().contains("no-such"), "{e}");

    let request = ExecRequest { command: vec!["cat".to_owned()], stdin: true, tty: false };
    let mut session = lab.runtime.exec(&id, request).await?;
    let mut stdin = session.stdin.take().context("stdin")?;
    stdin.write_all(b"through and back").await?;
    drop(stdin);
    let mut text = String::new();
    session.stdout.take().context("stdout")?.read_to_string(&mut text).await?;
    ensure!(text == "through and back" && session.exit.await? == 0);

    let command = ["sh", "-c", "test -t 0 && stty size && read x && echo got $x"].map(str::to_owned).to_vec();
    let mut session = lab.runtime.exec(&id, ExecRequest { command, stdin: true, tty: true }).await?;
    session.terminal.as_ref().context("terminal")?.resize(100, 40)?;
    let mut stdin = session.stdin.take().context("stdin")?;
    stdin.write_all(b"line\r").await?;
    let mut text = String::new();
    session.stdout.take().context("stdout")?.read_to_string(&mut text).await?;
    ensure!(text.contains("got line") && session.exit.await? == 0, "the terminal said {text:?}");

    let begin = std::time::Instant::now();
    let hang = vec!["sleep".to_owned(), "100".to_owned()];
    let result = lab.runtime.exec_sync(&id, hang, Duration::from_millis(300)).await;
    ensure!(result.is_err() && begin.elapsed() < Duration::from_secs(5));
    // Nobody waits for it any more, so it is gone soon.
    while lab.run(&id, &["ps"]).await?.0.contains("sleep 100\n") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

async fn memory_limit(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod(|_| ()).await?;
    // tail keeps a line without end in memory.
    let id = lab
        .start(&pod, "hungry", "exec tail /dev/zero", |c| {
            c.resources = Resources { memory_limit: Some(16 << 20), ..Resources::default() };
        })
        .await?;
    let exit = lab.ended(&id).await?;
    ensure!(exit.oom_killed && exit.code == 137, "{exit:?}");
    Ok(())
}

async fn confinement(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod(|_| ()).await?;
    let volume = lab.root.join("volume");
    std::fs::create_dir_all(&volume)?;
    std::fs::write(volume.join("file"), "from outside")?;
    let id = lab
        .start(&pod, "confined", "sleep 1000", |c| {
            c.security = Security {
                run_as_user: Some(1000),
                run_as_group: Some(2000),
                supplemental_groups: vec![3000],
                readonly_rootfs: true,
                no_new_privileges: true,
                drop_capabilities: vec!["ALL".to_owned()],
                ..Security::default()
            };
            c.mounts.push(runtime::Mount {
                container_path: "/data/deep".to_owned(),
                host_path: volume.clone(),
                readonly: true,
                follow_host_mounts: false,
            });
            c.resources.oom_score_adj = Some(500);
        })
        .await?;
    let (out, _) = lab.run(&id, &["sh", "-c", "id -u; id -g; id -G; cat /data/deep/file"]).await?;
    ensure!(out == "1000\n2000\n2000 3000\nfrom outside", "{out:?}");
    let script = "touch /x 2>/dev/null || echo ro; touch /data/deep/x 2>/dev/null || echo vro; \
                  grep -E 'CapBnd|NoNewPrivs' /proc/self/status; cat /proc/kcore | wc -c; cat /proc/1/oom_score_adj; \
                  echo x > /proc/sys/kernel/hostname 2>/dev/null || echo sysro; ls /proc | grep -c '^[0-9]*$'";
    let (out, _) = lab.run(&id, &["sh", "-c", script]).await?;
    ensure!(out.starts_with("ro\nvro\nCapBnd:\t0000000000000000\nNoNewPrivs:\t1\n0\n500\nsysro\n"), "{out:?}");
    Ok(())
}

async fn host_pod(lab: Arc<Lab>) -> Result<()> {
    let pod = lab
        .pod(|c| {
            c.host_network = true;
            c.host_pid = true;
            c.host_ipc = true;
        })
        .await?;
    let own = std::fs::read_link("/proc/self/ns/net")?;
    let id = lab.start(&pod, "node", "sleep 1000", |c| c.security.privileged = true).await?;
    let (out, _) = lab.run(&id, &["sh", "-c", "busybox readlink /proc/self/ns/net; hostname; ps | wc -l"]).await?;
    let lines: Vec<&str> = out.lines().collect();
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
    ensure!(lines[0] == own.to_string_lossy() && lines[1] == name.trim(), "{out}");
    ensure!(lines[2].trim().parse::<u32>()? > 20, "only {} processes are seen", lines[2]);
    let (out, code) =
        lab.run(&id, &["sh", "-c", "mkdir /tmp/m && busybox mount -t tmpfs x /tmp/m && echo mounted"]).await?;
    ensure!(code == 0 && out == "mounted\n", "{out}");
    lab.runtime.stop_container(&id, Duration::ZERO).await?;
    ensure!(lab.ended(&id).await?.code == 137);
    Ok(())
}

async fn stop(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod(|_| ()).await?;
    let script = "trap 'echo bye; exit 5' TERM; echo ready; while :; do sleep 0.1; done";
    let polite = lab.start(&pod, "polite", script, |_| ()).await?;
    let deaf = lab.start(&pod, "deaf", "trap '' TERM; sleep 1000; sleep 1000", |_| ()).await?;
    while !lab.output("polite").contains("ready") {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    lab.runtime.stop_container(&polite, Duration::from_secs(20)).await?;
    ensure!(lab.ended(&polite).await?.code == 5 && lab.output("polite") == "ready\nbye\n");
    let begin = std::time::Instant::now();
    lab.runtime.stop_container(&deaf, Duration::from_millis(300)).await?;
    ensure!(lab.ended(&deaf).await?.code == 137 && begin.elapsed() > Duration::from_millis(290));
    Ok(())
}

async fn attach(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod(|_| ()).await?;
    let id = lab
        .start(&pod, "echo", "while read x; do echo got $x; done; echo end", |c| {
            c.stdin = true;
            c.stdin_once = true;
        })
        .await?;
    let mut session = lab.runtime.attach(&id).await?;
    let mut stdin = session.stdin.take().context("stdin")?;
    stdin.write_all(b"one\ntwo\n").await?;
    drop(stdin);
    let mut text = String::new();
    session.stdout.take().context("stdout")?.read_to_string(&mut text).await?;
    ensure!(text == "got one\ngot two\nend\n", "{text:?}");
    ensure!(session.exit.await? == 0 && lab.output("echo") == text);
    Ok(())
}

async fn shared_processes(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod(|c| c.share_process_namespace = true).await?;
    lab.start(&pod, "one", "exec sleep 4242", |_| ()).await?;
    let two = lab.start(&pod, "two", "exec sleep 1000", |_| ()).await?;
    let (out, _) = lab.run(&two, &["ps"]).await?;
    ensure!(out.contains("sleep 4242"), "{out}");
    Ok(())
}

async fn dial(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod(|_| ()).await?;
    lab.start(&pod, "server", "echo inside | nc -l -p 7777; sleep 1000", |_| ()).await?;
    let mut text = String::new();
    for _ in 0..100 {
        if let Ok(mut stream) = lab.runtime.dial(&pod, [127, 0, 0, 1].into(), 7777).await {
            stream.read_to_string(&mut text).await?;
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    ensure!(text == "inside\n", "{text:?}");
    Ok(())
}

async fn adoption(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod(|_| ()).await?;
    let script = "i=0; while [ $i -lt 60 ]; do i=$((i+1)); echo $i; sleep 0.02; done; exit 9";
    let counter = lab.start(&pod, "counter", script, |_| ()).await?;
    let sleeper = lab.start(&pod, "sleeper", "exec sleep 1000", |_| ()).await?;
    let before = lab.runtime.container_status(&sleeper).await?;
    // Another agent on the same directory, which is what a restarted one is: this one's memory is not asked.
    let second = open(&lab.root, &lab.cgroup).await?;
    let after = second.container_status(&sleeper).await?;
    ensure!(before == after && after.state.is_running(), "{before:?} became {after:?}");
    ensure!(second.list_pod_sandboxes().await?[0].state == SandboxState::Ready);
    let mut events = second.events();
    let exit = loop {
        if let ContainerStatus { state: ContainerState::Exited { exit, .. }, .. } =
            second.container_status(&counter).await?
        {
            break exit;
        }
        events.recv().await?;
    };
    let expected: String = (1..=60).map(|i| format!("{i}\n")).collect();
    ensure!(exit.code == 9 && lab.output("counter") == expected, "{exit:?} {}", lab.output("counter"));
    let output = second.exec_sync(&sleeper, vec!["echo".into(), "still".into()], Duration::from_secs(10)).await?;
    ensure!(output.stdout == b"still\n");
    let third = open(&lab.root, &lab.cgroup).await?;
    ensure!(third.container_status(&counter).await?.state.exit().map(|e| e.code) == Some(9), "an end was forgotten");
    Ok(())
}

async fn killed_helper(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod(|_| ()).await?;
    let id = lab.start(&pod, "main", "sleep 1000 & sleep 1000", |_| ()).await?;
    let helper = lab.runtime.list_pod_sandboxes().await?[0].pid.context("a helper")?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(helper), nix::sys::signal::Signal::SIGKILL)?;
    let exit = lab.ended(&id).await?;
    ensure!(exit.code == 137, "{exit:?}");
    ensure!(Cgroup::new(&lab.cgroup)?.processes().is_empty(), "orphans are left");
    let mut events = lab.runtime.events();
    while lab.runtime.list_pod_sandboxes().await?[0].state == SandboxState::Ready {
        events.recv().await?;
    }
    lab.runtime.remove_pod_sandbox(&pod).await?;
    ensure!(lab.runtime.list_pod_sandboxes().await?.is_empty() && lab.runtime.list_containers().await?.is_empty());
    Ok(())
}

async fn images(lab: Arc<Lab>) -> Result<()> {
    let full = "docker.io/library/busybox:test";
    let status = lab.runtime.image_status("busybox:test").await?.context("present")?;
    ensure!(status.repo_tags == [full], "{status:?}");
    ensure!(lab.runtime.image_status(&status.id).await?.as_ref() == Some(&status));
    ensure!(lab.runtime.image_status("busybox:other").await?.is_none());
    let again = image::oci_layout("busybox:oci")?;
    let imported = lab.runtime.images().import(&again[..], None)?;
    ensure!(imported[0].id == status.id, "the same content has another id");
    ensure!(lab.runtime.list_images().await?.len() == 1);
    let pod = lab.pod(|_| ()).await?;
    lab.start(&pod, "main", "sleep 1000", |_| ()).await?;
    lab.runtime.remove_image("busybox:oci").await?;
    ensure!(lab.runtime.remove_image("busybox:test").await.is_err(), "an image in use was removed");
    let beside = runtime::image::ImageStore::open(lab.root.join("images"))?;
    ensure!(beside.remove("busybox:test").is_err(), "another agent removed an image in use");
    lab.runtime.remove_pod_sandbox(&pod).await?;
    lab.runtime.remove_image("busybox:test").await?;
    ensure!(lab.runtime.image_status("busybox:test").await?.is_none());
    ensure!(lab.runtime.list_images().await?.is_empty());
    ensure!(std::fs::read_dir(lab.root.join("images/pins"))?.next().is_none(), "pins are left");
    ensure!(std::fs::read_dir(lab.root.join("images/layers"))?.next().is_none(), "layers are left");
    let mut damaged = again.clone();
    damaged.truncate(again.len() / 2);
    ensure!(lab.runtime.images().import(&damaged[..], None).is_err());
    ensure!(lab.runtime.images().import(&b"nonsense"[..], None).is_err());
    ensure!(std::fs::read_dir(lab.root.join("images/tmp"))?.next().is_none(), "work in progress is left");
    Ok(())
}

async fn pull(lab: Arc<Lab>) -> Result<()> {
    let registry = registry::start(image::oci_layout("ignored:1")?).await?;
    let name = format!("{}/team/busybox:1", registry.address);
    let Err(e) = lab.runtime.pull_image(&name, None).await else { bail!("pulled without credentials") };
    ensure!(e.to_string().contains("401"), "{e}");
    let auth = runtime::PullAuth { username: "me".to_owned(), password: "secret".to_owned() };
    let before = lab.runtime.image_status("busybox:test").await?.context("imported")?.id;
    let id = lab.runtime.pull_image(&name, Some(auth.clone())).await?;
    ensure!(id == before, "the same content has another id");
    ensure!(registry.layers_sent() == 0, "a layer that is here was fetched again");
    lab.runtime.remove_image("busybox:test").await?;
    lab.runtime.remove_image(&name).await?;
    let id = lab.runtime.pull_image(&name, Some(auth.clone())).await?;
    ensure!(registry.layers_sent() == 1);
    let status = lab.runtime.image_status(&name).await?.context("pulled")?;
    ensure!(
        status.id == id && status.repo_digests[0].starts_with(&format!("{}/team/busybox@sha256:", registry.address))
    );
    ensure!(lab.runtime.image_status(&status.repo_digests[0]).await?.is_some());
    let pod = lab.pod(|_| ()).await?;
    let container = lab.start(&pod, "pulled", "echo from afar", |c| c.image = name.clone()).await?;
    ensure!(lab.ended(&container).await?.code == 0 && lab.output("pulled") == "from afar\n");
    lab.runtime.remove_pod_sandbox(&pod).await?;
    lab.runtime.remove_image(&name).await?;
    registry.damage();
    let Err(e) = lab.runtime.pull_image(&name, Some(auth.clone())).await else { bail!("a damaged layer was taken") };
    ensure!(e.to_string().contains("instead of"), "{e}");
    let missing = format!("{}/team/nothing:1", registry.address);
    let Err(e) = lab.runtime.pull_image(&missing, Some(auth)).await else { bail!("nothing was pulled") };
    ensure!(e.to_string().contains("not found"), "{e}");
    ensure!(std::fs::read_dir(lab.root.join("images/tmp"))?.next().is_none(), "work in progress is left");
    Ok(())
}

async fn nothing_left(lab: Arc<Lab>) -> Result<()> {
    let pod = lab.pod(|_| ()).await?;
    lab.start(&pod, "main", "sleep 1000", |_| ()).await?;
    lab.runtime.stop_pod_sandbox(&pod).await?;
    ensure!(lab.runtime.list_pod_sandboxes().await?[0].state == SandboxState::NotReady);
    lab.runtime.remove_pod_sandbox(&pod).await?;
    lab.runtime.remove_pod_sandbox(&pod).await?;
    ensure!(Cgroup::new(&lab.cgroup)?.children().is_empty(), "cgroups are left");
    for directory in ["root/sandboxes", "run"] {
        ensure!(std::fs::read_dir(lab.root.join(directory))?.next().is_none(), "{directory} is not empty");
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo")?;
    ensure!(!mounts.contains(&*lab.root.to_string_lossy()), "mounts are left");
    Ok(())
}
