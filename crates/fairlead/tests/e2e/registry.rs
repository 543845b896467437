//! Images from a real registry, Debian's docker-registry: by tag, by digest, and with a password.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::cluster::{Cluster, kubectls};
use crate::daemon::{Daemon, free_ports};
use crate::death::{expect, until};
use crate::script::Script;
use crate::{play, settle};

const SECONDS: u32 = 30;
/// `open-sesame`, as bcrypt, which is all that this registry takes.
const HTPASSWD: &str = "ali:$2b$05$.iuooAW0QEANOAh2sG.D3.ixJ0QTTjgdme.Wq69Jxjy7XZvOYEinC\n";

#[test]
fn images_come_from_a_registry_and_with_a_password_where_it_wants_one() {
    let mut cluster = Cluster::new(&kubectls()[0]);
    let [open, closed] = free_ports();
    let archive = unpack(&cluster);
    let _open = registry(&cluster, "open", open, "");
    let _closed = registry(&cluster, "closed", closed, "-u ali:open-sesame");
    cluster.set("OPEN", &format!("127.0.0.1:{open}"));
    cluster.set("CLOSED", &format!("127.0.0.1:{closed}"));
    cluster.set("DIGEST", &archive.manifest);
    archive.push(&cluster, &format!("http://127.0.0.1:{open}"), "");
    archive.push(&cluster, &format!("http://127.0.0.1:{closed}"), "-u ali:open-sesame");

    // Nothing is imported: with its layers known, an image would not be fetched.
    cluster.start(1);
    let script = Script::parse("registry.txt", include_str!("../cases/registry.txt")).expect("the script can be read");
    settle(&play::play(&script, &cluster));
}

/// Starts a registry, with the door closed if there are credentials to open it.
fn registry(cluster: &Cluster, name: &str, port: u16, credentials: &str) -> Daemon {
    let dir = cluster.dir().join(name);
    fs::create_dir_all(&dir).expect("a directory can be made");
    let mut config = format!(
        "version: 0.1\nlog: {{level: warn}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '127.0.0.1:{port}'}}\n",
        dir.join("storage").display()
    );
    if !credentials.is_empty() {
        fs::write(dir.join("htpasswd"), HTPASSWD).expect("a file can be written");
        config += &format!("auth: {{htpasswd: {{realm: door, path: {}}}}}\n", dir.join("htpasswd").display());
    }
    let file = dir.join("config.yml");
    fs::write(&file, config).expect("a file can be written");
    let daemon = Daemon::start(&["docker-registry", "serve", &file.to_string_lossy()], &dir.join("log"));
    let ask = format!("curl -sf {credentials} http://127.0.0.1:{port}/v2/");
    until("the registry serves", || cluster.run(&ask, "", SECONDS).success);
    daemon
}

/// An image's parts as an OCI layout holds them, by digest.
struct Archive {
    manifest: String,
    blobs: Vec<String>,
}

fn unpack(cluster: &Cluster) -> Archive {
    expect(cluster, "mkdir $TMP/layout && tar -C $TMP/layout -xf $IMAGES/busybox-test1.tar");
    let layout = cluster.dir().join("layout");
    let index = json(&layout.join("index.json"));
    let manifest = digest(&index["manifests"][0]);
    let text = json(&blob(&layout, &manifest));
    let layers = text["layers"].as_array().expect("a manifest lists layers");
    let blobs = std::iter::once(&text["config"]).chain(layers).map(digest).collect();
    Archive { manifest, blobs }
}

impl Archive {
    /// As the OCI distribution specification has it: every blob in one upload of two requests, then the manifest by its tag.
    fn push(&self, cluster: &Cluster, registry: &str, credentials: &str) {
        let curl = format!("curl -sSf {credentials}");
        let repository = format!("{registry}/v2/team/busybox");
        let layout = cluster.dir().join("layout");
        for digest in &self.blobs {
            let file = blob(&layout, digest);
            expect(
                cluster,
                &format!(
                    "to=$({curl} -D - -o /dev/null -X POST {repository}/blobs/uploads/ | tr -d '\\r' | sed -n 's/^Location: //p')
                    {curl} -H 'Content-Type: application/octet-stream' -T {} \"$to&digest={digest}\"",
                    file.display()
                ),
            );
        }
        let file = blob(&layout, &self.manifest);
        let kind = "Content-Type: application/vnd.oci.image.manifest.v1+json";
        expect(cluster, &format!("{curl} -H '{kind}' -T {} {repository}/manifests/v1", file.display()));
    }
}

fn blob(layout: &Path, digest: &str) -> std::path::PathBuf {
    layout.join("blobs").join(digest.replace(':', "/"))
}

fn json(file: &Path) -> Value {
    serde_json::from_slice(&fs::read(file).expect("the layout has this file")).expect("it is JSON")
}

fn digest(descriptor: &Value) -> String {
    descriptor["digest"].as_str().expect("a descriptor has a digest").to_owned()
}
