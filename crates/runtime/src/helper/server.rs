//! The helper's loop: requests, ended processes, and output to be logged.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use linux::cgroup::Cgroup;
use linux::fdpass::{receive_with_fds, send_with_fds};
use linux::process::{PidFd, ProcessId};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use super::container;
use super::log::{Log, Stream};
use super::protocol::{EXIT, Reply, Request, Run, STARTED, Start};
use crate::files::write_atomically;
use crate::types::{Exit, Started};

/// A request is a few paths and names.
const REQUEST_LIMIT: usize = 1 << 20;
const CHUNK: usize = 32 * 1024;

struct Container {
    run: Run,
    pid: i32,
    log: Log,
    stdin: Option<OwnedFd>,
    /// What to read the output from: a pipe for each stream, or the terminal alone.
    outputs: Vec<(OwnedFd, Stream)>,
    /// Attached clients: where their copies go.
    copies: Vec<(OwnedFd, Stream)>,
    attached_once: bool,
}

/// A connection whose request is still coming in.
struct Incoming {
    stream: UnixStream,
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

struct Server {
    start: Start,
    containers: BTreeMap<String, Container>,
    exits: BTreeMap<String, Exit>,
    incoming: HashMap<RawFd, Incoming>,
    /// Connections that wait for the end of an `exec`ed process, by its pid.
    execs: HashMap<i32, UnixStream>,
    watchers: Vec<UnixStream>,
    exec_count: u64,
    ending: bool,
}

/// What a descriptor in the poll set is for.
enum Source {
    Listener,
    Signals,
    Incoming(RawFd),
    Output(String, RawFd),
    /// Only to see it close.
    Watcher(RawFd),
    Exec(i32),
}

pub fn serve(start: Start, listener: UnixListener) -> i32 {
    let mut mask = SigSet::empty();
    mask.add(Signal::SIGCHLD);
    mask.add(Signal::SIGTERM);
    let signals = match SignalFd::with_flags(&mask, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC) {
        Ok(signals) => signals,
        Err(e) => {
            eprintln!("cannot receive signals: {e}");
            return 1;
        }
    };
    let mut server = Server {
        start,
        containers: BTreeMap::new(),
        exits: BTreeMap::new(),
        incoming: HashMap::new(),
        execs: HashMap::new(),
        watchers: Vec::new(),
        exec_count: 0,
        ending: false,
    };
    while !server.ending {
        if let Err(e) = server.turn(&listener, &signals) {
            // Nothing to do but go on: the containers must not die of it.
            eprintln!("helper: {e}");
        }
    }
    server.end();
    0
}

impl Server {
    fn turn(&mut self, listener: &UnixListener, signals: &SignalFd) -> io::Result<()> {
        let mut sources = vec![Source::Listener, Source::Signals];
        let mut fds =
            vec![PollFd::new(listener.as_fd(), PollFlags::POLLIN), PollFd::new(signals.as_fd(), PollFlags::POLLIN)];
        for (fd, incoming) in &self.incoming {
            sources.push(Source::Incoming(*fd));
            fds.push(PollFd::new(incoming.stream.as_fd(), PollFlags::POLLIN));
        }
        for watcher in &self.watchers {
            sources.push(Source::Watcher(watcher.as_raw_fd()));
            fds.push(PollFd::new(watcher.as_fd(), PollFlags::POLLIN));
        }
        for (pid, stream) in &self.execs {
            sources.push(Source::Exec(*pid));
            fds.push(PollFd::new(stream.as_fd(), PollFlags::POLLIN));
        }
        for (id, container) in &self.containers {
            for (output, _) in &container.outputs {
                sources.push(Source::Output(id.clone(), output.as_raw_fd()));
                fds.push(PollFd::new(output.as_fd(), PollFlags::POLLIN));
            }
        }
        match poll(&mut fds, PollTimeout::NONE) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
        }
        let ready: Vec<Source> = sources
            .into_iter()
            .zip(&fds)
            .filter(|(_, fd)| fd.revents().is_some_and(|events| !events.is_empty()))
            .map(|(source, _)| source)
            .collect();
        drop(fds);
        for source in ready {
            match source {
                Source::Listener => self.accept(listener),
                Source::Signals => {
                    while let Ok(Some(signal)) = signals.read_signal() {
                        self.ending |= signal.ssi_signo == Signal::SIGTERM as u32;
                    }
                    self.reap();
                }
                Source::Incoming(fd) => self.receive(fd),
                Source::Output(id, fd) => {
                    if let Some(container) = self.containers.get_mut(&id) {
                        container.copy(fd);
                    }
                }
                Source::Exec(pid) => {
                    // Whoever wanted it has gone, after a timeout for example. Unless it was reaped in this very turn,
                    // the process still exists and its pid means nobody else.
                    if self.execs.remove(&pid).is_some() {
                        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
                    }
                }
                Source::Watcher(fd) => self.watchers.retain(|w| w.as_raw_fd() != fd),
            }
        }
        Ok(())
    }

