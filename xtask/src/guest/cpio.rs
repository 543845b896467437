//! A file tree as the archive that Linux unpacks at boot (Documentation/driver-api/early-userspace/buffer-format.rst).

use crate::image::tree::{Entry, Tree};

const DIRECTORY: u32 = 0o040_000;
const REGULAR: u32 = 0o100_000;
const SYMLINK: u32 = 0o120_000;

/// Parents come before children. Archives may follow each other in one file: later ones add to and replace earlier ones.
pub fn pack(tree: Tree) -> Vec<u8> {
    let mut archive = Vec::new();
    for (number, (path, entry)) in (1..).zip(&tree.whole()) {
        let (mode, bytes) = match entry {
            Entry::Dir { mode } => (DIRECTORY | mode, &[][..]),
            Entry::File { mode, bytes } => (REGULAR | mode, bytes.as_slice()),
            Entry::Link { target } => (SYMLINK | 0o777, target.as_bytes()),
        };
        member(&mut archive, number, path, mode, bytes);
    }
    member(&mut archive, 0, "TRAILER!!!", 0, &[]);
    // The next archive starts at a multiple of four.
    pad(&mut archive);
    archive
}

fn member(archive: &mut Vec<u8>, number: u32, path: &str, mode: u32, bytes: &[u8]) {
    let size = u32::try_from(bytes.len()).expect("a guest has less memory than such a file needs");
    let name = u32::try_from(path.len() + 1).expect("a path is short");
    archive.extend_from_slice(b"070701");
    // Inode, mode, user, group, links, time, size, device and special device (two numbers each), name, checksum.
    for field in [number, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name, 0] {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(path.as_bytes());
    archive.push(0);
    pad(archive);
    archive.extend_from_slice(bytes);
    pad(archive);
}

fn pad(archive: &mut Vec<u8>) {
    archive.resize(archive.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_aligned_and_end_with_the_trailer() {
        let mut tree = Tree::default();
        tree.file("init", 0o755, "#!x");
        let archive = pack(tree);
        assert!(archive.starts_with(b"070701"));
        let find = |wanted: &[u8]| archive.windows(wanted.len()).position(|found| found == wanted);
        let name = find(b"init\0").expect("the name");
        let (header, data) = (name - 110, (name + 5).next_multiple_of(4));
        assert_eq!((header % 4, &archive[header..header + 6]), (0, b"070701".as_slice()));
        assert_eq!(&archive[data..data + 3], b"#!x");
        assert!(find(b"000081ed") < find(b"TRAILER!!!"), "a regular file that may be run");
        assert_eq!(archive.len() % 4, 0);
    }
}
