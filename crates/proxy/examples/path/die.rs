//! One of three endpoints dies under requests.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use linux::netns::Netns;
use proxy::Mode;
use serde_json::json;
use services::ServiceTable;

use crate::world::{Running, World, attach, cluster_ip, service, slice};
use crate::{Failure, Lab, PORTS, SERVER};

/// Answers each connection with one byte, a thread for each.
pub fn answer(address: SocketAddr) -> Result<(), Failure> {
    let listener = TcpListener::bind(address)?;
    println!("listening");
    for mut stream in listener.incoming().flatten() {
        std::thread::spawn(move || {
            let mut byte = [0];
            // A client that has gone needs no answer.
            let _ = stream.read_exact(&mut byte).and_then(|()| stream.write_all(&byte));
        });
    }
    Ok(())
}

/// A server process that ends with its guard, also when it is stopped.
struct Server(std::process::Child);

impl Server {
    fn start(namespace: &Netns, address: SocketAddr) -> Result<Server, Failure> {
        let program = std::env::current_exe()?;
        let mut child = namespace
            .run(|| Command::new(program).arg("serve").arg(address.to_string()).stdout(Stdio::piped()).spawn())??;
        let mut line = [0; 10];
        child.stdout.as_mut().ok_or("no output")?.read_exact(&mut line)?;
        Ok(Server(child))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // It may be dead already: that is what this is about.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// How long before the death, and after it, requests are sent.
const BEFORE: Duration = Duration::from_secs(1);
const AFTER: Duration = Duration::from_secs(6);
const EVERY: Duration = Duration::from_millis(5);
/// An answer that takes longer is as bad as none.
const PATIENCE: Duration = Duration::from_millis(1200);

pub fn die(lab: &Lab, mode: Mode, how: &str, watching: proxy::Watching) -> Result<String, Failure> {
    let world = World::for_mode(lab, "die", mode)?;
    let mut pods = vec![(world.server.clone(), SERVER)];
    for number in 0..2u8 {
        let (pod, address) = (lab.namespace(&format!("die-{number}"))?, Ipv4Addr::new(10, 244, 0, 13 + number));
        attach(&world.node, &pod, address, &format!("server{number}"))?;
        pods.push((pod, address));
    }
    let mut servers = Vec::new();
    for (pod, address) in &pods {
        servers.push(Server::start(pod, (*address, PORTS.start).into())?);
    }
    let mut table = ServiceTable::new();
    table.upsert_service(&service(0))?;
    let here = String::from_utf8(slice(0, PORTS.start, pods.iter().map(|(_, address)| *address)))?;
    table.upsert_slice(here.replace("node-2", "node-1").as_bytes())?;
    let mut running = Running::start_with(mode, &world.node, table, watching, world.hooks())?;
    running.change(ServiceTable::set_synced)?;

    let target = SocketAddr::from((cluster_ip(0), 80));
    let started = Instant::now();
    let outcomes = std::thread::scope(|scope| -> Result<Vec<Outcome>, Failure> {
        let clients = scope.spawn(|| world.as_client(|| request_steadily(target, started)));
        std::thread::sleep(BEFORE);
        kill(how, &mut servers[0], &pods[0].0)?;
        clients.join().map_err(|_| "the clients panicked")?
    })?;
    let failed = outcomes.iter().filter(|outcome| outcome.took.is_none()).count();
    let late = outcomes.iter().filter(|outcome| outcome.took.is_some_and(|took| took > PATIENCE)).count();
    let slow = outcomes.iter().filter(|outcome| outcome.took.is_some_and(|took| took > PATIENCE / 4)).count();
    let last = outcomes
        .iter()
        .filter(|outcome| outcome.took.is_none_or(|took| took > PATIENCE / 4))
        .map(|outcome| outcome.at.saturating_sub(BEFORE))
        .max();
    let status = running.status.borrow().clone();
    Ok(json!({
        "mode": mode.to_string(), "how": how, "requests": outcomes.len(), "failed": failed, "over_1200_ms": late,
        "over_300_ms": slow, "last_bad_ms": last.map(|last| last.as_millis() as u64),
        "ejections": status.ejections, "retries": status.retries,
    })
    .to_string())
}

/// One of the endpoints dies.
fn kill(how: &str, server: &mut Server, pod: &Netns) -> Result<(), Failure> {
    match how {
        "crash" => server.0.kill()?,
        "stop" => nix::sys::signal::kill(
            nix::unistd::Pid::from_raw(i32::try_from(server.0.id())?),
            nix::sys::signal::Signal::SIGSTOP,
        )?,
        "cut" => {
            let output = pod.run(|| Command::new("ip").args(["link", "set", "eth0", "down"]).output())??;
            if !output.status.success() {
                return Err(String::from_utf8_lossy(&output.stderr).into_owned().into());
            }
        }
        other => return Err(format!("{other:?} is no way to die: cut, crash or stop").into()),
    }
    Ok(())
}

struct Outcome {
    /// When it was sent.
    at: Duration,
    /// `None`: it failed.
    took: Option<Duration>,
}

/// A request each 5 ms, whatever became of the last ones.
fn request_steadily(target: SocketAddr, started: Instant) -> Vec<Outcome> {
    let mut all = Vec::new();
    let count = ((BEFORE + AFTER).as_millis() / EVERY.as_millis()) as u32;
    for number in 0..count {
        let at = EVERY * number;
        std::thread::sleep(at.saturating_sub(started.elapsed()));
        all.push((at, std::thread::spawn(move || request(target))));
    }
    all.into_iter().map(|(at, request)| Outcome { at, took: request.join().ok().and_then(Result::ok) }).collect()
}

fn request(target: SocketAddr) -> std::io::Result<Duration> {
    let started = Instant::now();
    let mut stream = TcpStream::connect_timeout(&target, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"x")?;
    stream.read_exact(&mut [0])?;
    Ok(started.elapsed())
}
