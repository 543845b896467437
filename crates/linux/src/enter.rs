//! Starts a program inside a node: its cgroup, its mount namespace, its network namespace.
//!
//! A mount namespace can be entered only by a process of one thread, so the binary starts itself anew with a hidden subcommand,
//! `enter`, which moves the young process and then becomes the wanted program: same pid, same pipes, same exit code.

// Namespaces are entered here, by a process of one thread.
#![allow(clippy::disallowed_methods)]

use std::convert::Infallible;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use nix::sched::{CloneFlags, setns, unshare};

use crate::cgroup_v1v2::{CgroupTree, TreeError};

#[derive(Debug, thiserror::Error)]
pub enum EnterError {
    #[error("enter {}: {source}; is the cluster up? `fairlead status` tells", .path.display())]
    Namespace { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Cgroup(#[from] TreeError),
    #[error("run {}: {source}", .program.display())]
    Program { program: PathBuf, source: io::Error },
    #[error("enter takes --netns PATH, --mntns PATH and --cgroup PATH, then -- and a command; got {0:?}")]
    Usage(OsString),
    #[error("find this program's own file: {0}; /proc has to be mounted")]
    Own(io::Error),
}

/// Where to run a program. What is `None` stays the caller's.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    pub netns: Option<PathBuf>,
    pub mntns: Option<PathBuf>,
    /// A path that exists in every hierarchy.
    pub cgroup: Option<String>,
}

impl Entry {
    /// A command that runs `program` there. The running binary has to call [`main`] for the subcommand `enter`.
    pub fn command(
        &self,
        program: impl AsRef<OsStr>,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Result<Command, EnterError> {
        // Not /proc/self/exe: the command may be started by another process of this program.
        let own = std::env::current_exe().map_err(EnterError::Own)?;
        let mut command = Command::new(own);
        command.arg("enter").args(self.arguments()).arg("--").arg(program).args(arguments);
        Ok(command)
    }

    /// The command line that [`main`] understands, without the subcommand and without the program.
    pub fn arguments(&self) -> Vec<OsString> {
        let mut all = Vec::new();
        let mut put = |flag: &str, value: Option<&OsStr>| {
            if let Some(value) = value {
                all.extend([OsString::from(flag), value.to_owned()]);
            }
        };
        put("--netns", self.netns.as_deref().map(Path::as_os_str));
        put("--mntns", self.mntns.as_deref().map(Path::as_os_str));
        put("--cgroup", self.cgroup.as_deref().map(OsStr::new));
        all
    }

    /// Moves the calling process, which must have one thread only.
    pub fn enter(&self) -> Result<(), EnterError> {
        // Opened before the mount namespace changes, in which these paths may not exist.
        let netns = self.netns.as_deref().map(open).transpose()?;
        let mntns = self.mntns.as_deref().map(open).transpose()?;
        if let Some(cgroup) = &self.cgroup {
            CgroupTree::new(cgroup.clone())?.enter(0)?;
        }
        let failed = |path: &Option<PathBuf>, source: io::Error| EnterError::Namespace {
            path: path.clone().unwrap_or_default(),
            source,
        };
        if let Some(netns) = netns {
            setns(&netns, CloneFlags::CLONE_NEWNET).map_err(|errno| failed(&self.netns, errno.into()))?;
        }
        if let Some(mntns) = mntns {
            let here = std::env::current_dir();
            unshare(CloneFlags::CLONE_FS)
                .and_then(|()| setns(&mntns, CloneFlags::CLONE_NEWNS))
                .map_err(|errno| failed(&self.mntns, errno.into()))?;
            // Entering moves to the root directory. Below the old /run there may be no such directory any more.
            let stayed = here.is_ok_and(|here| std::env::set_current_dir(here).is_ok());
            if !stayed {
                std::env::set_current_dir("/").map_err(|source| failed(&self.mntns, source))?;
            }
        }
        Ok(())
    }
}

/// The hidden subcommand: call it first thing, before any thread exists, with what follows `enter` on the command line.
/// It returns only when it fails.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> Result<Infallible, EnterError> {
    let (entry, command) = parse(arguments)?;
    let Some((program, arguments)) = command.split_first() else { return Err(EnterError::Usage("no command".into())) };
    entry.enter()?;
    let source = Command::new(program).args(arguments).exec();
    Err(EnterError::Program { program: program.into(), source })
}

fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<(Entry, Vec<OsString>), EnterError> {
    let mut arguments = arguments.into_iter();
    let mut entry = Entry::default();
    while let Some(flag) = arguments.next() {
        if flag == "--" {
            break;
        }
        let value = arguments.next().ok_or_else(|| EnterError::Usage(flag.clone()))?;
        match flag.to_str() {
            Some("--netns") => entry.netns = Some(value.into()),
            Some("--mntns") => entry.mntns = Some(value.into()),
            Some("--cgroup") => entry.cgroup = Some(value.into_string().map_err(EnterError::Usage)?),
            _ => return Err(EnterError::Usage(flag)),
        }
    }
    Ok((entry, arguments.collect()))
}

fn open(path: &Path) -> Result<File, EnterError> {
    File::open(path).map_err(|source| EnterError::Namespace { path: path.into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_on_the_command_line_is_read_back() {
        let entry = Entry { netns: Some("/a".into()), mntns: None, cgroup: Some("fairlead-1/node-1".into()) };
        let mut line = entry.arguments();
        let command = ["sh", "--netns"].map(OsString::from).to_vec();
        line.push("--".into());
        line.extend(command.clone());
        assert_eq!(parse(line).expect("a well-formed line"), (entry, command));
        assert!(parse([OsString::from("--what")]).is_err());
    }
}
