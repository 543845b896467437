//! Other people's servers that a test starts, and that end with it.

use std::fs::File;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

pub struct Daemon(Child);

impl Daemon {
    /// `words` are the program and its arguments; it writes to `log`.
    pub fn start(words: &[&str], log: &Path) -> Daemon {
        let file = File::create(log).expect("a log can be made");
        // It also ends when this test is killed.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).args(words).stdin(Stdio::null()).stdout(Stdio::null()).stderr(file);
        Daemon(command.spawn().unwrap_or_else(|error| panic!("{}: {error}; run `make deps`", words[0])))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // It may have ended by itself, which its log tells.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Ports of the loopback that are all free, and different.
pub fn free_ports<const N: usize>() -> [u16; N] {
    let sockets = [(); N].map(|()| TcpListener::bind(("127.0.0.1", 0)).expect("the loopback has a free port"));
    sockets.map(|socket| socket.local_addr().expect("it is bound").port())
}
