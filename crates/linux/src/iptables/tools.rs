//! Runs `iptables-save` and `iptables-restore` of the variant in use, in one network namespace.

use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};

use nix::sched::{CloneFlags, setns};

use super::{Error, Iptables, Restore, Table};

/// The two implementations of the tools. Their rules do not see each other, so everybody on a node must use the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    Nft,
    Legacy,
    /// There is only one `iptables`, and it does not say which.
    Plain,
}

impl Variant {
    fn program(self, v6: bool, verb: &str) -> String {
        let family = if v6 { "ip6tables" } else { "iptables" };
        match self {
            Variant::Nft => format!("{family}-nft-{verb}"),
            Variant::Legacy => format!("{family}-legacy-{verb}"),
            Variant::Plain => format!("{family}-{verb}"),
        }
    }
}

/// iptables of one network namespace, through the tools.
pub struct Tools {
    namespace: Option<OwnedFd>,
    variant: Variant,
}

impl Tools {
    /// Finds out which variant is in use in the namespace (`None`: the caller's) and stays with it.
    pub fn open(namespace: Option<OwnedFd>) -> Result<Self, Error> {
        let mut tools = Tools { namespace, variant: Variant::Plain };
        tools.variant = tools.detect()?;
        Ok(tools)
    }

    /// The tools of every variant that is installed: for whoever has to look everywhere.
    pub fn all(namespace: Option<BorrowedFd<'_>>) -> Result<Vec<Self>, Error> {
        let mut found = Vec::new();
        for variant in [Variant::Nft, Variant::Legacy] {
            let held = namespace.map(|namespace| namespace.try_clone_to_owned()).transpose();
            let held = held.map_err(|source| Error::Spawn { program: "setns".to_owned(), source })?;
            let tools = Tools { namespace: held, variant };
            match tools.run(&variant.program(false, "save"), &["-V"], None) {
                Err(Error::Spawn { .. }) => {}
                _ => found.push(tools),
            }
        }
        Ok(found)
    }

    /// Whether anything of iptables has been used in the namespace, told without the tools.
    pub fn is_used(namespace: Option<BorrowedFd<'_>>) -> Result<bool, Error> {
        let held = namespace.map(|namespace| namespace.try_clone_to_owned()).transpose();
        let held = held.map_err(|source| Error::Spawn { program: "setns".to_owned(), source })?;
        let tools = Tools { namespace: held, variant: Variant::Plain };
        // The legacy variant lists its tables in proc; the nft variant's are tables like any other.
        let legacy = tools.inside(|| {
            let names = ["ip_tables_names", "ip6_tables_names"].map(|name| format!("/proc/thread-self/net/{name}"));
            let read = names.map(|name| std::fs::read_to_string(name).unwrap_or_default());
            Ok(read.iter().any(|tables| tables.lines().any(|table| table == "nat")))
        })?;
        let nft = || -> Result<bool, crate::nft::Error> {
            let mut nft = crate::nft::Socket::open(namespace)?;
            let mut nat = false;
            for family in [crate::nft::Family::Ip, crate::nft::Family::Ip6] {
                nat |= crate::nft::Nft::table_comment(&mut nft, family, "nat")?.is_some();
            }
            Ok(nat)
        };
        Ok(legacy || nft()?)
    }

