//! A cluster of the built binary in a directory of its own, which ends with the test however that ends.

use std::fs;
use std::io::Write;
use std::os::unix::fs::symlink;
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
    /// What `up` is told beside the number of nodes.
    flags: &'static [&'static str],
    pub server: String,
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

    pub fn up_with(kubectl: &Kubectl, nodes: u8, flags: &'static [&'static str]) -> Cluster {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        static SWEEP: Once = Once::new();
        SWEEP.call_once(sweep);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        // Short, since a unix socket's path has 108 bytes.
        let dir = std::env::temp_dir().join(format!("{PREFIX}{}-{number}", std::process::id()));
        fs::create_dir_all(dir.join("bin")).expect("a temporary directory can be made");
        // From here on dropping it cleans up.
        let mut cluster = Cluster { dir, flags, server: String::new() };
        symlink(BINARY, cluster.dir.join("bin/fairlead")).expect("fairlead can be linked");
        cluster.play_with(kubectl);
        cluster.start(nodes);
        for image in IMAGES {
            let file = images().join(image);
            assert!(file.is_file(), "{} is not there: run `cargo xtask image`", file.display());
            cluster.fairlead(&["image", "--data-dir", &cluster.data_dir(), "import", &file.to_string_lossy()]);
        }
        let kubeconfig = fs::read_to_string(cluster.dir.join("data/kubeconfig")).expect("`up` wrote a kubeconfig");
        // YAML or JSON, it is the one URL in it.
        let begin = kubeconfig.find("https://").expect("the kubeconfig names a server");
        let end = kubeconfig[begin..].find(['"', '\n', ',']).unwrap_or(kubeconfig.len() - begin);
        cluster.server = kubeconfig[begin..begin + end].to_owned();
        cluster
    }

    /// `up`, the first time or again.
    pub fn start(&self, nodes: u8) {
        let (nodes, dir) = (nodes.to_string(), self.data_dir());
        self.fairlead(&[&["up", "--detach", "--nodes", &nodes, "--data-dir", &dir], self.flags].concat());
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
        command.env("EXAMPLES", root.join("examples")).env("IMAGES", images());
        command
    }

    fn fairlead(&self, words: &[&str]) {
        let mut command = Command::new("timeout");
        let done = command.args(["--kill-after=5", SECONDS_TO_START, BINARY]).args(words).output();
        let done = done.expect("the built binary runs");
        let said = String::from_utf8_lossy(&done.stderr);
        assert!(done.status.success(), "fairlead {} ended with {}: {said}", words.join(" "), done.status);
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

/// Clusters of runs that were killed before they could clean up.
fn sweep() {
    for entry in fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next());
        if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
            end(&entry.path());
        }
    }
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
