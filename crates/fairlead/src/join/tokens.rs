//! Short tokens for the components that run beside the kubelet.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::Context;
use api::{ObjectExt, kinds};
use http::header::AUTHORIZATION;
use http::{HeaderValue, StatusCode};
use kube::client::Body;
use reconcile::Api;
use serde_json::{Value, json};
use tracing::warn;

use super::{NodeIdentity, connect_with};

/// The life of the tokens, in seconds.
const TOKEN_LIFE: u64 = 3600;

/// A client for one of the components that run beside the kubelet: with short tokens of `kube-system/ACCOUNT`, which
/// `node`, a client with the node's identity, may ask for.
pub async fn component_client(
    node: &kube::Client,
    server_url: &str,
    identity: &NodeIdentity,
    account: &str,
) -> anyhow::Result<kube::Client> {
    // No credentials of its own: who the caller is stands in the header alone.
    let plain = connect_with(server_url, &identity.ca_pem, &json!({}))?;
    let tokens = Arc::new(AccountTokens {
        accounts: Api::new(node, &kinds::SERVICE_ACCOUNTS),
        account: account.to_string(),
        held: tokio::sync::Mutex::new(None),
    });
    tokens.header().await?;
    let service = tower::service_fn(move |mut request: http::Request<Body>| {
        let (plain, tokens) = (plain.clone(), tokens.clone());
        async move {
            let header = tokens.header().await?;
            request.headers_mut().insert(AUTHORIZATION, header.clone());
            let response = plain.send(request).await?;
            if response.status() == StatusCode::UNAUTHORIZED {
                tokens.forget(&header).await;
            }
            Ok::<_, tower::BoxError>(response)
        }
    });
    Ok(kube::Client::new(service, "default"))
}

/// Tokens of one service account, asked for by the node.
struct AccountTokens {
    accounts: Api,
    account: String,
    held: tokio::sync::Mutex<Option<HeldToken>>,
}

struct HeldToken {
    header: HeaderValue,
    renew_at: SystemTime,
    until: SystemTime,
}

impl AccountTokens {
    /// The token to use now. One that grows old is replaced; while that fails, it is used to its end.
    async fn header(&self) -> anyhow::Result<HeaderValue> {
        let mut held = self.held.lock().await;
        let now = SystemTime::now();
        if let Some(good) = held.as_ref().filter(|h| now < h.renew_at) {
            return Ok(good.header.clone());
        }
        match self.ask(now).await {
            Ok(new) => Ok(held.insert(new).header.clone()),
            Err(error) => match held.as_mut().filter(|h| now < h.until) {
                Some(old) => {
                    warn!(account = self.account, error = format!("{error:#}"), "no new token yet");
                    old.renew_at = now + Duration::from_secs(10);
                    Ok(old.header.clone())
                }
                None => Err(error),
            },
        }
    }

    async fn ask(&self, now: SystemTime) -> anyhow::Result<HeldToken> {
        let request = json!({
            "apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": TOKEN_LIFE},
        });
        let answer = self
            .accounts
            .post("kube-system", &self.account, "token", &request)
            .await
            .with_context(|| format!("get a token of kube-system/{}", self.account))?;
        let mut header = HeaderValue::from_str(&format!("Bearer {}", answer.text("/status/token")))
            .context("the server's token cannot stand in a header")?;
        header.set_sensitive(true);
        // By our own clock: the server's may differ.
        let life = answer.pointer("/spec/expirationSeconds").and_then(Value::as_u64).unwrap_or(TOKEN_LIFE);
        let life = Duration::from_secs(life);
        Ok(HeldToken { header, renew_at: now + life * 4 / 5, until: now + life })
    }

    /// Drops a token that the server does not take any more, unless a newer one is in its place.
    async fn forget(&self, header: &HeaderValue) {
        let mut held = self.held.lock().await;
        if held.as_ref().is_some_and(|h| h.header == *header) {
            *held = None;
        }
    }
}