    /// Decides like the iptables-wrappers of Kubernetes' images: kubelet's hint says it, otherwise the variant that holds
    /// more rules.
    fn detect(&self) -> Result<Variant, Error> {
        let saved = |variant: Variant, arguments: &[&str]| -> Result<Option<String>, Error> {
            let mut text = String::new();
            for v6 in [false, true] {
                match self.run(&variant.program(v6, "save"), arguments, None) {
                    Ok(output) => text += &output,
                    Err(Error::Spawn { .. }) if !v6 => return Ok(None),
                    // A kernel without this variant or family has no rules of it.
                    Err(Error::Failed { .. } | Error::Spawn { .. }) => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(Some(text))
        };
        let is_hint = |line: &&str| line.starts_with(":KUBE-IPTABLES-HINT") || line.starts_with(":KUBE-KUBELET-CANARY");
        let mut known = Vec::new();
        for variant in [Variant::Nft, Variant::Legacy] {
            match saved(variant, &["-t", "mangle"])? {
                Some(text) if text.lines().any(|line| is_hint(&line)) => return Ok(variant),
                Some(_) => known.push(variant),
                None => {}
            }
        }
        let mut best = (Variant::Plain, None);
        for variant in known {
            let text = saved(variant, &[])?.unwrap_or_default();
            let rules = text.lines().filter(|line| line.starts_with('-')).count();
            if best.1.is_none_or(|most| rules > most) {
                best = (variant, Some(rules));
            }
        }
        Ok(best.0)
    }

    /// The table as `iptables-save -c` prints it: with the packets and bytes that each rule has counted.
    pub fn save_counters(&self, v6: bool, table: Table) -> Result<String, Error> {
        self.run(&self.variant.program(v6, "save"), &["-c", "-t", &table.to_string()], None)
    }

    fn run(&self, program: &str, arguments: &[&str], input: Option<&str>) -> Result<String, Error> {
        self.inside(|| run_here(program, arguments, input))
    }

    /// Does the work on a thread in the namespace: children and `/proc/sys/net` follow the thread.
    fn inside<T: Send>(&self, work: impl FnOnce() -> Result<T, Error> + Send) -> Result<T, Error> {
        let Some(namespace) = &self.namespace else { return work() };
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                let enter = setns(namespace.as_fd(), CloneFlags::CLONE_NEWNET);
                enter.map_err(|error| Error::Spawn { program: "setns".to_owned(), source: error.into() })?;
                work()
            });
            thread.join().unwrap_or(Err(Error::Thread))
        })
    }
}

fn run_here(program: &str, arguments: &[&str], input: Option<&str>) -> Result<String, Error> {
    let spawn = |source| Error::Spawn { program: program.to_owned(), source };
    let mut command = Command::new(program);
    command.args(arguments).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
    let mut child = command.spawn().map_err(spawn)?;
    let mut wrote = Ok(());
    if let (Some(mut stdin), Some(input)) = (child.stdin.take(), input) {
        // The tools read all of their input before they print anything.
        wrote = stdin.write_all(input.as_bytes());
    }
    let output = child.wait_with_output().map_err(spawn)?;
    if output.status.success() {
        wrote.map_err(spawn)?;
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    let lines = input.map(|input| failing_line(&message, input)).unwrap_or_default();
    Err(Error::Failed { program: program.to_owned(), message, lines })
}

/// The line of the input that a message like `line 12 failed` or `Error occurred at line: 12` means.
fn failing_line(message: &str, input: &str) -> String {
    let mut words = message.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    let number = words
        .by_ref()
        .skip_while(|word| !word.eq_ignore_ascii_case("line"))
        .nth(1)
        .and_then(|word| word.parse::<usize>().ok());
    let line = number.and_then(|number| input.lines().nth(number.checked_sub(1)?));
    line.map(|line| format!(" at `{line}`")).unwrap_or_default()
}

impl Iptables for Tools {
    fn save(&mut self, v6: bool, table: Table) -> Result<String, Error> {
        self.run(&self.variant.program(v6, "save"), &["-t", &table.to_string()], None)
    }

    fn restore(&mut self, v6: bool, input: &Restore) -> Result<(), Error> {
        if input.is_empty() {
            return Ok(());
        }
        let text = input.to_string();
        // Others use iptables too: wait for the lock instead of failing.
        let arguments: &[&str] = match self.variant {
            Variant::Nft => &["--noflush", "--counters"],
            Variant::Legacy | Variant::Plain => &["-w", "5", "--noflush", "--counters"],
        };
        self.run(&self.variant.program(v6, "restore"), arguments, Some(&text)).map(drop)
    }

    fn route_localhost(&mut self) -> Result<(), Error> {
        let name = "net/ipv4/conf/all/route_localnet";
        self.inside(|| {
            std::fs::write(format!("/proc/sys/{name}"), "1").map_err(|source| Error::Sysctl { name, source })
        })
    }

    fn about(&self) -> String {
        format!("{} holds the rules", self.variant.program(false, "save"))
    }
}
