//! A pod's volumes on this node: made, filled, kept up to date, and found for mounting.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use api::ObjectExt;
use api::kinds::{CONFIG_MAPS, SECRETS, SERVICE_ACCOUNTS};
use base64::Engine;
use jiff::{SignedDuration, Timestamp};
use linux::mount::RootDirectory;
use nix::fcntl::OFlag;
use reconcile::{Api, ApiError};
use runtime::Tmpfs;
use serde_json::{Value, json};

use crate::env::{Sources, field_value, resource_value};
use crate::payload::{self, Payload};
use crate::pod::{
    ConfigMapSource, Container, DownwardItem, HostPath, KeyToPath, Pod, Projected, SecretSource, TokenSource, Volume,
    VolumeMount,
};

/// Keys and values of a config map or a secret.
pub type Data = BTreeMap<String, Vec<u8>>;

pub struct Volumes {
    root: PathBuf,
    config_maps: Api,
    secrets: Api,
    service_accounts: Api,
    /// Tokens in use: their text and when to ask for another.
    tokens: Mutex<HashMap<String, (String, Timestamp)>>,
}

#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    #[error("MountVolume.SetUp failed for volume {volume:?} : {why}")]
    SetUp { volume: String, why: String },
}

impl Volumes {
    /// `root` gets a directory per pod.
    pub fn new(root: PathBuf, client: &kube::Client) -> Volumes {
        Volumes {
            root,
            config_maps: Api::new(client, &CONFIG_MAPS),
            secrets: Api::new(client, &SECRETS),
            service_accounts: Api::new(client, &SERVICE_ACCOUNTS),
            tokens: Mutex::default(),
        }
    }

    pub fn pod_directory(&self, uid: &str) -> PathBuf {
        self.root.join(uid)
    }

    /// Makes what is missing and refreshes what has changed. Returns what the sandbox must mount for the pod.
    pub async fn prepare(&self, pod: &Pod, sources: &Sources) -> Result<Vec<Tmpfs>, VolumeError> {
        let mut tmpfs = Vec::new();
        for volume in &pod.spec.volumes {
            let failed = |why: String| VolumeError::SetUp { volume: volume.name.clone(), why };
            self.prepare_one(pod, volume, sources, &mut tmpfs).await.map_err(failed)?;
        }
        Ok(tmpfs)
    }

