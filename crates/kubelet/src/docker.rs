//! Credentials for registries, as `kubectl create secret docker-registry` writes them.

use std::collections::BTreeMap;

use base64::Engine;
use runtime::PullAuth;
use serde::Deserialize;

#[derive(Deserialize)]
struct Config {
    #[serde(default)]
    auths: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    #[serde(default)]
    username: String,
    #[serde(default)]
    password: String,
    #[serde(default)]
    auth: String,
}

/// The entry of a `.dockerconfigjson` for one registry.
pub fn find(document: &[u8], registry: &str) -> Option<PullAuth> {
    let config: Config = serde_json::from_slice(document).ok()?;
    let matches = |key: &str| {
        let host = key.trim_start_matches("https://").trim_start_matches("http://").split('/').next().unwrap_or(key);
        host == registry || registry == "docker.io" && host.ends_with("docker.io")
    };
    let entry = config.auths.iter().find(|(key, _)| matches(key))?.1;
    if !entry.username.is_empty() {
        return Some(PullAuth { username: entry.username.clone(), password: entry.password.clone() });
    }
    let decoded = base64::engine::general_purpose::STANDARD.decode(&entry.auth).ok()?;
    let text = String::from_utf8(decoded).ok()?;
    let (username, password) = text.split_once(':')?;
    Some(PullAuth { username: username.to_owned(), password: password.to_owned() })
}
