//! A cluster of the built binary in a directory of its own, which ends with the test however that ends.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Once;
use std::sync::atomic::{AtomicUsize, Ordering};

const BINARY: &str = env!("CARGO_BIN_EXE_fairlead");
const SECONDS_TO_START: &str = "60";
const PREFIX: &str = "fairlead-e2e-";
const IMAGES: &[&str] = &["nginx-test1.tar", "nginx-test2.tar", "busybox-test1.tar"];

/// A kubectl to test with.
pub struct Kubectl {
    pub name: String,
    path: PathBuf,
}

/// Newest first: the versioned ones beside the file that `kubectl` leads to, or else `kubectl` itself. FAIRLEAD_KUBECTL picks
/// one of them by a part of its name.
pub fn kubectls() -> Vec<Kubectl> {
    let linked = which("kubectl").expect("kubectl is on PATH: these tests are about it");
    let resolved = linked.canonicalize().expect("kubectl can be resolved");
    let beside = resolved.parent().expect("a file lies in a directory");
    let mut found: Vec<Kubectl> = (28..=33)
        .rev()
        .map(|minor| format!("kubectl.1.{minor}"))
        .filter(|name| beside.join(name).is_file())
        .map(|name| Kubectl { path: beside.join(&name), name })
        .collect();
    if found.is_empty() {
        found.push(Kubectl { name: "kubectl".to_owned(), path: linked });
    }
    if let Ok(wanted) = std::env::var("FAIRLEAD_KUBECTL") {
        found.retain(|kubectl| kubectl.name.contains(&wanted));
        assert!(!found.is_empty(), "no kubectl here is called {wanted}");
    }
    found
}

pub struct Cluster {
    dir: PathBuf,
    pub server: String,
    variables: Vec<(&'static str, String)>,
}

/// How a command ended and what it printed on both streams.
pub struct Seen {
    pub success: bool,
    pub output: String,
}

impl Cluster {
    pub fn up(kubectl: &Kubectl, nodes: u8) -> Cluster {
        Cluster::up_with(kubectl, nodes, &[])
    }

    /// With further words for `fairlead up`.
    pub fn up_with(kubectl: &Kubectl, nodes: u8, words: &[&str]) -> Cluster {
        let mut cluster = Cluster::new(kubectl);
        cluster.start_with(nodes, words);
        cluster.import(&cluster.data_dir(), IMAGES);
        let kubeconfig = fs::read_to_string(cluster.dir.join("data/kubeconfig")).expect("`up` wrote a kubeconfig");
        // YAML or JSON, it is the one URL in it.
        let begin = kubeconfig.find("https://").expect("the kubeconfig names a server");
        let end = kubeconfig[begin..].find(['"', '\n', ',']).unwrap_or(kubeconfig.len() - begin);
        cluster.server = kubeconfig[begin..begin + end].to_owned();
        cluster
    }

    /// A directory and commands, without a cluster yet.
    pub fn new(kubectl: &Kubectl) -> Cluster {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        // Short, since a unix socket's path has 108 bytes.
        let dir = std::env::temp_dir().join(format!("{PREFIX}{}-{number}", std::process::id()));
        fs::create_dir_all(dir.join("bin")).expect("a temporary directory can be made");
        // From here on dropping it cleans up.
        let cluster = Cluster { dir, server: String::new(), variables: Vec::new() };
        symlink(BINARY, cluster.dir.join("bin/fairlead")).expect("fairlead can be linked");
        cluster.play_with(kubectl);
        cluster
    }

    /// `up`, the first time or again.
    pub fn start(&self, nodes: u8) {
        self.start_with(nodes, &[]);
    }

    pub fn start_with(&self, nodes: u8, flags: &[&str]) {
        let (nodes, data) = (nodes.to_string(), self.data_dir());
        self.fairlead(&[&["up", "--detach", "--nodes", &nodes, "--data-dir", &data], flags].concat());
    }

    /// Makes archives of `cargo xtask image` known to the nodes that keep their images in this directory.
    pub fn import(&self, data_dir: &str, names: &[&str]) {
        for name in names {
            let file = images().join(name);
            assert!(file.is_file(), "{} is not there: run `cargo xtask image`", file.display());
            self.fairlead(&["image", "--data-dir", data_dir, "import", &file.to_string_lossy()]);
        }
    }

    /// Makes `$NAME` known to the commands that `run` and `shell` are given.
    pub fn set(&mut self, name: &'static str, value: &str) {
        self.variables.push((name, value.to_owned()));
    }