    fn accept(&mut self, listener: &UnixListener) {
        while let Ok((stream, _)) = listener.accept() {
            if stream.set_nonblocking(true).is_ok() {
                let fd = stream.as_raw_fd();
                self.incoming.insert(fd, Incoming { stream, bytes: Vec::new(), fds: Vec::new() });
            }
        }
    }

    fn receive(&mut self, fd: RawFd) {
        let Some(incoming) = self.incoming.get_mut(&fd) else { return };
        let mut buffer = [0; 4096];
        match receive_with_fds(&incoming.stream, &mut buffer) {
            Ok((n, fds)) if n > 0 => {
                incoming.bytes.extend_from_slice(&buffer[..n]);
                incoming.fds.extend(fds);
                if buffer[..n].contains(&b'\n') {
                    if let Some(whole) = self.incoming.remove(&fd) {
                        self.handle(whole);
                    }
                } else if incoming.bytes.len() > REQUEST_LIMIT {
                    self.incoming.remove(&fd);
                }
            }
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            _ => {
                self.incoming.remove(&fd);
            }
        }
    }

    fn handle(&mut self, Incoming { stream, bytes, fds }: Incoming) {
        let request = match serde_json::from_slice::<Request>(&bytes) {
            Ok(request) => request,
            Err(e) => return reply(&stream, &Reply::Failed(format!("unreadable request: {e}")), &[]),
        };
        match request {
            Request::Run(run) => {
                let answer = match self.run(run) {
                    Ok(started) => Reply::Started(started),
                    Err(message) => Reply::Failed(message),
                };
                reply(&stream, &answer, &[]);
            }
            Request::Signal { id, signal } => {
                let answer = match self.containers.get(&id) {
                    Some(container) => {
                        match Signal::try_from(signal).and_then(|s| kill(Pid::from_raw(container.pid), s)) {
                            Ok(()) | Err(Errno::ESRCH) => Reply::Done,
                            Err(e) => Reply::Failed(format!("cannot signal container {id}: {e}")),
                        }
                    }
                    None => Reply::Done,
                };
                reply(&stream, &answer, &[]);
            }
            Request::Exec { id, process, tty } => {
                self.exec_count += 1;
                let name = format!("exec{}", self.exec_count);
                match container::exec(&self.start.state, &id, &process, tty, fds, &name) {
                    Ok((pid, terminal)) => {
                        let terminal: Vec<RawFd> = terminal.iter().map(AsRawFd::as_raw_fd).collect();
                        reply(&stream, &Reply::Started(started(pid)), &terminal);
                        self.execs.insert(pid, stream);
                    }
                    Err(message) => reply(&stream, &Reply::Failed(message), &[]),
                }
                // Its end may have been seen before it was listed.
                self.reap();
            }
            Request::Attach { id } => self.attach(&stream, &id, fds),
            Request::Socket { ipv6 } => {
                let family = if ipv6 { AddressFamily::Inet6 } else { AddressFamily::Inet };
                let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
                match socket(family, SockType::Stream, flags, None) {
                    Ok(fd) => reply(&stream, &Reply::Done, &[fd.as_raw_fd()]),
                    Err(e) => reply(&stream, &Reply::Failed(format!("cannot make a socket: {e}")), &[]),
                }
            }
            Request::Watch => {
                for (id, exit) in &self.exits {
                    reply(&stream, &Reply::Exited { id: id.clone(), exit: exit.clone() }, &[]);
                }
                self.watchers.push(stream);
            }
            Request::Shutdown => {
                self.ending = true;
                reply(&stream, &Reply::Done, &[]);
            }
        }
    }

