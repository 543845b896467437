//! Debian packages as the source of an image's files.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::image::tree::Tree;
use crate::shell;

/// Packages that were downloaded once; apt verifies them against Debian's signed lists.
pub struct Packages {
    dir: PathBuf,
    /// In Debian's words, which are OCI's words too for the machines we build on: amd64, arm64.
    pub architecture: String,
    files: BTreeMap<String, PathBuf>,
}

impl Packages {
    pub fn new(dir: PathBuf) -> Result<Packages> {
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let architecture = shell::output(Command::new("dpkg").arg("--print-architecture"))?.trim().to_owned();
        Ok(Packages { dir, architecture, files: BTreeMap::new() })
    }

    /// The files of a package.
    pub fn tree(&mut self, package: &str) -> Result<Tree> {
        let deb = self.download(package)?;
        let tar = shell::bytes(Command::new("dpkg-deb").arg("--fsys-tarfile").arg(&deb))?;
        Tree::from_tar(&tar).with_context(|| format!("cannot read package {package}"))
    }

    /// The shared libraries that a package needs, and that these need in turn.
    ///
    /// Only libraries are followed: an image needs no init scripts, no debconf and no iproute2.
    pub fn libraries(&mut self, package: &str) -> Result<Tree> {
        let mut libraries = Tree::default();
        let mut seen = BTreeSet::new();
        let mut open = vec![package.to_owned()];
        while let Some(next) = open.pop() {
            if !seen.insert(next.clone()) {
                continue;
            }
            if next != package {
                libraries.add_all(self.tree(&next)?.only(is_shared_library));
            }
            open.extend(self.depends(&next)?.into_iter().filter(|name| is_library(name)));
        }
        Ok(libraries)
    }

    /// The first alternative of each dependency.
    pub fn depends(&mut self, package: &str) -> Result<Vec<String>> {
        let deb = self.download(package)?;
        Ok(names(&shell::output(Command::new("dpkg-deb").arg("--field").arg(&deb).arg("Depends"))?))
    }

    fn download(&mut self, package: &str) -> Result<PathBuf> {
        if let Some(file) = self.files.get(package) {
            return Ok(file.clone());
        }
        if self.fetch(package).is_err() {
            // A machine whose package lists are older than the archive asks for files that are gone.
            shell::step(Command::new("apt-get").arg("update"))?;
            self.fetch(package)?;
        }
        let file = self.newest(package)?;
        self.files.insert(package.to_owned(), file.clone());
        Ok(file)
    }

    fn fetch(&self, package: &str) -> Result<()> {
        let mut command = Command::new("apt-get");
        // apt's own unprivileged user cannot write into our directory.
        command.args(["-o", "APT::Sandbox::User=root", "download", package]).current_dir(&self.dir);
        shell::output(&mut command).map(drop)
    }

    fn newest(&self, package: &str) -> Result<PathBuf> {
        let prefix = format!("{package}_");
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with(&prefix) && name.ends_with(".deb") {
                found.push((entry.metadata()?.modified()?, entry.path()));
            }
        }
        let newest = found.into_iter().max().with_context(|| format!("apt-get download left no file of {package}"))?;
        Ok(newest.1)
    }
}

fn names(depends: &str) -> Vec<String> {
    depends.split(',').filter_map(|clause| clause.trim().split([' ', '|', ':']).next()).map(str::to_owned).collect()
}

fn is_library(package: &str) -> bool {
    package.starts_with("lib") || package.starts_with("zlib")
}

fn is_shared_library(path: &str) -> bool {
    let name = path.rsplit('/').next().unwrap_or(path);
    let in_search_path = path.starts_with("usr/lib/") || path.starts_with("usr/lib64/");
    // Character set converters are libraries that no image here loads.
    in_search_path && !path.contains("/gconv/") && !path.contains("/audit/") && name.contains(".so")
}

#[cfg(test)]
mod tests {
    use super::{is_library, names};

    #[test]
    fn only_libraries_are_followed() {
        let depends =
            "libc6 (>= 2.34), zlib1g (>= 1:1.1.4), iproute2, nginx-common (<< 2), libssl3 | libssl3t64, libfoo:any";
        let libraries: Vec<String> = names(depends).into_iter().filter(|name| is_library(name)).collect();
        assert_eq!(libraries, ["libc6", "zlib1g", "libssl3", "libfoo"]);
    }
}
