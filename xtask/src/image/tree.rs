//! The files of an image as a value: a sorted map from path to entry.

use std::collections::BTreeMap;
use std::io::Read;

use anyhow::{Context, Result, bail};

/// Debian's merged /usr: a package may still ship a file under the short name.
const MERGED: &[&str] = &["bin", "sbin", "lib", "lib64"];

#[derive(Clone)]
pub enum Entry {
    File { mode: u32, bytes: Vec<u8> },
    Link { target: String },
    Dir { mode: u32 },
}

/// Paths are relative to the root, without a leading `./`.
#[derive(Clone, Default)]
pub struct Tree(BTreeMap<String, Entry>);

impl Tree {
    pub fn from_tar(tar: &[u8]) -> Result<Tree> {
        let mut tree = Tree::default();
        let mut archive = tar::Archive::new(tar);
        for entry in archive.entries()? {
            let mut entry = entry?;
            let path = merged(&entry.path()?.to_string_lossy());
            let mode = entry.header().mode()?;
            let kind = entry.header().entry_type();
            let value = match kind {
                tar::EntryType::Regular => {
                    let mut bytes = Vec::new();
                    entry.read_to_end(&mut bytes)?;
                    Entry::File { mode, bytes }
                }
                tar::EntryType::Symlink => Entry::Link { target: link_target(&entry, &path)? },
                // The same file under a second name: a copy is as good in an image.
                tar::EntryType::Link => {
                    let target = merged(&link_target(&entry, &path)?);
                    tree.0
                        .get(&target)
                        .with_context(|| format!("{path} links to {target}, which is not there"))?
                        .clone()
                }
                tar::EntryType::Directory => Entry::Dir { mode },
                other => bail!("{path} is a {other:?}, which no image here needs"),
            };
            tree.0.insert(path, value);
        }
        Ok(tree)
    }

    pub fn only(mut self, keep: impl Fn(&str) -> bool) -> Tree {
        self.0.retain(|path, entry| !matches!(entry, Entry::Dir { .. }) && keep(path));
        self
    }

    pub fn add_all(&mut self, other: Tree) {
        self.0.extend(other.0);
    }

    pub fn bytes(&self, path: &str) -> Result<&[u8]> {
        match self.0.get(path) {
            Some(Entry::File { bytes, .. }) => Ok(bytes),
            _ => bail!("no file {path} in the package"),
        }
    }

    pub fn file(&mut self, path: &str, mode: u32, bytes: impl Into<Vec<u8>>) {
        self.0.insert(path.to_owned(), Entry::File { mode, bytes: bytes.into() });
    }

    pub fn link(&mut self, path: &str, target: &str) {
        self.0.insert(path.to_owned(), Entry::Link { target: target.to_owned() });
    }

    pub fn dir(&mut self, path: &str, mode: u32) {
        self.0.insert(path.to_owned(), Entry::Dir { mode });
    }

    /// The regular files.
    pub fn files(&self) -> impl Iterator<Item = (&str, &[u8])> {
        self.0.iter().filter_map(|(path, entry)| match entry {
            Entry::File { bytes, .. } => Some((path.as_str(), bytes.as_slice())),
            _ => None,
        })
    }

    /// All entries with the parents that nobody named, parents before children, and Debian's short names.
    pub fn whole(mut self) -> BTreeMap<String, Entry> {
        for short in MERGED {
            self.link(short, &format!("usr/{short}"));
        }
        let parents: Vec<String> = self.0.keys().flat_map(|path| parents(path)).collect();
        for parent in parents {
            self.0.entry(parent).or_insert(Entry::Dir { mode: 0o755 });
        }
        self.0
    }

    /// One layer: sorted, owned by root, without times, parents before children.
    pub fn layer(self) -> Result<Vec<u8>> {
        let mut tar = tar::Builder::new(Vec::new());
        for (path, entry) in &self.whole() {
            append(&mut tar, path, entry).with_context(|| format!("cannot pack {path}"))?;
        }
        Ok(tar.into_inner()?)
    }
}

fn append(tar: &mut tar::Builder<Vec<u8>>, path: &str, entry: &Entry) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(0);
    match entry {
        Entry::File { mode, bytes } => {
            header.set_mode(*mode);
            header.set_size(bytes.len() as u64);
            tar.append_data(&mut header, path, bytes.as_slice())?;
        }
        Entry::Link { target } => {
            header.set_entry_type(tar::EntryType::Symlink);
            header.set_mode(0o777);
            tar.append_link(&mut header, path, target)?;
        }
        Entry::Dir { mode } => {
            header.set_entry_type(tar::EntryType::Directory);
            header.set_mode(*mode);
            tar.append_data(&mut header, format!("{path}/"), std::io::empty())?;
        }
    }
    Ok(())
}

fn link_target<R: Read>(entry: &tar::Entry<'_, R>, path: &str) -> Result<String> {
    let target = entry.link_name()?.with_context(|| format!("{path} links to nothing"))?;
    Ok(target.to_string_lossy().into_owned())
}

fn merged(path: &str) -> String {
    let path = path.trim_start_matches("./").trim_matches('/');
    let first = path.split('/').next().unwrap_or(path);
    if MERGED.contains(&first) { format!("usr/{path}") } else { path.to_owned() }
}

fn parents(path: &str) -> Vec<String> {
    path.match_indices('/').map(|(end, _)| path[..end].to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_sorted_whole_and_the_same_every_time() {
        let mut tree = Tree::default();
        tree.file("usr/bin/b", 0o755, "b");
        tree.link("usr/bin/a", "b");
        let first = tree.clone().layer().expect("a layer");
        assert_eq!(first, tree.layer().expect("a layer"));

        let again = Tree::from_tar(&first).expect("our own tar");
        let paths: Vec<&str> = again.0.keys().map(String::as_str).collect();
        assert!(paths.windows(2).all(|pair| pair[0] < pair[1]));
        assert_eq!(again.bytes("usr/bin/b").expect("the file"), b"b");
        assert!(paths.contains(&"usr/bin"), "a parent that no package names is made: {paths:?}");
    }

    #[test]
    fn short_names_are_merged_into_usr() {
        assert_eq!(merged("./lib/x86_64-linux-gnu/libz.so.1"), "usr/lib/x86_64-linux-gnu/libz.so.1");
        assert_eq!(merged("./etc/nginx/"), "etc/nginx");
    }
}