    pub fn down(&self) {
        self.fairlead(&["down", "--data-dir", &self.data_dir()]);
    }

    /// Commands find this kubectl from now on.
    pub fn play_with(&self, kubectl: &Kubectl) {
        let link = self.dir.join("bin/kubectl");
        // The first time there is none.
        let _ = fs::remove_file(&link);
        symlink(&kubectl.path, link).expect("kubectl can be linked");
    }

    /// A command's processes begin in this network namespace from now on: `fairlead` or `kubectl`.
    pub fn move_into(&self, namespace: &Path, name: &str) {
        let link = self.dir.join("bin").join(name);
        let program = link.canonicalize().expect("the command is linked");
        fs::remove_file(&link).expect("the link can be removed");
        let script = format!("#!/bin/sh\nexec nsenter --net={} -- {} \"$@\"\n", namespace.display(), program.display());
        fs::write(&link, script).expect("a script can be written");
        fs::set_permissions(&link, fs::Permissions::from_mode(0o755)).expect("it can be made executable");
    }

    /// Runs a line of `sh` whose kubectl and fairlead are those under test; ends after `seconds`.
    pub fn run(&self, line: &str, input: &str, seconds: u32) -> Seen {
        // One stream, in the order in which it was written.
        let mut command = self.shell(&format!("exec 2>&1\n{line}"), seconds);
        command.stdout(Stdio::piped()).stdin(if input.is_empty() { Stdio::null() } else { Stdio::piped() });
        let mut child = command.spawn().expect("a shell can be started");
        if let Some(mut stdin) = child.stdin.take() {
            // A command that does not read its input to the end is judged by what it prints.
            let _ = stdin.write_all(input.as_bytes());
        }
        let done = child.wait_with_output().expect("a shell can be waited for");
        let output = String::from_utf8_lossy(&done.stdout).replace('\r', "");
        Seen { success: done.status.success(), output }
    }

    pub fn shell(&self, line: &str, seconds: u32) -> Command {
        let path = std::env::var("PATH").unwrap_or_default();
        let data = self.dir.join("data");
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", &seconds.to_string(), "sh", "-c", line]).current_dir(&self.dir);
        command.env("PATH", format!("{}:{path}", self.dir.join("bin").display()));
        command.env("KUBECONFIG", data.join("kubeconfig")).env("KUBECACHEDIR", self.dir.join("cache"));
        command.env("HOME", &self.dir).env("SERVER", &self.server).env("DIR", &data).env("TMP", &self.dir);
        command.envs(self.variables.iter().map(|(name, value)| (name, value)));
        command.env("EXAMPLES", root.join("examples")).env("IMAGES", images());
        command
    }

    fn fairlead(&self, words: &[&str]) {
        let mut command = Command::new("timeout");
        command.args(["--kill-after=5", SECONDS_TO_START]).arg(self.dir.join("bin/fairlead"));
        let done = command.args(words).output();
        let done = done.expect("the built binary runs");
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "fairlead {} ended with {}: {said}", words.join(" "), done.status);
    }

    /// The directory of the test, in which the data directory lies.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn data_dir(&self) -> String {
        self.dir.join("data").to_string_lossy().into_owned()
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        end(&self.dir);
    }
}

/// Clusters of runs that were killed before they could clean up, and the namespaces that such runs played in.
fn sweep() {
    for entry in abandoned(&std::env::temp_dir()) {
        end(&entry);
    }
    for pin in abandoned(Path::new("/run/netns")) {
        let name = pin.file_name().expect("a pin has a name");
        if let Err(error) = Command::new("ip").args(["netns", "delete"]).arg(name).status() {
            eprintln!("{} stays: {error}", pin.display());
        }
    }
}

/// What is named after a test process that is no more.
fn abandoned(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let is_abandoned = |path: &PathBuf| {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists())
    };
    entries.map(|entry| entry.path()).filter(is_abandoned).collect()
}

fn end(dir: &Path) {
    // A second panic would abort before other clusters are cleaned up: say what went wrong and go on.
    match Command::new(BINARY).args(["down", "--data-dir"]).arg(dir.join("data")).output() {
        Ok(done) if done.status.success() => {}
        Ok(done) => eprintln!("down ended with {}: {}", done.status, String::from_utf8_lossy(&done.stderr)),
        Err(error) => eprintln!("down did not run: {error}"),
    }
    if let Err(error) = fs::remove_dir_all(dir) {
        eprintln!("{} stays: {error}", dir.display());
    }
}

/// `cargo xtask image` puts them beside what cargo builds.
fn images() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).with_file_name("images")
}

fn which(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}
