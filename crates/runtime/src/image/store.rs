//! The index of images and the layers they share.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::config::{ConfigFile, ImageConfig};
use super::reference::{Reference, is_digest};
use super::unpack::{Hashing, hex, unpack_layer};
use super::{Context, ImageError};
use crate::types::ImageStatus;

/// An image that is here, with everything needed to run it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// The digest of its configuration.
    pub id: String,
    pub tags: BTreeSet<String>,
    /// `name@sha256:…` of the manifests it was pulled by.
    pub digests: BTreeSet<String>,
    pub config: ImageConfig,
    /// Digests of the uncompressed layers, from the lowest up.
    pub layers: Vec<String>,
    pub size: u64,
}

impl Image {
    pub fn status(&self) -> ImageStatus {
        ImageStatus {
            id: self.id.clone(),
            repo_tags: self.tags.iter().cloned().collect(),
            repo_digests: self.digests.iter().cloned().collect(),
            size: self.size,
            user: self.config.user.clone(),
        }
    }

    /// `NAME@DIGEST`, of the repository that `reference` names before any other. `None` if no manifest of it
    /// is known.
    pub fn pulled_as(&self, reference: &str) -> Option<&str> {
        let repository = Reference::parse(reference).ok().map(|reference| format!("{}@", reference.name()));
        let same = repository.and_then(|name| self.digests.iter().find(|digest| digest.starts_with(&name)));
        same.or(self.digests.first()).map(String::as_str)
    }
}

/// Blocking; asynchronous callers use a blocking thread.
#[derive(Debug, Clone)]
pub struct ImageStore {
    root: PathBuf,
}

#[derive(Default, Serialize, Deserialize)]
struct Index {
    images: Vec<Image>,
}

impl ImageStore {
    pub fn open(root: impl Into<PathBuf>) -> Result<ImageStore, ImageError> {
        let store = ImageStore { root: root.into() };
        for directory in ["blobs/sha256", "layers", "pins", "tmp"] {
            let path = store.root.join(directory);
            fs::create_dir_all(&path).context(|| format!("cannot make {}", path.display()))?;
        }
        Ok(store)
    }

    /// The directory that layer paths are relative to.
    pub fn layers_directory(&self) -> PathBuf {
        self.root.join("layers")
    }

    /// Directories of an image's layers, from the topmost down, as overlayfs wants them.
    pub fn layer_paths(&self, image: &Image) -> Vec<PathBuf> {
        image.layers.iter().rev().map(|id| self.layer_directory(id).join("fs")).collect()
    }

    pub fn list(&self) -> Result<Vec<Image>, ImageError> {
        let _lock = self.lock(FlockArg::LockShared)?;
        Ok(self.read_index()?.images)
    }

    /// By id, by id prefix of twelve digits or more, by tag, or by digest.
    pub fn find(&self, reference: &str) -> Result<Option<Image>, ImageError> {
        let images = self.list()?;
        Ok(find(&images, reference)?.cloned())
    }

    /// Keeps an image's layers while `bundle` exists: a container runs on them, perhaps one of another agent that shares
    /// this store.
    pub(crate) fn pin(&self, image: &str, container: &str, bundle: &Path) -> Result<(), ImageError> {
        let pin = self.root.join("pins").join(container);
        let text = format!("{image}\n{}", bundle.display());
        fs::write(&pin, text).context(|| format!("cannot write {}", pin.display()))
    }

    pub(crate) fn unpin(&self, container: &str) {
        // One that is left is removed when its bundle is found missing.
        let _ = fs::remove_file(self.root.join("pins").join(container));
    }

    fn is_pinned(&self, image: &str) -> Result<bool, ImageError> {
        let mut pinned = false;
        for entry in fs::read_dir(self.root.join("pins")).context(|| "cannot list pins".into())?.flatten() {
            let text = fs::read_to_string(entry.path()).unwrap_or_default();
            let Some((of, bundle)) = text.split_once('\n') else { continue };
            if !Path::new(bundle).exists() {
                let _ = fs::remove_file(entry.path());
            } else if of == image {
                pinned = true;
            }
        }
        Ok(pinned)
    }

