//! Writes a volume's files so that a reader sees all of the old or all of the new, never a mixture.
//!
//! Called AtomicWriter in Kubernetes: the files lie in a directory of their own, `..data` is a link to it that is
//! replaced by rename, and each name in the volume is a link through `..data`.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, chown, symlink};
use std::path::{Component, Path};

/// A file's content and permissions, by its path in the volume.
pub type Payload = BTreeMap<String, (Vec<u8>, u32)>;

/// A path that stays in the volume.
pub fn is_inside(path: &str) -> bool {
    !path.is_empty()
        && !path.starts_with("..")
        && Path::new(path).components().all(|c| matches!(c, Component::Normal(_)))
}

/// Returns whether anything had to change.
pub fn write(volume: &Path, payload: &Payload, group: Option<u32>) -> io::Result<bool> {
    if let Some(path) = payload.keys().find(|p| !is_inside(p)) {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("path {path:?} leaves the volume")));
    }
    fs::create_dir_all(volume)?;
    let data = volume.join("..data");
    if is_current(&data, payload) {
        return Ok(false);
    }
    let old = fs::read_link(&data).ok();
    let name = format!("..{}", jiff::Timestamp::now().strftime("%Y_%m_%d_%H_%M_%S.%9f"));
    let fresh = volume.join(&name);
    fs::create_dir(&fresh)?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(0o755))?;
    for (path, (content, mode)) in payload {
        let file = fresh.join(path);
        if let Some(parent) = file.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&file, content)?;
        let mode = if group.is_some() { mode | 0o040 } else { *mode };
        if let Some(group) = group {
            chown(&file, None, Some(group))?;
        }
        fs::set_permissions(&file, fs::Permissions::from_mode(mode))?;
    }
    let aside = volume.join("..data_tmp");
    remove(&aside)?;
    symlink(&name, &aside)?;
    fs::rename(&aside, &data)?;
    let tops: BTreeSet<&str> = payload.keys().filter_map(|p| p.split('/').next()).collect();
    for top in &tops {
        let link = volume.join(top);
        if fs::symlink_metadata(&link).is_err() {
            symlink(Path::new("..data").join(top), &link)?;
        }
    }
    for entry in fs::read_dir(volume)?.flatten() {
        let entry_name = entry.file_name().to_string_lossy().into_owned();
        if !entry_name.starts_with("..") && !tops.contains(entry_name.as_str()) {
            remove(&entry.path())?;
        }
    }
    if let Some(old) = old.filter(|o| *o != Path::new(&name)) {
        match fs::remove_dir_all(volume.join(old)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
    }
    Ok(true)
}

fn is_current(data: &Path, payload: &Payload) -> bool {
    let mut files = BTreeMap::new();
    data.is_dir()
        && collect(data, "", &mut files).is_ok()
        && files.len() == payload.len()
        && payload.iter().all(|(path, (content, _))| files.get(path) == Some(content))
}

fn collect(directory: &Path, prefix: &str, into: &mut BTreeMap<String, Vec<u8>>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let path = format!("{prefix}{}", entry.file_name().to_string_lossy());
        if entry.file_type()?.is_dir() {
            collect(&entry.path(), &format!("{path}/"), into)?;
        } else {
            into.insert(path, fs::read(entry.path())?);
        }
    }
    Ok(())
}

fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readers_follow_links_and_stale_names_go() {
        let volume = std::env::temp_dir().join(format!("fairlead-payload-{}", std::process::id()));
        let payload = |names: &[(&str, &str)]| -> Payload {
            names.iter().map(|(n, c)| ((*n).to_owned(), (c.as_bytes().to_vec(), 0o644))).collect()
        };
        assert!(write(&volume, &payload(&[("a", "1"), ("d/b", "2")]), None).expect("written"));
        assert!(!write(&volume, &payload(&[("a", "1"), ("d/b", "2")]), None).expect("unchanged"));
        assert_eq!(fs::read_to_string(volume.join("d/b")).expect("read"), "2");
        assert!(write(&volume, &payload(&[("a", "3")]), None).expect("rewritten"));
        assert_eq!(fs::read_to_string(volume.join("a")).expect("read"), "3");
        assert!(!volume.join("d").exists());
        assert_eq!(fs::read_dir(&volume).expect("listed").count(), 3);
        assert!(write(&volume, &payload(&[("../x", "1")]), None).is_err());
        fs::remove_dir_all(volume).expect("removed");
    }
}
