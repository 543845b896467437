//! One boot: from the kernel to the test's last line, over the serial console.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::root::Base;
use crate::shell;

/// What the guest prints before the test's exit code.
pub const ENDED: &str = "guest: the test ended with ";

/// A guest that hangs must not hang CI; with many random cases it has more to do.
const LIMIT: Duration = Duration::from_secs(900);
const LONG_LIMIT: Duration = Duration::from_secs(3 * 3600);
const MANY_CASES: u64 = 1000;

/// `kvm` where it works: a device that is there is no proof.
const ACCELERATOR: &str = "FAIRLEAD_GUEST_ACCEL";

/// Ends with the machine, whatever happens here.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // It has ended already, or ends now; nobody is left to be told.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// `cases` is how many random cases the property tests have.
pub fn run(base: &Base, test: &Path, cases: u64) -> Result<()> {
    let initrd = test.with_file_name("initrd.cpio");
    let mut whole = std::fs::read(&base.root).with_context(|| format!("cannot read {}", base.root.display()))?;
    whole.extend(std::fs::read(test)?);
    std::fs::write(&initrd, whole)?;
    let mut command = Command::new("qemu-system-x86_64");
    // Emulated, since a build machine is often a guest itself; `panic=-1` and `-no-reboot` turn a panic into an end.
    let accelerator = std::env::var(ACCELERATOR).unwrap_or_else(|_| "tcg".to_owned());
    command.args(["-accel", &accelerator, "-cpu", "max", "-M", "q35", "-m", "1024", "-smp", "2"]);
    command.args(["-nodefaults", "-no-reboot"]);
    command.args(["-display", "none", "-serial", "stdio", "-kernel"]).arg(&base.kernel).arg("-initrd").arg(&initrd);
    command
        .args(["-append", "console=ttyS0 quiet loglevel=3 panic=-1 rdinit=/init random.trust_cpu=on mitigations=off"]);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    println!("+ {}", shell::words(&command));
    let mut machine = Machine(command.spawn().context("cannot run qemu-system-x86_64; run `make deps`")?);
    let console = machine.0.stdout.take().expect("it was asked for");
    let (tell, lines) = channel();
    let reader = std::thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n') {
            let Ok(line) = line else { return };
            if tell.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                return;
            }
        }
    });
    let start = Instant::now();
    let mut ended = None;
    let limit = if cases >= MANY_CASES { LONG_LIMIT } else { LIMIT };
    loop {
        match lines.recv_timeout(limit.saturating_sub(start.elapsed())) {
            Ok(line) => {
                println!("{line}");
                std::io::stdout().flush()?;
                if let Some((_, code)) = line.split_once(ENDED) {
                    ended = Some(code.to_owned());
                }
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                bail!("the guest was still running after {limit:?}; its console is above")
            }
        }
    }
    drop(reader.join());
    println!("guest: {:.1} s from start to end", start.elapsed().as_secs_f32());
    match ended.as_deref() {
        Some("0") => Ok(()),
        Some(code) => bail!("the test ended with {code} in the guest; its output is above"),
        None => bail!("the guest ended before its test did; its console is above"),
    }
}