    async fn prepare_one(
        &self,
        pod: &Pod,
        volume: &Volume,
        sources: &Sources,
        tmpfs: &mut Vec<Tmpfs>,
    ) -> Result<(), String> {
        let path = self.path(pod, volume);
        let group = pod.spec.security_context.fs_group.and_then(|g| u32::try_from(g).ok());
        if let Some(empty) = &volume.empty_dir {
            if !path.exists() {
                fs::create_dir_all(&path)
                    .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o777)))
                    .map_err(|e| e.to_string())?;
                if let Some(group) = group {
                    chown(&path, None, Some(group))
                        .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o2777)))
                        .map_err(|e| e.to_string())?;
                }
            }
            match empty.medium.as_str() {
                "" => {}
                "Memory" => {
                    let size = empty.size_limit.and_then(|s| u64::try_from(s.0.value()).ok()).filter(|s| *s > 0);
                    tmpfs.push(Tmpfs { path, size });
                }
                other => return Err(format!("emptyDir medium {other:?} is not supported: use \"\" or Memory")),
            }
            return Ok(());
        }
        if let Some(host) = &volume.host_path {
            return prepare_host_path(host).map_err(|e| format!("hostPath {}: {e}", host.path));
        }
        let namespace = &pod.metadata.namespace;
        let mut payload = Payload::new();
        if let Some(map) = &volume.config_map {
            let mode = map.default_mode.unwrap_or(0o644);
            self.add_config_map(&mut payload, namespace, map, mode).await?;
        } else if let Some(secret) = &volume.secret {
            let mode = secret.default_mode.unwrap_or(0o644);
            self.add_secret(&mut payload, namespace, secret, mode).await?;
        } else if let Some(downward) = &volume.downward_api {
            let mode = downward.default_mode.unwrap_or(0o644);
            add_downward(&mut payload, pod, &downward.items, mode, sources)?;
        } else if let Some(projected) = &volume.projected {
            self.add_projected(&mut payload, pod, &volume.name, projected, sources).await?;
        } else {
            let kind = volume.other.keys().next().map_or("without a source", String::as_str);
            return Err(format!(
                "volumes of kind {kind} are not supported: use emptyDir, hostPath, configMap, secret, projected or \
                 downwardAPI"
            ));
        }
        payload::write(&path, &payload, group).map(drop).map_err(|e| e.to_string())
    }

    async fn add_projected(
        &self,
        payload: &mut Payload,
        pod: &Pod,
        volume: &str,
        projected: &Projected,
        sources: &Sources,
    ) -> Result<(), String> {
        let mode = projected.default_mode.unwrap_or(0o644);
        for source in &projected.sources {
            if let Some(token) = &source.service_account_token {
                let text = self.token(pod, volume, token).await?;
                payload.insert(token.path.clone(), (text.into_bytes(), mode));
            } else if let Some(map) = &source.config_map {
                self.add_config_map(payload, &pod.metadata.namespace, map, mode).await?;
            } else if let Some(secret) = &source.secret {
                self.add_secret(payload, &pod.metadata.namespace, secret, mode).await?;
            } else if let Some(downward) = &source.downward_api {
                add_downward(payload, pod, &downward.items, mode, sources)?;
            } else {
                return Err("a projection of an unsupported kind: use serviceAccountToken, configMap, secret or \
                            downwardAPI"
                    .to_owned());
            }
        }
        Ok(())
    }

    async fn add_config_map(
        &self,
        payload: &mut Payload,
        namespace: &str,
        source: &ConfigMapSource,
        mode: u32,
    ) -> Result<(), String> {
        match self.config_map(namespace, &source.name).await.map_err(|e| e.to_string())? {
            Some(data) => add_items(payload, data, &source.items, mode, source.optional)
                .map_err(|key| format!("configmap references non-existent config key: {key}")),
            None if source.optional => Ok(()),
            None => Err(format!("configmap {:?} not found", source.name)),
        }
    }

    async fn add_secret(
        &self,
        payload: &mut Payload,
        namespace: &str,
        source: &SecretSource,
        mode: u32,
    ) -> Result<(), String> {
        let name = if source.secret_name.is_empty() { &source.name } else { &source.secret_name };
        match self.secret(namespace, name).await.map_err(|e| e.to_string())? {
            Some(data) => add_items(payload, data, &source.items, mode, source.optional)
                .map_err(|key| format!("references non-existent secret key: {key}")),
            None if source.optional => Ok(()),
            None => Err(format!("secret {name:?} not found")),
        }
    }

    /// `None` when there is no such object.
    pub async fn config_map(&self, namespace: &str, name: &str) -> Result<Option<Data>, ApiError> {
        let Some(object) = self.config_maps.find(namespace, name).await? else { return Ok(None) };
        let mut data = decode(object.get("binaryData")).map_err(ApiError::Decode)?;
        let text = object.get("data").and_then(Value::as_object).into_iter().flatten();
        data.extend(text.filter_map(|(k, v)| Some((k.clone(), v.as_str()?.as_bytes().to_vec()))));
        Ok(Some(data))
    }

    pub async fn secret(&self, namespace: &str, name: &str) -> Result<Option<Data>, ApiError> {
        let Some(object) = self.secrets.find(namespace, name).await? else { return Ok(None) };
        decode(object.get("data")).map(Some).map_err(ApiError::Decode)
    }

    /// A bound token, kept until four fifths of its life are over.
    async fn token(&self, pod: &Pod, volume: &str, source: &TokenSource) -> Result<String, String> {
        let key = format!("{}/{volume}/{}", pod.metadata.uid, source.path);
        let now = Timestamp::now();
        let known = self.tokens.lock().expect("no holder panics").get(&key).cloned();
        if let Some((token, refresh)) = known
            && refresh > now
        {
            return Ok(token);
        }
        let seconds = source.expiration_seconds.unwrap_or(3600);
        let audiences: Vec<&str> = Some(source.audience.as_str()).filter(|a| !a.is_empty()).into_iter().collect();
        let account = match pod.spec.service_account_name.as_str() {
            "" => "default",
            name => name,
        };
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
            "spec": {
                "audiences": audiences, "expirationSeconds": seconds,
                "boundObjectRef": {
                    "apiVersion": "v1", "kind": "Pod", "name": pod.metadata.name, "uid": pod.metadata.uid,
                },
            },
        });
        let answer = self
            .service_accounts
            .post(&pod.metadata.namespace, account, "token", &request)
            .await
            .map_err(|e| format!("failed to fetch token: {e}"))?;
        let token = answer.text("/status/token").to_owned();
        let expires: Timestamp = answer
            .text("/status/expirationTimestamp")
            .parse()
            .unwrap_or_else(|_| now + SignedDuration::from_secs(seconds));
        let life = expires.duration_since(now);
        let refresh = now + life * 4 / 5;
        self.tokens.lock().expect("no holder panics").insert(key, (token.clone(), refresh));
        Ok(token)
    }

    pub fn forget(&self, uid: &str) {
        let prefix = format!("{uid}/");
        self.tokens.lock().expect("no holder panics").retain(|key, _| !key.starts_with(&prefix));
    }

    /// Where a volume's content lies on the node.
    pub fn path(&self, pod: &Pod, volume: &Volume) -> PathBuf {
        if let Some(host) = &volume.host_path {
            return PathBuf::from(&host.path);
        }
        let plugin = if volume.empty_dir.is_some() {
            "empty-dir"
        } else if volume.config_map.is_some() {
            "configmap"
        } else if volume.secret.is_some() {
            "secret"
        } else {
            "projected"
        };
        self.pod_directory(&pod.metadata.uid).join("volumes").join(format!("kubernetes.io~{plugin}")).join(&volume.name)
    }

    /// What to mount for one volumeMount. `sub_path` has its variables replaced.
    pub fn mount_source(&self, pod: &Pod, mount: &VolumeMount, sub_path: &str) -> Result<PathBuf, String> {
        let volume = pod
            .spec
            .volumes
            .iter()
            .find(|v| v.name == mount.name)
            .ok_or_else(|| format!("volume {:?} of a volumeMount is not in the pod", mount.name))?;
        let path = self.path(pod, volume);
        if sub_path.is_empty() {
            return Ok(path);
        }
        if !payload::is_inside(sub_path) {
            return Err(format!("subPath {sub_path:?} must be a relative path without \"..\""));
        }
        if volume.empty_dir.as_ref().is_some_and(|e| e.medium == "Memory") {
            return Err("subPath in an emptyDir of medium Memory is not supported: mount the whole volume".to_owned());
        }
        resolve_inside(&path, Path::new(sub_path)).map_err(|e| format!("subPath {sub_path:?}: {e}"))
    }

    pub fn remove(&self, uid: &str) -> io::Result<()> {
        self.forget(uid);
        match fs::remove_dir_all(self.pod_directory(uid)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }
}

