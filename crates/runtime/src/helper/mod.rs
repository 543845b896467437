//! The pod's helper: one small process a pod, which is its pause process too.
//!
//! It holds the pod's namespaces, starts its containers, reaps them, and copies their output into log files, so that
//! none of these need the agent to be alive. It has one thread and sleeps in poll(2). libcontainer forks and runs Rust
//! in the child before exec; that is sound here and would not be in the agent with its many threads.

mod container;
mod log;
pub(crate) mod protocol;
mod server;

use std::fs;
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::path::Path;

use linux::cgroup::Cgroup;
use linux::{mount, process};
use nix::sched::CloneFlags;
use nix::sys::signal::{SigSet, Signal};

use protocol::{Ready, Start};

/// Runs as a pod's helper until the pod ends. `arguments` is what followed the subcommand: the path of a `Start`.
///
/// Call it before any thread exists.
pub fn main(arguments: &[String]) -> ! {
    let result = match arguments {
        [path] => prepare(Path::new(path)),
        _ => Err(io::Error::other("usage: pod-helper START.json; fairlead starts this itself")),
    };
    let (ready, code) = match result {
        Ok((start, listener, init)) => {
            announce(&Ready::Listening { init });
            (None, server::serve(start, listener))
        }
        Err(e) => (Some(Ready::Failed(e.to_string())), 1),
    };
    if let Some(ready) = ready {
        announce(&ready);
    }
    std::process::exit(code)
}

fn announce(ready: &Ready) {
    let line = serde_json::to_string(ready).expect("plain data");
    let mut out = io::stdout();
    // Nobody may be left to read it; then the next agent finds the socket.
    let _ = writeln!(out, "{line}");
    let _ = out.flush();
    if let Ok(null) = fs::File::options().read(true).write(true).open("/dev/null") {
        let _ = nix::unistd::dup2(null.as_raw_fd(), 1);
    }
}

fn prepare(path: &Path) -> io::Result<(Start, UnixListener, Option<i32>)> {
    let what = |what: &str| {
        let what = what.to_owned();
        move |e: io::Error| io::Error::new(e.kind(), format!("{what}: {e}"))
    };
    let start: Start = serde_json::from_slice(&fs::read(path)?)?;
    // A Ctrl-C at the agent's terminal does not reach the pods.
    nix::unistd::setsid().map_err(io::Error::from).map_err(what("setsid"))?;
    process::become_subreaper().map_err(what("becoming a subreaper"))?;
    // Best effort: lowering it needs CAP_SYS_RESOURCE.
    let _ = fs::write("/proc/self/oom_score_adj", "-998");
    Cgroup::new(&start.cgroup)?.child("helper").add(std::process::id() as i32).map_err(what("joining the cgroup"))?;

    mount::unshare_mounts().map_err(what("unsharing mounts"))?;
    for tmpfs in &start.tmpfs {
        fs::create_dir_all(&tmpfs.path)?;
        let options = match tmpfs.size {
            Some(size) => format!("mode=1777,size={size}"),
            None => "mode=1777".to_owned(),
        };
        mount::mount_tmpfs(&tmpfs.path, &options).map_err(what("mounting a tmpfs"))?;
    }

    let mut flags = CloneFlags::empty();
    if !start.host_network {
        // Pods on the host's network also keep the host's name.
        flags |= CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWUTS;
    }
    if !start.host_ipc {
        flags |= CloneFlags::CLONE_NEWIPC;
    }
    nix::sched::unshare(flags).map_err(io::Error::from).map_err(what("unsharing namespaces"))?;
    if !start.host_network {
        nix::unistd::sethostname(&start.hostname).map_err(io::Error::from).map_err(what("setting the hostname"))?;
        process::bring_loopback_up().map_err(what("bringing lo up"))?;
    }
    for (name, value) in &start.sysctls {
        let path = Path::new("/proc/sys").join(name.replace('.', "/"));
        fs::write(&path, value).map_err(what(&format!("setting sysctl {name}")))?;
    }
    let init = match start.own_process_namespace {
        true => Some(process::fork_pid_namespace_init().map_err(what("making a process namespace"))?),
        false => None,
    };

    fs::create_dir_all(&start.state)?;
    if start.socket.exists() {
        fs::remove_file(&start.socket)?;
    }
    let listener = UnixListener::bind(&start.socket).map_err(what("listening"))?;
    listener.set_nonblocking(true)?;
    // No directory stays busy because of us.
    std::env::set_current_dir("/")?;
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.add(Signal::SIGTERM);
    mask.thread_block()?;
    Ok((start, listener, init))
}
