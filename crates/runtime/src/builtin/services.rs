//! The runtime's two traits, over the built-in runtime.

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use futures::FutureExt;
use futures::future::BoxFuture;
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::broadcast;

use super::terminal::Master;
use super::{Builtin, blocking, client, gone, new_id, not_found, short, spec, status_of};
use crate::files::write_atomically;
use crate::helper::protocol::{EXIT, Reply, Request, Run};
use crate::image::{Image, ImageError};
use crate::service::{ExecRequest, ImageService, Result, RuntimeService, Session};
use crate::types::{
    ContainerConfig, ContainerState, ContainerStatus, Context, ExecOutput, Exit, ImageStatus, PullAuth, RuntimeError,
    RuntimeEvent, SandboxConfig, SandboxStatus,
};

/// The most output that `exec_sync` keeps of each stream; probes print little.
const OUTPUT_LIMIT: usize = 16 << 20;

impl RuntimeService for Builtin {
    fn version(&self) -> String {
        concat!("fairlead://", env!("CARGO_PKG_VERSION")).to_owned()
    }

    fn run_pod_sandbox(&self, config: SandboxConfig) -> BoxFuture<'_, Result<SandboxStatus>> {
        self.run_sandbox(config).boxed()
    }

    fn stop_pod_sandbox<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>> {
        self.stop_sandbox(id).boxed()
    }

    fn remove_pod_sandbox<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>> {
        self.destroy(id).boxed()
    }

    fn list_pod_sandboxes(&self) -> BoxFuture<'_, Result<Vec<SandboxStatus>>> {
        let all = self.state().sandboxes.values().map(status_of).collect();
        std::future::ready(Ok(all)).boxed()
    }

    fn create_container<'a>(&'a self, sandbox: &'a str, config: ContainerConfig) -> BoxFuture<'a, Result<String>> {
        let (this, sandbox) = (self.clone(), sandbox.to_owned());
        blocking(move || this.create(&sandbox, config)).boxed()
    }

    fn start_container<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>> {
        self.start(id).boxed()
    }

    fn stop_container<'a>(&'a self, id: &'a str, grace: Duration) -> BoxFuture<'a, Result<()>> {
        self.stop(id, grace).boxed()
    }

    fn remove_container<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>> {
        async move {
            let Ok(status) = self.container(id) else { return Ok(()) };
            if status.state.is_running() {
                self.stop(id, Duration::ZERO).await?;
            }
            let bundle = self.bundle(&status.sandbox_id, id);
            blocking(move || {
                gone(std::fs::remove_dir_all(&bundle)).context(|| format!("cannot remove {}", bundle.display()))
            })
            .await?;
            self.images().unpin(id);
            self.state().containers.remove(id);
            self.announce(&status.sandbox_id);
            Ok(())
        }
        .boxed()
    }

    fn list_containers(&self) -> BoxFuture<'_, Result<Vec<ContainerStatus>>> {
        let all = self.state().containers.values().cloned().collect();
        std::future::ready(Ok(all)).boxed()
    }

    fn container_status<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<ContainerStatus>> {
        std::future::ready(self.container(id)).boxed()
    }

    fn exec_sync<'a>(
        &'a self,
        id: &'a str,
        command: Vec<String>,
        timeout: Duration,
    ) -> BoxFuture<'a, Result<ExecOutput>> {
        let work = async move {
            let mut session = self.exec(id, ExecRequest { command, stdin: false, tty: false }).await?;
            let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
            let limit = OUTPUT_LIMIT as u64;
            let (out, err) = (session.stdout.take(), session.stderr.take());
            let read_out = async {
                match out {
                    Some(out) => out.take(limit).read_to_end(&mut stdout).await.map(drop),
                    None => Ok(()),
                }
            };
            let read_err = async {
                match err {
                    Some(err) => err.take(limit).read_to_end(&mut stderr).await.map(drop),
                    None => Ok(()),
                }
            };
            // A child that the command left in the background may hold the pipes for ever: the command's own end counts.
            let mut exit = session.exit;
            let exit_code = {
                let reading = futures::future::try_join(read_out, read_err);
                tokio::pin!(reading);
                tokio::select! {
                    biased;
                    read = &mut reading => {
                        read.context(|| "reading a command's output".into())?;
                        exit.await?
                    }
                    code = &mut exit => {
                        // What it wrote before it ended is in the pipes already.
                        let _ = tokio::time::timeout(Duration::from_millis(100), reading).await;
                        code?
                    }
                }
            };
            Ok(ExecOutput { stdout, stderr, exit_code })
        };
        async move {
            tokio::time::timeout(timeout, work).await.map_err(|_| RuntimeError::Timeout {
                what: format!("a command in container {}", short(id)),
                seconds: timeout.as_secs(),
            })?
        }
        .boxed()
    }

    fn exec<'a>(&'a self, id: &'a str, request: ExecRequest) -> BoxFuture<'a, Result<Session>> {
        self.start_exec(id, request).boxed()
    }

    fn attach<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Session>> {
        self.start_attach(id).boxed()
    }

    fn dial<'a>(
        &'a self,
        sandbox: &'a str,
        address: IpAddr,
        port: u16,
    ) -> BoxFuture<'a, Result<tokio::net::TcpStream>> {
        async move {
            let request = Request::Socket { ipv6: address.is_ipv6() };
            let mut answer = client::ask(&self.socket(sandbox), &request, Vec::new()).await?;
            let fd = answer.fds.pop().ok_or_else(|| RuntimeError::Helper("it sent no socket".to_owned()))?;
            let socket = tokio::net::TcpSocket::from_std_stream(std::net::TcpStream::from(fd));
            socket
                .connect(SocketAddr::new(address, port))
                .await
                .context(|| format!("cannot connect to port {port} inside the pod"))
        }
        .boxed()
    }

    fn container_usage<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<(Option<u64>, Option<u64>)>> {
        async move {
            let status = self.container(id)?;
            Ok(self.pod_cgroup(&status.sandbox_id)?.child(id).usage())
        }
        .boxed()
    }

    fn events(&self) -> broadcast::Receiver<RuntimeEvent> {
        self.0.events.subscribe()
    }
}

