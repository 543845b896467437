//! Starts one container, or one more process in it, with libcontainer.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::syscall::SyscallType;
use libcontainer::workload::default::DefaultExecutor;
use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use linux::fdpass::receive_with_fds;
use linux::mount::{Overlay, mount_overlay, unmount};
use linux::process;

use super::protocol::Run;

/// What the helper keeps at hand of a process it started.
pub struct Streams {
    pub stdin: Option<OwnedFd>,
    pub stdout: Option<OwnedFd>,
    pub stderr: Option<OwnedFd>,
    /// Instead of the three above.
    pub terminal: Option<OwnedFd>,
}

/// Runs the workload with the signals of a fresh process, and lets it die with the helper.
#[derive(Clone)]
struct PodExecutor;

impl Executor for PodExecutor {
    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        process::die_with_parent()
            .and_then(|()| process::restore_default_signals())
            .map_err(|e| ExecutorError::Other(format!("preparing signals: {e}")))?;
        DefaultExecutor {}.exec(spec)
    }

    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        DefaultExecutor {}.validate(spec)
    }
}

/// Creates and starts a container; returns its first process.
pub fn run(state: &Path, run: &Run) -> Result<(i32, Streams), String> {
    let rootfs = run.bundle.join("rootfs");
    let (upper, work) = (run.bundle.join("upper"), run.bundle.join("work"));
    for directory in [&rootfs, &upper, &work] {
        fs::create_dir_all(directory).map_err(|e| format!("cannot make {}: {e}", directory.display()))?;
    }
    let overlay = Overlay { lower: &run.layers, upper: &upper, work: &work };
    mount_overlay(&overlay, &run.layers_base, &rootfs)
        .map_err(|e| format!("cannot mount the root file system: {e}"))?;
    let started = start(state, run);
    if started.is_err() {
        let _ = unmount(&rootfs);
        let _ = fs::remove_dir_all(state.join(&run.id));
    }
    started
}

fn start(state: &Path, run: &Run) -> Result<(i32, Streams), String> {
    let mut streams = Streams { stdin: None, stdout: None, stderr: None, terminal: None };
    let mut builder = ContainerBuilder::new(run.id.clone(), SyscallType::default())
        .with_executor(PodExecutor)
        .with_root_path(state)
        .map_err(cause)?;
    let console = run.tty.then(|| Console::listen(state, &run.id)).transpose().map_err(|e| e.to_string())?;
    if let Some(console) = &console {
        builder = builder.with_console_socket(Some(&console.path));
    } else {
        let pipe = || nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|e| format!("cannot make a pipe: {e}"));
        let (stdout, child_stdout) = pipe()?;
        let (stderr, child_stderr) = pipe()?;
        let child_stdin = if run.stdin {
            let (child_stdin, stdin) = pipe()?;
            streams.stdin = Some(stdin);
            child_stdin
        } else {
            fs::File::open("/dev/null").map_err(|e| format!("cannot open /dev/null: {e}"))?.into()
        };
        streams.stdout = Some(stdout);
        streams.stderr = Some(stderr);
        builder = builder.with_stdin(child_stdin).with_stdout(child_stdout).with_stderr(child_stderr);
    }
    let mut container = builder.as_init(&run.bundle).with_systemd(false).with_detach(true).build().map_err(cause)?;
    if let Some(console) = console {
        streams.terminal = Some(console.accept().map_err(|e| format!("cannot get the terminal: {e}"))?);
    }
    container.start().map_err(cause)?;
    let pid = container.pid().ok_or("the container has no process")?.as_raw();
    Ok((pid, streams))
}

/// Starts one more process in a running container.
pub fn exec(
    state: &Path,
    id: &str,
    process: &Path,
    tty: bool,
    mut fds: Vec<OwnedFd>,
    name: &str,
) -> Result<(i32, Option<OwnedFd>), String> {
    let mut builder = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_executor(PodExecutor)
        .with_root_path(state)
        .map_err(cause)?;
    let console = tty.then(|| Console::listen(state, name)).transpose().map_err(|e| e.to_string())?;
    match &console {
        Some(console) => builder = builder.with_console_socket(Some(&console.path)),
        None if fds.len() == 3 => {
            let (stderr, stdout, stdin) = (fds.pop(), fds.pop(), fds.pop());
            if let (Some(stdin), Some(stdout), Some(stderr)) = (stdin, stdout, stderr) {
                builder = builder.with_stdin(stdin).with_stdout(stdout).with_stderr(stderr);
            }
        }
        None => return Err("exec without a terminal wants three descriptors".to_owned()),
    }
    let pid = builder.as_tenant().with_detach(true).with_process(Some(process)).build().map_err(cause)?;
    let terminal = match console {
        Some(console) => Some(console.accept().map_err(|e| format!("cannot get the terminal: {e}"))?),
        None => None,
    };
    Ok((pid.as_raw(), terminal))
}

/// After a container's end: its root file system and libcontainer's notes go, its written files stay.
pub fn clean(state: &Path, id: &str, bundle: &Path) -> io::Result<()> {
    unmount(&bundle.join("rootfs"))?;
    match fs::remove_dir_all(state.join(id)) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

/// The socket over which a container's init sends the master side of the terminal it made.
struct Console {
    path: PathBuf,
    listener: UnixListener,
}

impl Console {
    fn listen(state: &Path, name: &str) -> io::Result<Console> {
        let path = state.join(format!("{}.tty", &name[..name.len().min(16)]));
        if path.exists() {
            fs::remove_file(&path)?;
        }
        Ok(Console { listener: UnixListener::bind(&path)?, path })
    }

    fn accept(self) -> io::Result<OwnedFd> {
        // The connection was made before the container was created, so this does not wait for long.
        let (socket, _) = self.listener.accept()?;
        let mut buffer = [0; 256];
        let (_, mut fds) = receive_with_fds(&socket, &mut buffer)?;
        fds.pop().ok_or_else(|| io::Error::other("the container sent no terminal"))
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// libcontainer's errors with everything below them, in one line.
fn cause(error: impl std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(inner) = source {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        source = inner.source();
    }
    text
}

/// Nonblocking, for a loop that must never wait on one of them.
pub fn set_nonblocking(fd: &OwnedFd) -> io::Result<()> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_retain(fcntl(fd.as_raw_fd(), FcntlArg::F_GETFL)?);
    fcntl(fd.as_raw_fd(), FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    Ok(())
}