    /// Removes a name, and the image itself with its last name or when named by id.
    pub fn remove(&self, reference: &str) -> Result<(), ImageError> {
        let _lock = self.lock(FlockArg::LockExclusive)?;
        let mut index = self.read_index()?;
        let Some(id) = find(&index.images, reference)?.map(|i| i.id.clone()) else { return Ok(()) };
        let by_id = id == reference || id.trim_start_matches("sha256:").starts_with(reference);
        let name = Reference::parse(reference).map(|r| r.to_string()).unwrap_or_default();
        let is_last = |image: &Image| by_id || image.tags.iter().all(|tag| *tag == name);
        if index.images.iter().any(|i| i.id == id && is_last(i)) && self.is_pinned(&id)? {
            return Err(ImageError::InUse(reference.to_owned()));
        }
        index.images.retain_mut(|image| {
            if image.id != id {
                return true;
            }
            image.tags.remove(&name);
            image.digests.remove(&name);
            !by_id && !image.tags.is_empty()
        });
        self.write_index(&index)?;
        let used: BTreeSet<&String> = index.images.iter().flat_map(|i| &i.layers).collect();
        let keep: BTreeSet<PathBuf> = used.into_iter().map(|id| self.layer_directory(id)).collect();
        for entry in fs::read_dir(self.layers_directory()).context(|| "cannot list layers".into())?.flatten() {
            if !keep.contains(&entry.path()) {
                // Moved aside first: a container that starts now must not see half a layer.
                let aside = self.scratch_path()?;
                fs::rename(entry.path(), &aside).context(|| format!("cannot move {}", entry.path().display()))?;
                fs::remove_dir_all(&aside).context(|| format!("cannot remove {}", aside.display()))?;
            }
        }
        Ok(())
    }

    /// Records an image whose layers are all unpacked here.
    pub(super) fn commit(
        &self,
        config: &[u8],
        tags: impl IntoIterator<Item = String>,
        digests: impl IntoIterator<Item = String>,
    ) -> Result<Image, ImageError> {
        let parsed = parse_config(config)?;
        let mut hash = Hashing::new(config);
        std::io::copy(&mut hash, &mut std::io::sink()).context(|| "cannot hash".into())?;
        let id = hash.digest();
        let _lock = self.lock(FlockArg::LockExclusive)?;
        let mut size = config.len() as u64;
        for layer in &parsed.rootfs.diff_ids {
            let path = self.layer_directory(layer).join("size");
            let text = fs::read_to_string(&path).context(|| format!("layer {layer} is not unpacked"))?;
            size += text.trim().parse::<u64>().unwrap_or(0);
        }
        let blob = self.root.join("blobs/sha256").join(id.trim_start_matches("sha256:"));
        fs::write(&blob, config).context(|| format!("cannot write {}", blob.display()))?;
        let mut index = self.read_index()?;
        let tags: BTreeSet<String> = tags.into_iter().collect();
        for image in &mut index.images {
            // A tag names one image.
            image.tags.retain(|tag| !tags.contains(tag));
        }
        let position = match index.images.iter().position(|i| i.id == id) {
            Some(position) => position,
            None => {
                index.images.push(Image {
                    id,
                    tags: BTreeSet::new(),
                    digests: BTreeSet::new(),
                    config: parsed.config,
                    layers: parsed.rootfs.diff_ids,
                    size,
                });
                index.images.len() - 1
            }
        };
        index.images[position].tags.extend(tags);
        index.images[position].digests.extend(digests);
        let image = index.images[position].clone();
        self.write_index(&index)?;
        Ok(image)
    }

    pub(super) fn has_layer(&self, diff_id: &str) -> bool {
        is_digest(diff_id) && self.layer_directory(diff_id).exists()
    }