impl Builtin {
    fn create(&self, sandbox: &str, config: ContainerConfig) -> Result<String> {
        let id = new_id()?;
        let image = self.image(&config.image)?;
        let spec =
            self.with_surroundings(sandbox, &id, &config, &image, |around| spec::oci_spec(&config, around))??;
        let bundle = self.bundle(sandbox, &id);
        let status = ContainerStatus {
            id: id.clone(),
            sandbox_id: sandbox.to_owned(),
            image_ref: image.pulled_as(&config.image).unwrap_or(&image.id).to_owned(),
            image_id: image.id,
            config,
            created_at: jiff::Timestamp::now(),
            state: ContainerState::Created,
        };
        std::fs::create_dir_all(&bundle).context(|| format!("cannot make {}", bundle.display()))?;
        self.images().pin(&status.image_id, &id, &bundle)?;
        let bytes = serde_json::to_vec(&spec).expect("plain data");
        std::fs::write(bundle.join("config.json"), bytes).context(|| "cannot write config.json".into())?;
        self.container_record(sandbox, &id).save(&status)?;
        self.state().containers.insert(id.clone(), status);
        self.announce(sandbox);
        Ok(id)
    }

    fn image(&self, reference: &str) -> Result<Image> {
        self.images().find(reference)?.ok_or_else(|| RuntimeError::ImageMissing(reference.to_owned()))
    }