    fn run(&mut self, run: Run) -> Result<Started, String> {
        if self.containers.contains_key(&run.id) || self.exits.contains_key(&run.id) {
            return Err(format!("container {} was started before", run.id));
        }
        if let Some(directory) = run.log_path.parent() {
            fs::create_dir_all(directory).map_err(|e| format!("cannot make {}: {e}", directory.display()))?;
        }
        let log = Log::open(&run.log_path).map_err(|e| format!("cannot open {}: {e}", run.log_path.display()))?;
        let (pid, streams) = container::run(&self.start.state, &run)?;
        let started = started(pid);
        let bytes = serde_json::to_vec(&started).expect("plain data");
        if let Err(e) = write_atomically(&run.bundle.join(STARTED), &bytes) {
            eprintln!("container {}: cannot write {STARTED}: {e}", run.id);
        }
        if let Some(score) = run.oom_score_adj {
            // Best effort: lowering it needs CAP_SYS_RESOURCE.
            let _ = fs::write(format!("/proc/{pid}/oom_score_adj"), score.to_string());
        }
        let mut stdin = streams.stdin;
        let mut outputs = Vec::new();
        if let Some(terminal) = streams.terminal {
            stdin = terminal.try_clone().ok();
            outputs.push((terminal, Stream::Stdout));
        }
        outputs.extend(streams.stdout.map(|fd| (fd, Stream::Stdout)));
        outputs.extend(streams.stderr.map(|fd| (fd, Stream::Stderr)));
        for (fd, _) in &outputs {
            container::set_nonblocking(fd).map_err(|e| e.to_string())?;
        }
        let id = run.id.clone();
        let container = Container { run, pid, log, stdin, outputs, copies: Vec::new(), attached_once: false };
        self.containers.insert(id, container);
        // It may have ended already, before anybody knew its name.
        self.reap();
        Ok(started)
    }

    fn attach(&mut self, stream: &UnixStream, id: &str, fds: Vec<OwnedFd>) {
        let Some(container) = self.containers.get_mut(id) else {
            return reply(stream, &Reply::Failed(format!("container {id} is not running")), &[]);
        };
        for (fd, kind) in fds.into_iter().zip([Stream::Stdout, Stream::Stderr]) {
            // A client that does not read loses output; the container never waits for it.
            if container::set_nonblocking(&fd).is_ok() {
                container.copies.push((fd, kind));
            }
        }
        let stdin: Vec<RawFd> = container.stdin.iter().map(AsRawFd::as_raw_fd).collect();
        reply(stream, &Reply::Attached, &stdin);
        if container.run.stdin_once && !container.run.tty && !container.attached_once {
            // The client now holds the only end: when it goes, the container reads the end of its input.
            container.stdin = None;
        }
        container.attached_once = true;
    }

