//! An image archive as `docker save` writes it today: an OCI layout that also carries the older `manifest.json`.

use anyhow::Result;
use serde_json::{Value, json};

use crate::image::hex;
use crate::image::recipes::Recipe;

const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";

/// The same image gives the same bytes, so its creation time is no time.
const CREATED: &str = "1970-01-01T00:00:00Z";

pub fn pack(recipe: &Recipe, layer: Vec<u8>, architecture: &str) -> Result<Vec<u8>> {
    let layer = Blob::new(LAYER, layer);
    let config = Blob::json(CONFIG, &config(recipe, architecture, &layer));
    let manifest = Blob::json(
        MANIFEST,
        &json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config.descriptor(), "layers": [layer.descriptor()] }),
    );
    let (_, tag) = recipe.name.split_once(':').unwrap_or((recipe.name, "latest"));
    let mut named = manifest.descriptor();
    named["annotations"] = json!({
        "io.containerd.image.name": format!("docker.io/library/{}", recipe.name),
        "org.opencontainers.image.ref.name": tag,
    });
    let index = json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [named] });
    let docker = json!([{ "Config": config.path(), "RepoTags": [recipe.name], "Layers": [layer.path()] }]);

    let mut tar = tar::Builder::new(Vec::new());
    let mut blobs = [&config, &manifest, &layer];
    blobs.sort_by_key(|blob| blob.path());
    for blob in blobs {
        append(&mut tar, &blob.path(), &blob.bytes)?;
    }
    append(&mut tar, "index.json", index.to_string().as_bytes())?;
    append(&mut tar, "manifest.json", docker.to_string().as_bytes())?;
    append(&mut tar, "oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    Ok(tar.into_inner()?)
}

fn config(recipe: &Recipe, architecture: &str, layer: &Blob) -> Value {
    json!({
        "created": CREATED,
        "architecture": architecture,
        "os": "linux",
        "config": {
            "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"],
            "Entrypoint": recipe.entrypoint,
            "Cmd": recipe.cmd,
            "ExposedPorts": recipe.ports.iter().map(|port| (format!("{port}/tcp"), json!({}))).collect::<serde_json::Map<_, _>>(),
            "WorkingDir": "/",
        },
        // The layer is not compressed: its digest is also its diff id.
        "rootfs": { "type": "layers", "diff_ids": [layer.digest()] },
        "history": [{ "created": CREATED, "created_by": "cargo xtask image" }],
    })
}

struct Blob {
    media_type: &'static str,
    bytes: Vec<u8>,
    hex: String,
}

impl Blob {
    fn new(media_type: &'static str, bytes: Vec<u8>) -> Blob {
        Blob { media_type, hex: hex(&bytes), bytes }
    }

    fn json(media_type: &'static str, value: &Value) -> Blob {
        Blob::new(media_type, value.to_string().into_bytes())
    }

    fn digest(&self) -> String {
        format!("sha256:{}", self.hex)
    }

    fn path(&self) -> String {
        format!("blobs/sha256/{}", self.hex)
    }

    fn descriptor(&self) -> Value {
        json!({ "mediaType": self.media_type, "digest": self.digest(), "size": self.bytes.len() })
    }
}

fn append(tar: &mut tar::Builder<Vec<u8>>, path: &str, bytes: &[u8]) -> Result<()> {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o644);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(bytes.len() as u64);
    Ok(tar.append_data(&mut header, path, bytes)?)
}