    fn with_surroundings<T>(
        &self,
        sandbox: &str,
        id: &str,
        config: &ContainerConfig,
        image: &Image,
        work: impl FnOnce(&spec::Surroundings<'_>) -> T,
    ) -> Result<T> {
        let (pod, pod_init) = {
            let state = self.state();
            let found = state.sandboxes.get(sandbox).ok_or_else(|| not_found("sandbox", sandbox))?;
            if !found.ready {
                return Err(RuntimeError::SandboxNotReady { id: sandbox.to_owned() });
            }
            (found.record.config.clone(), found.record.init)
        };
        let layers = self.images().layer_paths(image);
        let user = spec::resolve_user(&config.security, &image.config.user, &layers)?;
        Ok(work(&spec::Surroundings {
            sandbox: &pod,
            sandbox_directory: &self.sandbox_directory(sandbox),
            image,
            user,
            cgroup: &self.pod_cgroup(sandbox)?.child(id).path(),
            pod_init,
            own_capabilities: self.0.own_capabilities,
        }))
    }

    async fn start(&self, id: &str) -> Result<()> {
        let status = self.container(id)?;
        if status.state != ContainerState::Created {
            return Err(RuntimeError::InvalidConfig(format!("container {id} was started before: create another")));
        }
        let image = self.image(&status.image_id)?;
        let run = Run {
            id: id.to_owned(),
            bundle: self.bundle(&status.sandbox_id, id),
            layers_base: self.images().layers_directory(),
            layers: self.images().layer_paths(&image),
            tty: status.config.tty,
            stdin: status.config.stdin,
            stdin_once: status.config.stdin_once,
            log_path: status.config.log_path.clone(),
            cgroup: self.pod_cgroup(&status.sandbox_id)?.child(id).path(),
            oom_score_adj: status.config.resources.oom_score_adj,
        };
        match client::ask(&self.socket(&status.sandbox_id), &Request::Run(run), Vec::new()).await {
            Ok(client::Answer { reply: Reply::Started(started), .. }) => {
                if let Some(container) = self.state().containers.get_mut(id) {
                    // It may have ended before this answer was read.
                    match &mut container.state {
                        ContainerState::Created => container.state = ContainerState::Running(started),
                        ContainerState::Exited { started: known, .. } => *known = Some(started),
                        ContainerState::Running(_) => {}
                    }
                }
                self.announce(&status.sandbox_id);
                Ok(())
            }
            Ok(_) => Err(RuntimeError::Helper("an answer to another question".to_owned())),
            Err(e) => {
                if let RuntimeError::StartFailed(message) = &e {
                    // 128: what a shell and containerd answer for a command that could not be started.
                    let exit = Exit {
                        code: 128,
                        signal: None,
                        oom_killed: false,
                        at: jiff::Timestamp::now(),
                        message: message.clone(),
                    };
                    let bytes = serde_json::to_vec(&exit).expect("plain data");
                    write_atomically(&self.bundle(&status.sandbox_id, id).join(EXIT), &bytes)
                        .context(|| "cannot record a failed start".into())?;
                    self.container_ended(id, exit);
                }
                Err(e)
            }
        }
    }

    async fn stop(&self, id: &str, grace: Duration) -> Result<()> {
        let status = self.container(id)?;
        if !status.state.is_running() {
            return Ok(());
        }
        if !grace.is_zero() {
            let name = self.images().find(&status.image_id)?.map(|i| i.config.stop_signal).unwrap_or_default();
            self.signal(&status, stop_signal(&name)).await?;
            if self.wait_for_exit(id, grace).await? {
                return Ok(());
            }
        }
        self.signal(&status, nix::libc::SIGKILL).await?;
        let patience = Duration::from_secs(30);
        match self.wait_for_exit(id, patience).await? {
            true => Ok(()),
            false => Err(RuntimeError::Timeout { what: format!("killed container {id}"), seconds: patience.as_secs() }),
        }
    }

    async fn signal(&self, status: &ContainerStatus, signal: i32) -> Result<()> {
        let request = Request::Signal { id: status.id.clone(), signal };
        client::ask(&self.socket(&status.sandbox_id), &request, Vec::new()).await.map(drop)
    }

    async fn start_exec(&self, id: &str, request: ExecRequest) -> Result<Session> {
        let status = self.container(id)?;
        if !status.state.is_running() {
            return Err(RuntimeError::NotRunning { id: id.to_owned() });
        }
        let image = self.image(&status.image_id)?;
        let config =
            ContainerConfig { command: request.command, args: Vec::new(), tty: request.tty, ..status.config.clone() };
        let process =
            self.with_surroundings(&status.sandbox_id, id, &config, &image, |around| spec::process(&config, around))??;
        let file = self.bundle(&status.sandbox_id, id).join(format!("exec-{}.json", short(&new_id()?)));
        std::fs::write(&file, process.to_string()).context(|| format!("cannot write {}", file.display()))?;
        let result = self.ask_exec(&status, &file, request.stdin, request.tty).await;
        gone(std::fs::remove_file(&file)).context(|| format!("cannot remove {}", file.display()))?;
        result
    }

    async fn ask_exec(&self, status: &ContainerStatus, file: &Path, stdin: bool, tty: bool) -> Result<Session> {
        let message = Request::Exec { id: status.id.clone(), process: file.to_owned(), tty };
        let socket = self.socket(&status.sandbox_id);
        let what = || "cannot make a pipe".to_owned();
        if tty {
            let mut answer = client::ask(&socket, &message, Vec::new()).await?;
            let master = answer.fds.pop().ok_or_else(|| RuntimeError::Helper("it sent no terminal".to_owned()))?;
            let master = Master::new(master).context(what)?;
            return Ok(Session {
                stdin: stdin.then(|| Box::new(master.clone()) as _),
                stdout: Some(Box::new(master.clone())),
                stderr: None,
                terminal: Some(Box::new(master)),
                exit: exit_of(answer.more).boxed(),
            });
        }
        let (child_in, our_in) = if stdin {
            let (read, write) = pipe2().context(what)?;
            (read, Some(write))
        } else {
            (std::fs::File::open("/dev/null").context(|| "cannot open /dev/null".into())?.into(), None)
        };
        let (our_out, child_out) = pipe2().context(what)?;
        let (our_err, child_err) = pipe2().context(what)?;
        let answer = client::ask(&socket, &message, vec![child_in, child_out, child_err]).await?;
        Ok(Session {
            stdin: our_in
                .map(|fd| pipe::Sender::from_owned_fd(fd).map(|s| Box::new(s) as _))
                .transpose()
                .context(what)?,
            stdout: Some(Box::new(pipe::Receiver::from_owned_fd(our_out).context(what)?)),
            stderr: Some(Box::new(pipe::Receiver::from_owned_fd(our_err).context(what)?)),
            terminal: None,
            exit: exit_of(answer.more).boxed(),
        })
    }

    async fn start_attach(&self, id: &str) -> Result<Session> {
        let status = self.container(id)?;
        if !status.state.is_running() {
            return Err(RuntimeError::NotRunning { id: id.to_owned() });
        }
        let what = || "cannot make a pipe".to_owned();
        let (our_out, their_out) = pipe2().context(what)?;
        let (our_err, their_err) = pipe2().context(what)?;
        let request = Request::Attach { id: id.to_owned() };
        let mut answer = client::ask(&self.socket(&status.sandbox_id), &request, vec![their_out, their_err]).await?;
        let (mut stdin, mut terminal) = (None, None);
        if let Some(fd) = answer.fds.pop() {
            if status.config.tty {
                let master = Master::new(fd).context(what)?;
                stdin = Some(Box::new(master.clone()) as _);
                terminal = Some(Box::new(master) as _);
            } else {
                stdin = Some(Box::new(pipe::Sender::from_owned_fd(fd).context(what)?) as _);
            }
        }
        let (this, id) = (self.clone(), id.to_owned());
        let exit = async move {
            // As long as it takes; dropping the session ends the wait.
            while !this.wait_for_exit(&id, Duration::from_secs(3600)).await? {}
            Ok(this.container(&id)?.state.exit().map_or(0, |e| e.code))
        };
        Ok(Session {
            stdin,
            stdout: Some(Box::new(pipe::Receiver::from_owned_fd(our_out).context(what)?)),
            stderr: Some(Box::new(pipe::Receiver::from_owned_fd(our_err).context(what)?)),
            terminal,
            exit: exit.boxed(),
        })
    }
}

async fn exit_of(mut lines: client::Lines) -> Result<i32> {
    match lines.next().await {
        Some(Reply::Exited { exit, .. }) => Ok(exit.code),
        Some(Reply::Failed(message)) => Err(RuntimeError::StartFailed(message)),
        _ => Err(RuntimeError::Helper("it ended before the command did".to_owned())),
    }
}

fn pipe2() -> std::io::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?)
}

