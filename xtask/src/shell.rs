//! Running other programs, so that what is run can be seen and a failure names it.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long `until` asks.
const PATIENCE: Duration = Duration::from_secs(60);

/// The repository, wherever it is checked out.
pub fn root() -> PathBuf {
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().expect("xtask lies in the repository").to_path_buf()
}

/// Cargo's own answer, so that CARGO_TARGET_DIR and a configured target directory both count.
pub fn target_dir() -> Result<PathBuf> {
    let metadata = cargo_metadata()?;
    let dir = metadata["target_directory"].as_str().context("cargo metadata names no target directory")?;
    Ok(PathBuf::from(dir))
}

/// The workspace's packages and their declared dependencies; reads manifests only, so it works offline.
pub fn cargo_metadata() -> Result<serde_json::Value> {
    let text = output(cargo().args(["metadata", "--no-deps", "--offline", "--format-version", "1"]))?;
    serde_json::from_str(&text).context("cargo metadata did not print JSON")
}

/// The cargo that runs us, in the repository's root.
pub fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Runs a command whose output the reader should see; its failure is ours.
pub fn step(command: &mut Command) -> Result<()> {
    println!("+ {}", words(command));
    let status = command.status().with_context(|| format!("cannot run {}", words(command)))?;
    if !status.success() {
        bail!("`{}` ended with {status}", words(command));
    }
    Ok(())
}

/// Runs a command and returns what it printed; its failure is ours and carries what it complained of.
pub fn output(command: &mut Command) -> Result<String> {
    String::from_utf8(bytes(command)?).with_context(|| format!("`{}` did not print text", words(command)))
}

/// As `output`, for what is not text.
pub fn bytes(command: &mut Command) -> Result<Vec<u8>> {
    let done = command
        .stdin(Stdio::null())
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .output()
        .with_context(|| format!("cannot run {}", words(command)))?;
    if !done.status.success() {
        let complaint = String::from_utf8_lossy(&done.stderr);
        bail!("`{}` ended with {}: {}", words(command), done.status, complaint.trim());
    }
    Ok(done.stdout)
}

/// The command as a person would type it.
pub fn words(command: &Command) -> String {
    let name = Path::new(command.get_program()).file_name().unwrap_or(command.get_program()).to_string_lossy();
    let mut line = name.into_owned();
    for word in command.get_args() {
        line.push(' ');
        let word = word.to_string_lossy();
        if word.is_empty() || word.contains([' ', '\'', '"', '$', '\n']) {
            line.push_str(&format!("'{word}'"));
        } else {
            line.push_str(&word);
        }
    }
    line
}

/// The file that a name on PATH stands for.
pub fn which(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH")?;
    std::env::split_paths(&path).map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Asks again until it is so, for what is no event to us: another program's progress.
pub fn until(what: &str, mut is_so: impl FnMut() -> Result<bool>) -> Result<()> {
    let begun = Instant::now();
    while !is_so()? {
        if begun.elapsed() > PATIENCE {
            bail!("waited {} s in vain until {what}", PATIENCE.as_secs());
        }
        std::thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}