    fn reap(&mut self) {
        loop {
            let (pid, code, signal) = match waitpid(None, Some(WaitPidFlag::WNOHANG | WaitPidFlag::__WALL)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid.as_raw(), code, None),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid.as_raw(), 128 + signal as i32, Some(signal as i32)),
                Err(Errno::EINTR) => continue,
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => continue,
            };
            let mut exit = Exit { code, signal, oom_killed: false, at: jiff::Timestamp::now(), message: String::new() };
            if let Some(stream) = self.execs.remove(&pid) {
                reply(&stream, &Reply::Exited { id: String::new(), exit }, &[]);
                continue;
            }
            let Some(id) = self.containers.values().find(|c| c.pid == pid).map(|c| c.run.id.clone()) else { continue };
            let Some(mut container) = self.containers.remove(&id) else { continue };
            exit.oom_killed = container.end();
            let bytes = serde_json::to_vec(&exit).expect("plain data");
            if let Err(e) = write_atomically(&container.run.bundle.join(EXIT), &bytes) {
                eprintln!("container {id}: cannot write {EXIT}: {e}");
            }
            if let Err(e) = container::clean(&self.start.state, &id, &container.run.bundle) {
                eprintln!("container {id}: cannot clean up: {e}");
            }
            let message = Reply::Exited { id: id.clone(), exit: exit.clone() };
            self.watchers.iter().for_each(|watcher| reply(watcher, &message, &[]));
            self.exits.insert(id, exit);
        }
    }

    /// Nothing of the pod outlives its helper.
    fn end(&mut self) {
        let pids: Vec<i32> = self.containers.values().map(|c| c.pid).collect();
        for pid in &pids {
            let _ = kill(Pid::from_raw(*pid), Signal::SIGKILL);
        }
        for pid in pids {
            if let Ok(process) = PidFd::open(pid) {
                let _ = process.wait(Duration::from_secs(5));
            }
            self.reap();
        }
        let _ = fs::remove_file(&self.start.socket);
        let _ = fs::remove_dir_all(&self.start.state);
    }
}

impl Container {
    /// Moves what one output holds into the log and to attached clients.
    fn copy(&mut self, fd: RawFd) {
        let Some(index) = self.outputs.iter().position(|(output, _)| output.as_raw_fd() == fd) else { return };
        if !self.copy_once(index) {
            self.outputs.remove(index);
        }
    }

    /// False at the end of the output.
    fn copy_once(&mut self, index: usize) -> bool {
        let (output, stream) = &self.outputs[index];
        let stream = *stream;
        let mut buffer = [0; CHUNK];
        match nix::unistd::read(output.as_raw_fd(), &mut buffer) {
            // A terminal whose last user has gone answers EIO.
            Ok(0) | Err(Errno::EIO) => false,
            Ok(n) => {
                if let Err(e) = self.log.write(stream, &buffer[..n], jiff::Timestamp::now()) {
                    eprintln!("container {}: cannot log: {e}", self.run.id);
                }
                self.copies.retain(|(copy, kind)| {
                    *kind != stream
                        || !matches!(nix::unistd::write(copy.as_fd(), &buffer[..n]), Err(e) if e != Errno::EAGAIN)
                });
                true
            }
            Err(Errno::EAGAIN | Errno::EINTR) => true,
            Err(_) => false,
        }
    }

    /// Ends what the first process left behind and saves the last output. True when memory ran out.
    fn end(&mut self) -> bool {
        let mut oom = false;
        if let Ok(cgroup) = Cgroup::new(&self.run.cgroup) {
            oom = cgroup.oom_kills() > 0;
            if let Err(e) = cgroup.kill(Duration::from_secs(5)) {
                eprintln!("container {}: {e}", self.run.id);
            }
            if let Err(e) = cgroup.remove() {
                eprintln!("container {}: cannot remove its cgroup: {e}", self.run.id);
            }
        }
        for index in (0..self.outputs.len()).rev() {
            loop {
                let mut fds = [PollFd::new(self.outputs[index].0.as_fd(), PollFlags::POLLIN)];
                if !matches!(poll(&mut fds, PollTimeout::ZERO), Ok(n) if n > 0) || !self.copy_once(index) {
                    break;
                }
            }
        }
        if let Err(e) = self.log.finish(jiff::Timestamp::now()) {
            eprintln!("container {}: cannot log: {e}", self.run.id);
        }
        oom
    }
}

fn started(pid: i32) -> Started {
    let start_time = ProcessId::of(pid).map(|p| p.start_time).unwrap_or(0);
    Started { pid, start_time, at: jiff::Timestamp::now() }
}

/// To somebody who may have gone.
fn reply(stream: &UnixStream, reply: &Reply, fds: &[RawFd]) {
    let mut line = serde_json::to_vec(reply).expect("plain data");
    line.push(b'\n');
    let _ = send_with_fds(stream, &line, fds);
}
