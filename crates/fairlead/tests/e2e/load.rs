//! Clients that ask an HTTP server at a steady rate from a place in the lab, and count what went wrong.

use std::io::{self, BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use linux::netns::Netns;

const PATIENCE: Duration = Duration::from_secs(5);
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
}

impl Load {
    pub fn start() -> Load {
        Load { stop: Arc::default(), clients: Vec::new() }
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

    pub fn end(mut self) -> Tally {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Tally::default();
        for client in self.clients.drain(..) {
            let one = client.join().expect("no client panics");
            all.answers += one.answers;
            all.repeats += one.repeats;
            all.slowest = all.slowest.max(one.slowest);
            all.failures.extend(one.failures);
        }
        all
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
