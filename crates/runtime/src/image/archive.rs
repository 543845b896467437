//! Imports archives: OCI image layouts and what `docker save` writes, plain, gzip or zstd.

use std::fs;
use std::io::Read;
use std::path::Path;

use linux::mount::RootDirectory;
use nix::fcntl::OFlag;

use super::config::{Descriptor, DockerSave, Manifest};
use super::reference::{Reference, is_digest};
use super::store::{ImageStore, parse_config};
use super::unpack::{Hashing, unpack_layer};
use super::{Context, Image, ImageError};

impl ImageStore {
    /// Imports every image of an archive. `name` is given to an image that carries none.
    pub fn import(&self, archive: impl Read, name: Option<&str>) -> Result<Vec<Image>, ImageError> {
        let scratch = self.scratch_path()?;
        fs::create_dir_all(&scratch).context(|| format!("cannot make {}", scratch.display()))?;
        let result = unpack_layer(archive, &scratch)
            .map_err(|e| ImageError::Broken(format!("this is no image archive: {e}")))
            .and_then(|_| self.import_directory(&scratch, name));
        fs::remove_dir_all(&scratch).context(|| format!("cannot remove {}", scratch.display()))?;
        result
    }

    fn import_directory(&self, directory: &Path, name: Option<&str>) -> Result<Vec<Image>, ImageError> {
        // Foreign paths, links included, resolve inside this directory only.
        let root = RootDirectory::open(directory).context(|| format!("cannot open {}", directory.display()))?;
        if directory.join("manifest.json").exists() {
            self.import_docker(&root, name)
        } else if directory.join("index.json").exists() {
            self.import_oci(&root, name)
        } else {
            Err(ImageError::Broken(
                "the archive has neither index.json (OCI layout) nor manifest.json (docker save): \
                 write it with `docker save`, `podman save` or `skopeo copy … oci-archive:`"
                    .to_owned(),
            ))
        }
    }

    fn import_docker(&self, root: &RootDirectory, name: Option<&str>) -> Result<Vec<Image>, ImageError> {
        let rows: Vec<DockerSave> = read_json(root, "manifest.json")?;
        let mut images = Vec::new();
        for row in rows {
            let config = read_file(root, &row.config)?;
            let diff_ids = parse_config(&config)?.rootfs.diff_ids;
            if diff_ids.len() != row.layers.len() {
                return Err(ImageError::Broken(format!("manifest.json lists other layers than {}", row.config)));
            }
            for (diff_id, layer) in diff_ids.iter().zip(&row.layers) {
                self.add_layer(diff_id, open_file(root, layer)?)?;
            }
            let mut tags = Vec::new();
            for tag in row.repo_tags.iter().map(String::as_str).chain(name) {
                tags.push(Reference::parse(tag)?.to_string());
            }
            images.push(self.commit(&config, tags, [])?);
        }
        Ok(images)
    }

    fn import_oci(&self, root: &RootDirectory, name: Option<&str>) -> Result<Vec<Image>, ImageError> {
        let index: Manifest = read_json(root, "index.json")?;
        let mut images = Vec::new();
        for entry in &index.manifests {
            let mut manifest: Manifest = parse_manifest(&read_blob(root, entry)?)?;
            let mut digest = entry.digest.clone();
            if manifest.config.is_none() {
                let Some(chosen) = manifest.choose().cloned() else { continue };
                manifest = parse_manifest(&read_blob(root, &chosen)?)?;
                digest = entry.digest.clone();
            }
            let Some(config) = &manifest.config else { continue };
            let config = read_blob(root, config)?;
            let diff_ids = parse_config(&config)?.rootfs.diff_ids;
            if diff_ids.len() != manifest.layers.len() {
                return Err(ImageError::Broken("the manifest lists other layers than the configuration".to_owned()));
            }
            for (diff_id, layer) in diff_ids.iter().zip(&manifest.layers) {
                self.add_layer(diff_id, open_file(root, &blob_path(layer)?)?)?;
            }
            let annotation = |key: &str| entry.annotations.get(key).map(String::as_str);
            let written = annotation("io.containerd.image.name").or_else(|| {
                // Some tools write only the tag here: alone it names nothing.
                annotation("org.opencontainers.image.ref.name").filter(|n| n.contains([':', '/']))
            });
            let (mut tags, mut digests) = (Vec::new(), Vec::new());
            for name in written.into_iter().chain(name) {
                let reference = Reference::parse(name)?;
                digests.push(format!("{}@{digest}", reference.name()));
                tags.push(reference.to_string());
            }
            images.push(self.commit(&config, tags, digests)?);
        }
        if images.is_empty() {
            return Err(ImageError::Broken("the archive holds no image for linux on this processor".to_owned()));
        }
        Ok(images)
    }
}

fn blob_path(descriptor: &Descriptor) -> Result<String, ImageError> {
    if !is_digest(&descriptor.digest) {
        return Err(ImageError::Broken(format!("{:?} is no sha256 digest", descriptor.digest)));
    }
    Ok(format!("blobs/sha256/{}", &descriptor.digest["sha256:".len()..]))
}

/// Small documents only; checked against the digest that names them.
fn read_blob(root: &RootDirectory, descriptor: &Descriptor) -> Result<Vec<u8>, ImageError> {
    let bytes = read_file(root, &blob_path(descriptor)?)?;
    let mut hashing = Hashing::new(&bytes[..]);
    std::io::copy(&mut hashing, &mut std::io::sink()).context(|| "cannot hash".into())?;
    let digest = hashing.digest();
    if digest != descriptor.digest {
        return Err(ImageError::Broken(format!("blob {} has the content of {digest}", descriptor.digest)));
    }
    Ok(bytes)
}

fn open_file(root: &RootDirectory, path: &str) -> Result<fs::File, ImageError> {
    root.open_inside(Path::new(path), OFlag::O_RDONLY)
        .map(fs::File::from)
        .map_err(|e| ImageError::Broken(format!("the archive lacks {path}: {e}")))
}

fn read_file(root: &RootDirectory, path: &str) -> Result<Vec<u8>, ImageError> {
    let mut bytes = Vec::new();
    open_file(root, path)?
        .take(16 << 20)
        .read_to_end(&mut bytes)
        .map_err(|e| ImageError::Broken(format!("{path} is unreadable: {e}")))?;
    Ok(bytes)
}

fn read_json<T: serde::de::DeserializeOwned>(root: &RootDirectory, path: &str) -> Result<T, ImageError> {
    serde_json::from_slice(&read_file(root, path)?)
        .map_err(|e| ImageError::Broken(format!("{path} is unreadable: {e}")))
}

fn parse_manifest(bytes: &[u8]) -> Result<Manifest, ImageError> {
    serde_json::from_slice(bytes).map_err(|e| ImageError::Broken(format!("a manifest is unreadable: {e}")))
}
