//! Service account tokens: JWTs signed with ES256, bound to an account and, where asked, to a pod.

use api::time;
use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use jiff::Timestamp;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey,
};
use serde_json::{Value, json};

/// Signs and checks tokens.
pub struct TokenKey {
    pair: EcdsaKeyPair,
    random: SystemRandom,
    id: String,
    pub issuer: String,
}

#[derive(Debug, thiserror::Error)]
#[error("the service account key cannot be used ({0}): remove it to have a new one made; tokens in use become invalid")]
pub struct KeyError(String);

/// What a token says.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Claims {
    pub namespace: String,
    pub account: String,
    pub account_uid: String,
    /// Name and uid of the pod the token is bound to.
    pub pod: Option<(String, String)>,
    pub node: Option<String>,
    pub audiences: Vec<String>,
}

impl TokenKey {
    /// A fresh key in PKCS#8.
    pub fn generate() -> Result<Vec<u8>, KeyError> {
        EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &SystemRandom::new())
            .map(|d| d.as_ref().to_vec())
            .map_err(|e| KeyError(e.to_string()))
    }

    pub fn from_pkcs8(pkcs8: &[u8], issuer: &str) -> Result<TokenKey, KeyError> {
        let random = SystemRandom::new();
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, pkcs8, &random)
            .map_err(|e| KeyError(e.to_string()))?;
        let digest = ring::digest::digest(&ring::digest::SHA256, pair.public_key().as_ref());
        Ok(TokenKey { pair, random, id: BASE64.encode(digest.as_ref()), issuer: issuer.into() })
    }

    /// A token for these claims, valid for `seconds`.
    pub fn sign(&self, claims: &Claims, seconds: i64, now: Timestamp) -> String {
        let mut bound = json!({
            "namespace": claims.namespace,
            "serviceaccount": {"name": claims.account, "uid": claims.account_uid},
        });
        if let Some((name, uid)) = &claims.pod {
            bound["pod"] = json!({"name": name, "uid": uid});
        }
        if let Some(node) = &claims.node {
            bound["node"] = json!({"name": node});
        }
        let header = json!({"alg": "ES256", "kid": self.id});
        let at = now.as_second();
        let payload = json!({
            "aud": claims.audiences, "exp": at + seconds, "iat": at, "nbf": at, "iss": self.issuer,
            "jti": crate::verbs::random_uid(),
            "kubernetes.io": bound,
            "sub": format!("system:serviceaccount:{}:{}", claims.namespace, claims.account),
        });
        let body = format!("{}.{}", BASE64.encode(header.to_string()), BASE64.encode(payload.to_string()));
        let signature = self.pair.sign(&self.random, body.as_bytes()).expect("an ECDSA key signs any message");
        format!("{body}.{}", BASE64.encode(signature.as_ref()))
    }

    /// The claims of a token that we signed and that has not expired.
    pub fn verify(&self, token: &str, now: Timestamp) -> Option<Claims> {
        let (body, signature) = token.rsplit_once('.')?;
        let signature = BASE64.decode(signature).ok()?;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_FIXED, self.pair.public_key().as_ref())
            .verify(body.as_bytes(), &signature)
            .ok()?;
        let payload: Value = serde_json::from_slice(&BASE64.decode(body.split_once('.')?.1).ok()?).ok()?;
        let number = |key: &str| payload.get(key).and_then(Value::as_i64);
        let at = now.as_second();
        // A minute of leeway for clocks that differ.
        if number("exp")? < at || number("nbf")? > at + 60 {
            return None;
        }
        let some = |t: String| Some(t).filter(|t| !t.is_empty());
        Some(Claims {
            namespace: bound(&payload, &["namespace"]),
            account: bound(&payload, &["serviceaccount", "name"]),
            account_uid: bound(&payload, &["serviceaccount", "uid"]),
            pod: some(bound(&payload, &["pod", "name"])).map(|n| (n, bound(&payload, &["pod", "uid"]))),
            node: some(bound(&payload, &["node", "name"])),
            audiences: payload
                .get("aud")
                .and_then(Value::as_array)
                .map(|a| a.iter().filter_map(Value::as_str).map(str::to_string).collect())
                .unwrap_or_default(),
        })
    }

    /// When a token of that age ends, as TokenRequest answers it.
    pub fn expiry(seconds: i64, now: Timestamp) -> String {
        let end = now.checked_add(jiff::SignedDuration::from_secs(seconds)).unwrap_or(now);
        time::seconds(end)
    }
}

fn bound(payload: &Value, path: &[&str]) -> String {
    let mut at = payload.get("kubernetes.io");
    for part in path {
        at = at.and_then(|v| v.get(part));
    }
    at.and_then(Value::as_str).unwrap_or("").to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_good_until_it_expires_and_only_unchanged() {
        let key = TokenKey::from_pkcs8(&TokenKey::generate().expect("a key"), "iss").expect("a key");
        let now = time::parse("2026-01-01T00:00:00Z").expect("a time");
        let claims =
            Claims { namespace: "a".into(), account: "b".into(), account_uid: "c".into(), ..Claims::default() };
        let token = key.sign(&claims, 600, now);
        assert_eq!(key.verify(&token, now), Some(claims));
        let later = now.checked_add(jiff::SignedDuration::from_secs(601)).expect("a time");
        assert_eq!(key.verify(&token, later), None);
        assert_eq!(key.verify(&token.replacen('e', "f", 1), now), None);
        assert_eq!(key.verify("x.y", now), None);
    }
}
