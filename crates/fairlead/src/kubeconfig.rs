//! The file that tells kubectl where a cluster is and who asks: everything inline, readable by its owner only.

use std::path::Path;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use crate::pki;

/// Who the file's reader will be.
#[derive(Debug, Clone, Copy)]
pub enum Credentials<'a> {
    Certificate { chain_pem: &'a str, key_pem: &'a str },
    Token(&'a str),
}

impl Credentials<'_> {
    fn user(self) -> Value {
        match self {
            Credentials::Certificate { chain_pem, key_pem } => json!({
                "client-certificate-data": BASE64.encode(chain_pem),
                "client-key-data": BASE64.encode(key_pem),
            }),
            Credentials::Token(token) => json!({"token": token}),
        }
    }
}

/// A kubeconfig with one context, named like its cluster. The text is JSON, which is YAML too.
pub fn render(cluster: &str, server_url: &str, ca_pem: &str, user: &str, credentials: Credentials<'_>) -> String {
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": cluster,
        "clusters": [{
            "name": cluster,
            "cluster": {"server": server_url, "certificate-authority-data": BASE64.encode(ca_pem)},
        }],
        "users": [{"name": user, "user": credentials.user()}],
        "contexts": [{"name": cluster, "context": {"cluster": cluster, "user": user}}],
        "preferences": {},
    });
    let mut text = serde_json::to_string_pretty(&config).expect("a JSON value is written to memory");
    text.push('\n');
    text
}

/// Writes it to `path`, 0600. The same contents are not written again, so that who watches the file sees changes only.
pub fn write(
    path: &Path,
    cluster: &str,
    server_url: &str,
    ca_pem: &str,
    user: &str,
    credentials: Credentials<'_>,
) -> anyhow::Result<()> {
    let text = render(cluster, server_url, ca_pem, user, credentials);
    if pki::read(path)?.as_deref() == Some(&text) {
        return Ok(());
    }
    pki::write_private(path, text.as_bytes())
}

/// Whether the file at `path` is for this cluster, with a client certificate that its authority signed and that is fresh:
/// then its key need not be made again, and copies of the file stay good.
pub fn is_current(path: &Path, server_url: &str, ca_pem: &str, now: std::time::SystemTime) -> bool {
    let Ok(Some(text)) = pki::read(path) else { return false };
    let Ok(config) = serde_json::from_str::<Value>(&text) else { return false };
    let decoded = |pointer: &str| {
        let encoded = config.pointer(pointer).and_then(Value::as_str)?;
        BASE64.decode(encoded).ok()
    };
    let server = config.pointer("/clusters/0/cluster/server").and_then(Value::as_str);
    let (Some(ca), Some(chain), Some(key)) = (
        decoded("/clusters/0/cluster/certificate-authority-data"),
        decoded("/users/0/user/client-certificate-data"),
        decoded("/users/0/user/client-key-data"),
    ) else {
        return false;
    };
    let Ok(pair) = pki::CertifiedKey::from_pem(&chain, &key) else { return false };
    server == Some(server_url) && ca == ca_pem.as_bytes() && pair.is_fresh(now) && pair.is_signed_by(ca_pem)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::tests::Scratch;
    use crate::pki::{LEAF_LIFE, Pki};
    use std::os::unix::fs::PermissionsExt;
    use std::time::SystemTime;

    #[test]
    fn a_client_library_reads_what_is_written() {
        let scratch = Scratch::new();
        let pki = Pki::open_or_create(&scratch.0).expect("an authority");
        let (chain, key) = pki.client_certificate("admin", &["system:masters"], LEAF_LIFE).expect("a certificate");
        let path = scratch.0.join("kubeconfig");
        let url = "https://127.0.0.1:6443";
        let who = Credentials::Certificate { chain_pem: &chain, key_pem: &key };
        write(&path, "lab", url, pki.ca_pem(), "admin", who).expect("written");
        let read = kube::config::Kubeconfig::read_from(&path).expect("readable");
        assert_eq!(read.current_context.as_deref(), Some("lab"));
        assert_eq!(std::fs::metadata(&path).expect("the file").permissions().mode() & 0o777, 0o600);
        assert!(is_current(&path, url, pki.ca_pem(), SystemTime::now()));
        assert!(!is_current(&path, "https://127.0.0.1:6444", pki.ca_pem(), SystemTime::now()));
        assert!(!is_current(&path, url, pki.ca_pem(), SystemTime::now() + LEAF_LIFE));
    }
}
