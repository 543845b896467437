//! Hosts on one switch, each a network namespace, and Debian's programs on them. All of it ends with the test.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use linux::link::{Address, Bridge, Item, Links, Port, Veth};
use linux::netns::Netns;

const PREFIX: &str = "fairlead-lb-";
const SWITCH: &str = "switch";
/// The switch's halves; all hosts are in the first one, unless the network is parted.
const SIDES: [&str; 2] = ["br0", "br1"];
/// What every host calls its way to the switch.
pub const LINK: &str = "up0";

pub struct Net {
    dir: PathBuf,
    names: Vec<&'static str>,
}

/// The addresses of the host at this place, counted from 1.
pub fn address(place: usize, v4: bool) -> IpAddr {
    let place = u8::try_from(place).expect("a few hosts");
    if v4 { IpAddr::from([10, 77, 0, place]) } else { IpAddr::from([0xfd77, 0, 0, 0, 0, 0, 0, u16::from(place)]) }
}

impl Net {
    /// Hosts with these names; the first has the addresses 10.77.0.1 and fd77::1, and so on.
    pub fn new(names: &[&'static str]) -> Net {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let dir = std::env::temp_dir().join(format!("{PREFIX}{}-{number}", std::process::id()));
        fs::create_dir_all(&dir).expect("a directory");
        // From here on dropping it cleans up.
        let net = Net { dir, names: names.to_vec() };
        let switch = Netns::create(&net.pin(SWITCH)).expect("a namespace");
        let links = Links::open(&switch).expect("its links");
        for name in SIDES {
            let bridge = Bridge { name: name.into(), mac: None, mtu: None };
            links.ensure_all(&[Item::Bridge(bridge), Item::Up(name.into())]).expect("a bridge");
        }
        for (place, name) in names.iter().enumerate() {
            let host = Netns::create(&net.pin(name)).expect("a namespace");
            // Addresses are there at once.
            host.sysctl("net/ipv6/conf/default/accept_dad", "0").expect("a sysctl");
            let veth = Veth {
                name: (*name).to_owned(),
                peer: LINK.into(),
                peer_netns: host.clone(),
                peer_mac: None,
                mtu: None,
            };
            let port = Port { link: (*name).to_owned(), bridge: SIDES[0].into(), hairpin: false };
            links.ensure_all(&[Item::Veth(veth), Item::Port(port), Item::Up((*name).to_owned())]).expect("a cable");
            let of = |v4: bool| {
                let length = if v4 { 24 } else { 64 };
                let address = ipnet::IpNet::new(address(place + 1, v4), length).expect("a length that fits");
                Item::Address(Address { link: LINK.into(), address })
            };
            let own = Links::open(&host).expect("its links");
            own.ensure_all(&[Item::Up(LINK.into()), of(true), of(false)]).expect("addresses");
        }
        net
    }

    fn pin(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.netns"))
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn host(&self, name: &str) -> Netns {
        Netns::open(&self.pin(name)).expect("a host")
    }

    /// Pulls a host's cable, or puts it back.
    pub fn set_cable(&self, name: &str, is_in: bool) {
        let state = if is_in { "up" } else { "down" };
        let pin = self.pin(SWITCH);
        let line = format!("nsenter --net={} ip link set dev {name} {state}", pin.display());
        let done = Command::new("sh").args(["-c", &line]).status().expect("sh runs");
        assert!(done.success(), "{line}");
    }

    /// Parts these hosts from all others, who still see each other, or joins all again.
    pub fn part(&self, apart: &[&str]) {
        let links = Links::open(&self.switch()).expect("its links");
        for name in &self.names {
            let bridge = SIDES[usize::from(apart.contains(name))].to_owned();
            let port = Port { link: (*name).to_owned(), bridge, hairpin: false };
            links.ensure_all(&[Item::Port(port)]).expect("a cable");
        }
    }

    pub fn switch(&self) -> Netns {
        Netns::open(&self.pin(SWITCH)).expect("the switch")
    }

    /// What begins a line of a program that runs on a host, and ends with whoever started it.
    pub fn on(&self, host: &str) -> Command {
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--", "nsenter", &format!("--net={}", self.pin(host).display()), "--"]);
        command
    }

    pub fn write(&self, name: &str, text: &str) -> String {
        let path = self.dir.join(name);
        fs::write(&path, text).expect("a file");
        path.display().to_string()
    }

    /// Starts a program on a host. What it says is in a file beside its configuration.
    pub fn start(&self, host: &str, words: &[&str]) -> Daemon {
        let name = Path::new(words[0]).file_name().expect("a program").to_string_lossy().into_owned();
        let log = fs::File::create(self.dir.join(format!("{host}-{name}.log"))).expect("a log");
        let mut command = self.on(host);
        command.args(words).stdin(Stdio::null()).stdout(log.try_clone().expect("a descriptor")).stderr(log);
        Daemon(command.spawn().expect("setpriv runs"))
    }

    /// What a program says that ends by itself; nothing if it fails.
    pub fn ask(&self, words: &[&str]) -> String {
        let done = Command::new("timeout").arg("20").args(words).output().expect("timeout runs");
        if done.status.success() { String::from_utf8_lossy(&done.stdout).into_owned() } else { String::new() }
    }

    /// All that programs said, for a test that fails.
    pub fn logs(&self) -> String {
        let files = fs::read_dir(&self.dir).expect("the directory").flatten().map(|entry| entry.path());
        let logs = files.filter(|path| path.extension().is_some_and(|ext| ext == "log"));
        logs.map(|path| format!("{}:\n{}\n", path.display(), fs::read_to_string(&path).unwrap_or_default())).collect()
    }
}

impl Drop for Net {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.logs());
        }
        for name in self.names.iter().chain(&[SWITCH]) {
            if let Err(error) = Netns::remove(&self.pin(name)) {
                eprintln!("{error}");
            }
        }
        fs::remove_dir_all(&self.dir).unwrap_or_else(|error| eprintln!("{}: {error}", self.dir.display()));
    }
}

/// What tests left behind that were killed.
fn sweep() {
    for entry in fs::read_dir(std::env::temp_dir()).expect("a directory").flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()) else { continue };
        if Path::new("/proc").join(pid).exists() {
            continue;
        }
        for pin in fs::read_dir(entry.path()).into_iter().flatten().flatten() {
            if pin.path().extension().is_some_and(|extension| extension == "netns") {
                Netns::remove(&pin.path()).unwrap_or_else(|error| eprintln!("{error}"));
            }
        }
        fs::remove_dir_all(entry.path()).unwrap_or_else(|error| eprintln!("{name}: {error}"));
    }
}

/// A program on a host; it ends when this is dropped.
pub struct Daemon(Child);

impl Daemon {
    fn signal(&self, signal: &str) {
        let done = Command::new("kill").args([signal, &self.0.id().to_string()]).status();
        if !done.is_ok_and(|done| done.success()) {
            eprintln!("{signal}: it had ended");
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.signal("-TERM");
        if let Err(error) = self.0.wait() {
            eprintln!("a daemon cannot be waited for: {error}");
        }
    }
}

/// Waits for what is no event to a test.
pub fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < Duration::from_secs(60), "{what}: not within a minute");
        std::thread::sleep(Duration::from_millis(20));
    }
}
