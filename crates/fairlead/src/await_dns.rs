//! `await-dns`: how `up` sees that the Service network works. It runs inside a node.

use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::bail;
use clap::Args;

#[derive(Args, Debug, Clone)]
pub struct AwaitDnsArgs {
    /// The cluster IP of cluster DNS.
    pub server: IpAddr,
}

const PATIENCE: Duration = Duration::from_secs(30);

pub fn run(args: &AwaitDnsArgs) -> anyhow::Result<ExitCode> {
    let until = Instant::now() + PATIENCE;
    loop {
        if dns_answers(args.server).unwrap_or(false) {
            return Ok(ExitCode::SUCCESS);
        }
        if Instant::now() > until {
            bail!("cluster DNS at {} does not answer; `fairlead status` tells more", args.server);
        }
    }
}

/// One question for `kubernetes.default.svc.cluster.local`, with 100 ms for the answer.
fn dns_answers(server: IpAddr) -> anyhow::Result<bool> {
    let mut question = vec![0x46, 0x4c, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0];
    for label in ["kubernetes", "default", "svc", "cluster", "local"] {
        question.push(u8::try_from(label.len())?);
        question.extend(label.as_bytes());
    }
    let kind = if server.is_ipv4() { 1 } else { 28 };
    question.extend([0, 0, kind, 0, 1]);
    let any: IpAddr = if server.is_ipv4() { IpAddr::from([0u8; 4]) } else { IpAddr::from([0u8; 16]) };
    let socket = UdpSocket::bind(SocketAddr::new(any, 0))?;
    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
    let asked = Instant::now();
    let answered = socket.send_to(&question, SocketAddr::new(server, 53)).and_then(|_| {
        let mut answer = [0u8; 512];
        socket.recv(&mut answer).map(|n| (n, answer))
    });
    let good = matches!(answered, Ok((n, answer)) if n > 12 && answer[3] & 0x0f == 0 && answer[7] > 0);
    if !good {
        // An immediate refusal must not become a busy loop.
        let rest = Duration::from_millis(20).saturating_sub(asked.elapsed());
        std::thread::park_timeout(rest);
    }
    Ok(good)
}
