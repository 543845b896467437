//! A tiny image made of the machine's static busybox, as two kinds of archive.

use std::collections::BTreeMap;

use anyhow::Result;
use sha2::{Digest, Sha256};

const APPLETS: &[&str] = &[
    "sh", "cat", "echo", "sleep", "httpd", "nc", "tail", "hostname", "true", "id", "touch", "grep", "wc", "ls", "ps",
    "stty", "pwd", "printf", "kill", "mkdir", "seq", "test",
];

/// As `docker save` writes it.
pub fn busybox(name: &str) -> Result<Vec<u8>> {
    let (layer, config) = parts()?;
    let manifest = serde_json::json!([{"Config": "config.json", "RepoTags": [name], "Layers": ["layer/layer.tar"]}]);
    archive(BTreeMap::from([
        ("config.json".to_owned(), config),
        ("layer/layer.tar".to_owned(), layer),
        ("manifest.json".to_owned(), manifest.to_string().into_bytes()),
    ]))
}

/// As an OCI image layout, with a gzipped layer.
#[allow(dead_code, reason = "the kubelet's tests share this file and need one kind only")]
pub fn oci_layout(name: &str) -> Result<Vec<u8>> {
    let (layer, config) = parts()?;
    let mut gz = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut gz, &layer)?;
    let mut files = BTreeMap::new();
    let mut blob = |kind: &str, bytes: Vec<u8>| {
        let digest: String = Sha256::digest(&bytes).iter().map(|b| format!("{b:02x}")).collect();
        let size = bytes.len();
        files.insert(format!("blobs/sha256/{digest}"), bytes);
        serde_json::json!({"mediaType": kind, "digest": format!("sha256:{digest}"), "size": size})
    };
    let layer = blob("application/vnd.oci.image.layer.v1.tar+gzip", gz.finish()?);
    let config = blob("application/vnd.oci.image.config.v1+json", config);
    let manifest = serde_json::json!({"schemaVersion": 2, "config": config, "layers": [layer]});
    let mut manifest = blob("application/vnd.oci.image.manifest.v1+json", manifest.to_string().into_bytes());
    manifest["annotations"] = serde_json::json!({"org.opencontainers.image.ref.name": name});
    let index = serde_json::json!({"schemaVersion": 2, "manifests": [manifest]});
    files.insert("index.json".to_owned(), index.to_string().into_bytes());
    files.insert("oci-layout".to_owned(), br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec());
    archive(files)
}

/// The layer, and the configuration that names it.
fn parts() -> Result<(Vec<u8>, Vec<u8>)> {
    let mut tar = tar::Builder::new(Vec::new());
    let mut entry = |path: &str, kind: tar::EntryType, mode: u32, data: &[u8], link: Option<&str>| -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(data.len() as u64);
        match link {
            Some(link) => tar.append_link(&mut header, path, link)?,
            None => tar.append_data(&mut header, path, data)?,
        }
        Ok(())
    };
    for (directory, mode) in [("bin/", 0o755), ("etc/", 0o755), ("tmp/", 0o1777), ("root/", 0o700)] {
        entry(directory, tar::EntryType::Directory, mode, b"", None)?;
    }
    entry("bin/busybox", tar::EntryType::Regular, 0o755, &std::fs::read("/bin/busybox")?, None)?;
    for applet in APPLETS {
        entry(&format!("bin/{applet}"), tar::EntryType::Symlink, 0o777, b"", Some("busybox"))?;
    }
    entry("etc/passwd", tar::EntryType::Regular, 0o644, b"root:x:0:0:root:/root:/bin/sh\n", None)?;
    let layer = tar.into_inner()?;
    let digest: String = Sha256::digest(&layer).iter().map(|b| format!("{b:02x}")).collect();
    let config = serde_json::json!({
        "architecture": "amd64", "os": "linux",
        "config": {"Env": ["PATH=/bin"], "Cmd": ["sh"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
    });
    Ok((layer, config.to_string().into_bytes()))
}

fn archive(files: BTreeMap<String, Vec<u8>>) -> Result<Vec<u8>> {
    let mut tar = tar::Builder::new(Vec::new());
    for (path, bytes) in files {
        let mut header = tar::Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(bytes.len() as u64);
        tar.append_data(&mut header, path, &bytes[..])?;
    }
    Ok(tar.into_inner()?)
}