/// An image's STOPSIGNAL: a name with or without SIG, or a number.
fn stop_signal(name: &str) -> i32 {
    if let Ok(number) = name.parse::<i32>() {
        return number;
    }
    let full = if name.starts_with("SIG") { name.to_owned() } else { format!("SIG{name}") };
    full.parse::<nix::sys::signal::Signal>().map_or(nix::libc::SIGTERM, |s| s as i32)
}

impl ImageService for Builtin {
    fn image_status<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, Result<Option<ImageStatus>, ImageError>> {
        std::future::ready(self.images().find(reference).map(|i| i.map(|i| i.status()))).boxed()
    }

    fn list_images(&self) -> BoxFuture<'_, Result<Vec<ImageStatus>, ImageError>> {
        std::future::ready(self.images().list().map(|all| all.iter().map(Image::status).collect())).boxed()
    }

    fn pull_image<'a>(
        &'a self,
        reference: &'a str,
        auth: Option<PullAuth>,
    ) -> BoxFuture<'a, Result<String, ImageError>> {
        async move { Ok(self.images().pull(reference, auth, &self.0.config.pull).await?.id) }.boxed()
    }

    fn remove_image<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, Result<(), ImageError>> {
        let (images, reference) = (self.images().clone(), reference.to_owned());
        async move {
            tokio::task::spawn_blocking(move || images.remove(&reference))
                .await
                .map_err(|e| ImageError::Broken(format!("removing was interrupted: {e}")))?
        }
        .boxed()
    }
}
