//! Clients that ask an HTTP server at a steady rate from a place in the lab, and count what went wrong.
//!
//! One on a node is a process of its own: the ebpf mode serves those in the node's cgroup.

use std::fmt::{Display, Formatter};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use linux::netns::Netns;

use crate::cluster::Cluster;

pub const PATIENCE: Duration = Duration::from_secs(5);
/// What a client in a process of its own is to ask.
const CLIENT: &str = "FAIRLEAD_TEST_CLIENT";
/// How often a keep-alive client repeats one request.
const REPEATS: u32 = 3;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// A connection for each request.
    Fresh,
    /// One connection for all. As HTTP/1.1 allows, a request is repeated if its connection was closed before the first byte of
    /// an answer.
    KeepAlive,
}

#[derive(Debug, Default)]
pub struct Tally {
    pub answers: usize,
    pub repeats: usize,
    pub slowest: Duration,
    pub failures: Vec<String>,
}

pub struct Load {
    stop: Arc<AtomicBool>,
    clients: Vec<JoinHandle<Tally>>,
    processes: Vec<Child>,
}

impl Load {
    pub fn start() -> Load {
        Load { stop: Arc::default(), clients: Vec::new(), processes: Vec::new() }
    }

    /// One more client, which asks so many times a second, however long an answer takes.
    pub fn add(&mut self, place: Netns, address: SocketAddr, manner: Manner, per_second: u32) {
        let stop = self.stop.clone();
        let work = move || {
            let ask = || ask_until(&stop, address, manner, Duration::from_secs(1) / per_second);
            place.run(ask).expect("the place can be entered")
        };
        self.clients.push(std::thread::spawn(work));
    }

    /// The same as a process of a node.
    pub fn add_on(&mut self, cluster: &Cluster, node: &str, address: SocketAddr, manner: Manner, per_second: u32) {
        let test = std::env::current_exe().expect("this test");
        let line = format!(
            "exec fairlead node exec --data-dir $DIR {node} -- env {CLIENT}='{address} {manner:?} {per_second}' \
                {} --exact load::asks_until_nobody_listens --nocapture",
            test.display()
        );
        let mut client = cluster.shell(&line, 600);
        client.stdin(Stdio::piped()).stdout(Stdio::piped());
        self.processes.push(client.spawn().expect("a client can be started"));
    }

    pub fn end(mut self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        let clients = self.clients.drain(..).map(|client| client.join().expect("no client panics"));
        let mut tallies: Vec<Tally> = clients.collect();
        for client in self.processes.drain(..) {
            // This closes its input, at which it ends.
            let output = client.wait_with_output().expect("the client can be waited for");
            let text = String::from_utf8_lossy(&output.stdout);
            tallies.push(Tally::parse(&text).unwrap_or_else(|| panic!("a client says {text}")));
        }
        let mut all = Tally::default();
        for one in tallies {
            all.answers += one.answers;
            all.repeats += one.repeats;
            all.slowest = all.slowest.max(one.slowest);
            all.failures.extend(one.failures);
        }
        all
    }
}

/// Only as a child does this test do anything: it asks until its input ends.
#[test]
fn asks_until_nobody_listens() {
    let Ok(task) = std::env::var(CLIENT) else { return };
    let words: Vec<&str> = task.split(' ').collect();
    let [address, manner, per_second] = words[..] else { panic!("address, manner, requests a second") };
    let manner = if manner == "Fresh" { Manner::Fresh } else { Manner::KeepAlive };
    let (address, per_second) = (address.parse().expect("an address"), per_second.parse::<u32>().expect("a number"));
    let stop = Arc::new(AtomicBool::new(false));
    let stopped = stop.clone();
    let listener = std::thread::spawn(move || {
        drop(io::stdin().read_to_end(&mut Vec::new()));
        stopped.store(true, Ordering::Relaxed);
    });
    let tally = ask_until(&stop, address, manner, Duration::from_secs(1) / per_second);
    listener.join().expect("no panic");
    println!("\n{tally}");
}

impl Display for Tally {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "tally {} {} {}", self.answers, self.repeats, self.slowest.as_micros())?;
        self.failures.iter().try_for_each(|failure| writeln!(f, "failure {failure}"))
    }
}

impl Tally {
    fn parse(text: &str) -> Option<Tally> {
        let numbers = text.lines().find_map(|line| line.strip_prefix("tally "))?;
        let mut numbers = numbers.split(' ').map(|number| number.parse::<u64>().ok());
        let mut next = || numbers.next().flatten();
        let (answers, repeats, slowest) = (next()? as usize, next()? as usize, Duration::from_micros(next()?));
        let failures = text.lines().filter_map(|line| line.strip_prefix("failure ")).map(str::to_owned).collect();
        Some(Tally { answers, repeats, slowest, failures })
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn ask_until(stop: &AtomicBool, address: SocketAddr, manner: Manner, interval: Duration) -> Tally {
    let mut tally = Tally::default();
    let mut kept: Option<BufReader<TcpStream>> = None;
    let start = Instant::now();
    let mut next = start;
    while !stop.load(Ordering::Relaxed) {
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        next += interval;
        let begun = Instant::now();
        match ask(address, manner, &mut kept, &mut tally.repeats) {
            Ok(()) => tally.answers += 1,
            Err(error) => {
                kept = None;
                tally.failures.push(format!("{address} {manner:?} at {:?}: {error}", start.elapsed()));
            }
        }
        tally.slowest = tally.slowest.max(begun.elapsed());
    }
    tally
}

fn ask(
    address: SocketAddr,
    manner: Manner,
    kept: &mut Option<BufReader<TcpStream>>,
    repeats: &mut usize,
) -> io::Result<()> {
    let close = if manner == Manner::Fresh { "Connection: close\r\n" } else { "" };
    let request = format!("GET / HTTP/1.1\r\nHost: web\r\n{close}\r\n");
    for _ in 0..REPEATS {
        let is_reused = kept.is_some();
        let mut connection = match kept.take() {
            Some(connection) => connection,
            None => {
                let stream = TcpStream::connect_timeout(&address, PATIENCE)?;
                stream.set_read_timeout(Some(PATIENCE))?;
                stream.set_nodelay(true)?;
                BufReader::new(stream)
            }
        };
        let sent = connection.get_mut().write_all(request.as_bytes());
        let first = sent.and_then(|()| connection.fill_buf().map(|bytes| !bytes.is_empty()));
        match first {
            Ok(true) => {}
            Ok(false) | Err(_) if is_reused && !is_timeout(&first) => {
                *repeats += 1;
                continue;
            }
            Ok(false) => return Err(io::Error::other("closed before an answer")),
            Err(error) => return Err(error),
        }
        read_answer(&mut connection)?;
        if manner == Manner::KeepAlive {
            *kept = Some(connection);
        }
        return Ok(());
    }
    Err(io::Error::other("closed before an answer, again and again"))
}

fn is_timeout(outcome: &io::Result<bool>) -> bool {
    matches!(outcome, Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut))
}

/// A whole answer: its status, its headers, and as much of a body as they say.
fn read_answer(connection: &mut impl BufRead) -> io::Result<()> {
    let mut line = String::new();
    connection.read_line(&mut line)?;
    if !line.starts_with("HTTP/1.1 200 ") {
        return Err(io::Error::other(format!("answered {line:?}")));
    }
    let mut length = 0;
    loop {
        line.clear();
        if connection.read_line(&mut line)? == 0 {
            return Err(io::Error::other("closed in the middle of an answer"));
        }
        if line == "\r\n" {
            break;
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
    }
    let mut body = vec![0; length];
    connection.read_exact(&mut body)
}