    /// Unpacks a layer unless it is here already, and checks that it is the one expected.
    pub(super) fn add_layer(&self, diff_id: &str, archive: impl Read) -> Result<(), ImageError> {
        if !is_digest(diff_id) {
            return Err(ImageError::Broken(format!("{diff_id:?} is no layer digest: the image is damaged")));
        }
        if self.has_layer(diff_id) {
            return Ok(());
        }
        let scratch = self.scratch_path()?;
        let result = (|| {
            let fs_directory = scratch.join("fs");
            fs::create_dir_all(&fs_directory).context(|| format!("cannot make {}", fs_directory.display()))?;
            let unpacked = unpack_layer(archive, &fs_directory)?;
            if unpacked.diff_id != diff_id {
                return Err(ImageError::Broken(format!(
                    "a layer's content is {} but the image says {diff_id}: the image is damaged",
                    unpacked.diff_id
                )));
            }
            fs::write(scratch.join("size"), unpacked.size.to_string()).context(|| "cannot write a size".into())?;
            let _lock = self.lock(FlockArg::LockExclusive)?;
            let target = self.layer_directory(diff_id);
            if target.exists() {
                return Ok(());
            }
            fs::rename(&scratch, &target).context(|| format!("cannot move a layer to {}", target.display()))
        })();
        if scratch.exists() {
            fs::remove_dir_all(&scratch).context(|| format!("cannot remove {}", scratch.display()))?;
        }
        result
    }

    /// A path for work in progress, on the same file system, used by nobody else.
    pub(super) fn scratch_path(&self) -> Result<PathBuf, ImageError> {
        let mut bytes = [0; 12];
        fs::File::open("/dev/urandom")
            .and_then(|mut f| f.read_exact(&mut bytes))
            .context(|| "cannot read /dev/urandom".into())?;
        Ok(self.root.join("tmp").join(hex(&bytes)))
    }

    fn layer_directory(&self, diff_id: &str) -> PathBuf {
        // 96 bits of the digest: the kernel takes one page of mount options for all layers together.
        let digits = diff_id.trim_start_matches("sha256:");
        self.root.join("layers").join(digits.get(..24).unwrap_or(digits))
    }

    fn lock(&self, how: FlockArg) -> Result<Flock<fs::File>, ImageError> {
        let path = self.root.join("lock");
        let file = fs::File::options()
            .create(true)
            .append(true)
            .open(&path)
            .context(|| format!("cannot open {}", path.display()))?;
        Flock::lock(file, how)
            .map_err(|(_, e)| ImageError::Io { what: format!("cannot lock {}", path.display()), source: e.into() })
    }

    fn read_index(&self) -> Result<Index, ImageError> {
        let path = self.root.join("index.json");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Index::default()),
            Err(e) => return Err(e).context(|| format!("cannot read {}", path.display())),
        };
        serde_json::from_slice(&bytes).map_err(|e| {
            ImageError::Broken(format!("{} is damaged ({e}): remove it and import the images again", path.display()))
        })
    }

    fn write_index(&self, index: &Index) -> Result<(), ImageError> {
        let bytes = serde_json::to_vec(index).expect("an index has only string keys");
        write_durably(&self.root.join("index.json"), &bytes).context(|| "cannot write the index".into())
    }
}

pub(super) fn parse_config(bytes: &[u8]) -> Result<ConfigFile, ImageError> {
    serde_json::from_slice(bytes)
        .map_err(|e| ImageError::Broken(format!("the image's configuration is unreadable: {e}")))
}

/// Either the old content or the new is there, whenever power goes.
fn write_durably(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let mut file = fs::File::create(&beside)?;
    std::io::Write::write_all(&mut file, bytes)?;
    file.sync_data()?;
    fs::rename(&beside, path)
}

fn find<'a>(images: &'a [Image], reference: &str) -> Result<Option<&'a Image>, ImageError> {
    let digits = reference.trim_start_matches("sha256:");
    let is_id = digits.len() >= 12 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    if is_id && let Some(image) = images.iter().find(|i| i.id["sha256:".len()..].starts_with(digits)) {
        return Ok(Some(image));
    }
    let parsed = match Reference::parse(reference) {
        Ok(parsed) => parsed,
        Err(_) if is_id => return Ok(None),
        Err(e) => return Err(e),
    };
    if let Some(digest) = &parsed.digest {
        let name = format!("{}@{digest}", parsed.name());
        return Ok(images.iter().find(|i| i.digests.contains(&name)));
    }
    let name = parsed.to_string();
    Ok(images.iter().find(|i| i.tags.contains(&name)))
}