/// The file or directory that a path in a volume leads to, links resolved within the volume; made when missing.
fn resolve_inside(volume: &Path, sub_path: &Path) -> io::Result<PathBuf> {
    let root = RootDirectory::open(volume)?;
    let opened = match root.open_inside(sub_path, OFlag::O_PATH) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => root.create_directories(sub_path)?,
        other => other?,
    };
    fs::read_link(format!("/proc/self/fd/{}", opened.as_raw_fd()))
}

fn decode(object: Option<&Value>) -> Result<Data, String> {
    let mut data = Data::new();
    for (key, value) in object.and_then(Value::as_object).into_iter().flatten() {
        let bytes = base64::engine::general_purpose::STANDARD
            .decode(value.as_str().unwrap_or_default())
            .map_err(|e| format!("key {key}: {e}"))?;
        data.insert(key.clone(), bytes);
    }
    Ok(data)
}

/// All keys, or the chosen ones; the error is the name of a key that is not there.
fn add_items(
    payload: &mut Payload,
    mut data: Data,
    items: &[KeyToPath],
    mode: u32,
    optional: bool,
) -> Result<(), String> {
    if items.is_empty() {
        payload.extend(data.into_iter().map(|(key, value)| (key, (value, mode))));
        return Ok(());
    }
    for item in items {
        match data.remove(&item.key) {
            Some(value) => {
                payload.insert(item.path.clone(), (value, item.mode.unwrap_or(mode)));
            }
            None if optional => {}
            None => return Err(item.key.clone()),
        }
    }
    Ok(())
}

fn add_downward(
    payload: &mut Payload,
    pod: &Pod,
    items: &[DownwardItem],
    mode: u32,
    sources: &Sources,
) -> Result<(), String> {
    let none = Container::default();
    for item in items {
        let text = if let Some(field) = &item.field_ref {
            field_value(pod, &field.field_path, sources)?
        } else if let Some(resource) = &item.resource_field_ref {
            resource_value(pod, &none, resource, sources)?
        } else {
            return Err(format!("downwardAPI item {:?} has no source", item.path));
        };
        payload.insert(item.path.clone(), (text.into_bytes(), item.mode.unwrap_or(mode)));
    }
    Ok(())
}

fn prepare_host_path(host: &HostPath) -> Result<(), String> {
    let path = Path::new(&host.path);
    let is = |wanted: fn(&fs::FileType) -> bool, what: &str| match fs::metadata(path) {
        Ok(found) if wanted(&found.file_type()) => Ok(()),
        _ => Err(format!("hostPath type check failed: {} is not a {what}", host.path)),
    };
    match host.kind.as_str() {
        "" => match path.exists() {
            true => Ok(()),
            // As container runtimes do with a source that is not there.
            false => fs::create_dir_all(path).map_err(|e| e.to_string()),
        },
        "DirectoryOrCreate" => fs::create_dir_all(path).map_err(|e| e.to_string()),
        "FileOrCreate" => fs::File::options().create(true).append(true).open(path).map(drop).map_err(|e| e.to_string()),
        "Directory" => is(|t| t.is_dir(), "directory"),
        "File" => is(|t| t.is_file(), "file"),
        "Socket" => is(|t| t.is_socket(), "socket"),
        "CharDevice" => is(|t| t.is_char_device(), "character device"),
        "BlockDevice" => is(|t| t.is_block_device(), "block device"),
        other => Err(format!("unknown hostPath type {other:?}")),
    }
}
