//! The file that tells kubectl where a cluster is and who asks: everything inline, readable by its owner only.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::pki;

/// Who the file's reader will be.
#[derive(Clone)]
pub enum Credentials {
    Certificate { cert_pem: String, key_pem: String },
    Token(String),
}

impl Credentials {
    /// The `user` of a kubeconfig, which is also what a client library takes for its own.
    pub fn user(&self) -> Value {
        match self {
            Credentials::Certificate { cert_pem, key_pem } => json!({
                "client-certificate-data": BASE64.encode(cert_pem),
                "client-key-data": BASE64.encode(key_pem),
            }),
            Credentials::Token(token) => json!({"token": token}),
        }
    }
}

const CLUSTER: &str = "fairlead";
const USER: &str = "fairlead-user";

/// A kubeconfig with one context. The text is JSON, which is YAML too.
fn render(server_url: &str, ca_pem: &str, credentials: &Credentials) -> String {
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": CLUSTER,
        "clusters": [{
            "name": CLUSTER,
            "cluster": {"server": server_url, "certificate-authority-data": BASE64.encode(ca_pem)},
        }],
        "users": [{"name": USER, "user": credentials.user()}],
        "contexts": [{"name": CLUSTER, "context": {"cluster": CLUSTER, "user": USER}}],
        "preferences": {},
    });
    let mut text = serde_json::to_string_pretty(&config).expect("a JSON value is written to memory");
    text.push('\n');
    text
}

/// Writes it to `path`, 0600, whole or not at all.
pub fn write(path: &Path, server_url: &str, ca_pem: &str, credentials: &Credentials) -> anyhow::Result<()> {
    pki::write_private(path, render(server_url, ca_pem, credentials).as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::tests::Scratch;
    use crate::pki::{LEAF_LIFE, Pki};
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_client_library_reads_what_is_written() {
        let scratch = Scratch::new();
        let pki = Pki::open_or_create(&scratch.0).expect("an authority");
        let (cert_pem, key_pem) =
            pki.client_certificate("admin", &["system:masters"], LEAF_LIFE).expect("a certificate");
        let path = scratch.0.join("kubeconfig");
        let who = Credentials::Certificate { cert_pem, key_pem };
        write(&path, "https://127.0.0.1:6443", pki.ca_pem(), &who).expect("written");
        let read = kube::config::Kubeconfig::read_from(&path).expect("readable");
        assert_eq!(read.current_context.as_deref(), Some("fairlead"));
        assert_eq!(std::fs::metadata(&path).expect("the file").permissions().mode() & 0o777, 0o600);
    }
}
