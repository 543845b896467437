//! From certificates and tokens to an identity.

use super::token::TokenKey;
use super::{AUTHENTICATED, Identity};
use crate::registry::Registry;
use api::{ObjectExt, Status, kinds, time};
use base64::Engine;
use http::HeaderMap;
use serde_json::Value;
use x509_parser::prelude::{FromDer, X509Certificate};

/// The client certificate that TLS has verified, DER; an extension of the request.
#[derive(Debug, Clone)]
pub struct PeerCertificate(pub Vec<u8>);

/// The client has shown a certificate that the cluster's authority did not sign; an extension of the request.
#[derive(Debug, Clone, Copy)]
pub struct ForeignCertificate;

/// The identity of a request.
///
/// # Errors
/// 401 for a bearer token that is not good. No credentials at all make an anonymous caller.
pub fn authenticate(
    registry: &Registry,
    key: &TokenKey,
    headers: &HeaderMap,
    certificate: Option<&PeerCertificate>,
) -> Result<Identity, Status> {
    if let Some(identity) = certificate.and_then(|c| from_certificate(&c.0)) {
        return Ok(identity);
    }
    let header = headers.get("authorization").and_then(|v| v.to_str().ok()).unwrap_or("");
    let Some(token) = header.strip_prefix("Bearer ").map(str::trim).filter(|t| !t.is_empty()) else {
        return Ok(Identity::anonymous());
    };
    from_token(registry, key, token, &[&key.issuer]).map(|(who, _)| who).ok_or_else(Status::unauthorized)
}

/// Common name is the user, organizations are the groups.
pub fn from_certificate(der: &[u8]) -> Option<Identity> {
    let (_, certificate) = X509Certificate::from_der(der).ok()?;
    let subject = certificate.subject();
    let user = subject.iter_common_name().next()?.as_str().ok()?.to_string();
    let mut groups: Vec<String> =
        subject.iter_organization().filter_map(|o| o.as_str().ok()).map(str::to_string).collect();
    groups.push(AUTHENTICATED.into());
    Some(Identity { user, groups, ..Identity::default() })
}

/// The identity of a service account token or a bootstrap token, and for which of `audiences` it is good: at least one.
pub fn from_token(
    registry: &Registry,
    key: &TokenKey,
    token: &str,
    audiences: &[&str],
) -> Option<(Identity, Vec<String>)> {
    let now = registry.now();
    if let Some(claims) = key.verify(token, now) {
        let good_for: Vec<String> = claims.audiences.into_iter().filter(|a| audiences.contains(&a.as_str())).collect();
        if good_for.is_empty() {
            return None;
        }
        let account = registry.read(&kinds::SERVICE_ACCOUNTS, &claims.namespace, &claims.account)?.parse();
        if account.uid() != claims.account_uid {
            return None;
        }
        let mut identity = Identity::service_account(&claims.namespace, &claims.account);
        identity.uid = claims.account_uid;
        if let Some((name, uid)) = claims.pod {
            // A token outlives its pod by no second.
            let pod = registry.read(&kinds::PODS, &claims.namespace, &name)?.parse();
            if pod.uid() != uid {
                return None;
            }
            identity.extra.push(("authentication.kubernetes.io/pod-name".into(), name));
            identity.extra.push(("authentication.kubernetes.io/pod-uid".into(), uid));
        }
        if let Some(node) = claims.node {
            identity.extra.push(("authentication.kubernetes.io/node-name".into(), node));
        }
        return Some((identity, good_for));
    }
    // Such a token says nothing of audiences: it is for this server.
    let identity = bootstrap(registry, token, now).filter(|_| audiences.contains(&key.issuer.as_str()))?;
    Some((identity, vec![key.issuer.clone()]))
}

/// `abcdef.0123456789abcdef`, kept in the Secret `kube-system/bootstrap-token-abcdef`.
fn bootstrap(registry: &Registry, token: &str, now: jiff::Timestamp) -> Option<Identity> {
    let (id, secret) = token.split_once('.')?;
    if id.len() != 6 || secret.len() != 16 {
        return None;
    }
    let stored = registry.read(&kinds::SECRETS, "kube-system", &format!("bootstrap-token-{id}"))?.parse();
    let field = |key: &str| {
        let encoded = stored.get("data")?.get(key).and_then(Value::as_str)?;
        String::from_utf8(base64::engine::general_purpose::STANDARD.decode(encoded).ok()?).ok()
    };
    // Compared as digests, so that the time taken tells nothing of the secret.
    let digest = |bytes: &[u8]| ring::digest::digest(&ring::digest::SHA256, bytes).as_ref().to_vec();
    let good = digest(field("token-secret")?.as_bytes()) == digest(secret.as_bytes());
    let live = field("expiration").is_none_or(|t| time::parse(&t).is_some_and(|t| t > now));
    let usable = stored.text("/type") == "bootstrap.kubernetes.io/token"
        && field("usage-bootstrap-authentication").as_deref() == Some("true");
    (good && live && usable).then(|| Identity::user(&format!("system:bootstrap:{id}"), &["system:bootstrappers"]))
}
