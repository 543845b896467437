//! What is written down about a cluster in `/run/fairlead/ID`: enough to find, show and end it when nothing else is left.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::plan::LabConfig;

pub(crate) const RUN_ROOT: &str = "/run/fairlead";
const FILE: &str = "cluster.json";

/// One cluster of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Cluster {
    pub id: String,
    pub config: LabConfig,
    /// The roles that run as processes of their own, by name.
    #[serde(default)]
    pub processes: Vec<Process>,
}

/// A process by number and start time: the number alone may have been given to another one since.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    pub role: String,
    pub pid: u32,
    /// Clock ticks between boot and the start of the process.
    pub started: u64,
}

impl Process {
    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.started)
    }
}

impl Cluster {
    pub fn run_dir(&self) -> PathBuf {
        run_dir(&self.id)
    }

    /// `None` when there is no such cluster.
    pub(crate) fn read(id: &str) -> io::Result<Option<Self>> {
        match fs::read(run_dir(id).join(FILE)) {
            Ok(bytes) => serde_json::from_slice(&bytes).map(Some).map_err(io::Error::other),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// All at once: a reader sees the old file or the new one. /run does not outlive a loss of power, so nothing is synced.
    pub(crate) fn write(&self) -> io::Result<()> {
        let directory = self.run_dir();
        let new = directory.join(format!("{FILE}.new"));
        let mut file = File::create(&new)?;
        file.write_all(&serde_json::to_vec_pretty(self).map_err(io::Error::other)?)?;
        fs::rename(new, directory.join(FILE))
    }
}

pub(crate) fn run_dir(id: &str) -> PathBuf {
    Path::new(RUN_ROOT).join(id)
}

/// The ids of all clusters that left a trace in /run, sorted.
pub(crate) fn ids() -> io::Result<Vec<String>> {
    let entries = match fs::read_dir(RUN_ROOT) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut ids = Vec::new();
    for entry in entries {
        ids.extend(entry?.file_name().into_string().ok().filter(|name| is_id(name)));
    }
    ids.sort();
    Ok(ids)
}

pub(crate) fn is_id(text: &str) -> bool {
    text.len() == 8 && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// The short id of a data directory: 32 bits of FNV-1a over its canonical path, which need not exist any more.
pub fn id_of(data_dir: &Path) -> io::Result<String> {
    let canonical = canonical(data_dir)?;
    let hash = canonical
        .as_os_str()
        .as_encoded_bytes()
        .iter()
        .fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193));
    Ok(format!("{hash:08x}"))
}

/// Links are resolved as far as the path exists.
pub(crate) fn canonical(path: &Path) -> io::Result<PathBuf> {
    let absolute = std::path::absolute(path)?;
    let mut missing = Vec::new();
    let mut existing = absolute.as_path();
    loop {
        match existing.canonicalize() {
            Ok(found) => return Ok(missing.iter().rev().fold(found, |path, part| path.join(part))),
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Err(error) => match (existing.components().next_back(), existing.parent()) {
                (Some(Component::Normal(part)), Some(parent)) => {
                    missing.push(part);
                    existing = parent;
                }
                _ => return Err(error),
            },
        }
    }
}

/// Field 22 of /proc/PID/stat; `None` when there is no such process.
pub(crate) fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The second field is a name in parentheses that may itself hold blanks and parentheses.
    let (_, rest) = stat.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    // A zombie has ended.
    if fields.next()? == "Z" {
        return None;
    }
    fields.nth(18)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_the_directory_s_whatever_the_way_to_it_and_after_it_is_gone() {
        let id = id_of(Path::new("/tmp")).expect("an id");
        assert!(is_id(&id));
        assert_eq!(id_of(Path::new("/usr/../tmp/.")).expect("an id"), id);
        let gone = id_of(Path::new("/tmp/never-made-by-anyone/below")).expect("an id");
        assert_ne!(gone, id);
        assert!(!is_id("../../ab") && !is_id("ABCDEF01") && !is_id(""));
    }

    #[test]
    fn a_process_is_known_by_its_start_not_by_its_number_alone() {
        let pid = std::process::id();
        let started = start_time(pid).expect("this process runs");
        assert!(Process { role: "test".into(), pid, started }.is_alive());
        assert!(!Process { role: "test".into(), pid, started: started + 1 }.is_alive());
    }
}
