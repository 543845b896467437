//! Pulls images from registries (OCI distribution specification) over HTTP/1.1.
//!
//! The connection itself is made by a `Dialer` of the caller's, so that it may begin in another network namespace.

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use bytes::Bytes;
use futures::future::BoxFuture;
use http::header::{ACCEPT, AUTHORIZATION, HOST, LOCATION, USER_AGENT, WWW_AUTHENTICATE};
use http::{Request, Response, StatusCode, Uri};
use http_body_util::{BodyExt, Empty, Limited};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use sha2::{Digest, Sha256};
use tokio::net::TcpStream;

use super::config::{Descriptor, Manifest};
use super::reference::Reference;
use super::store::{ImageStore, parse_config};
use super::unpack::hex;
use super::{Context, Image, ImageError};
use crate::types::PullAuth;

/// Opens a connection to a host and port.
pub type Dialer = Arc<dyn Fn(String, u16) -> BoxFuture<'static, std::io::Result<TcpStream>> + Send + Sync>;

/// Dials from the caller's own network namespace.
pub fn tcp_dialer() -> Dialer {
    Arc::new(|host, port| Box::pin(async move { TcpStream::connect((host.as_str(), port)).await }))
}

#[derive(Clone)]
pub struct PullConfig {
    pub dialer: Dialer,
    /// `host:port` of registries spoken to without TLS, besides those on this machine.
    pub insecure_registries: Vec<String>,
    /// A file of PEM certificates; the system's bundle when `None`.
    pub certificate_authorities: Option<std::path::PathBuf>,
}

const DOCUMENTS: &str = "application/vnd.oci.image.index.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.v2+json";
const DOCUMENT_LIMIT: usize = 8 << 20;
const PATIENCE: Duration = Duration::from_secs(30);

impl ImageStore {
    /// Fetches what of an image is not here yet.
    pub async fn pull(
        &self,
        reference: &str,
        auth: Option<PullAuth>,
        config: &PullConfig,
    ) -> Result<Image, ImageError> {
        let reference = Reference::parse(reference)?;
        let mut client = Client::new(&reference, auth, config);
        let wanted = reference.digest.clone().or(reference.tag.clone()).unwrap_or_else(|| "latest".to_owned());
        let (bytes, digest) = client.manifest(&wanted).await?;
        let mut manifest = parse(&bytes)?;
        if manifest.config.is_none() {
            let chosen = manifest
                .choose()
                .ok_or_else(|| ImageError::Broken(format!("{reference} has no image for linux on this processor")))?;
            manifest = parse(&client.manifest(&chosen.digest).await?.0)?;
        }
        let descriptor = manifest
            .config
            .as_ref()
            .ok_or_else(|| ImageError::Broken(format!("{reference} has a manifest without configuration")))?;
        let document = client.document(descriptor).await?;
        let diff_ids = parse_config(&document)?.rootfs.diff_ids;
        if diff_ids.len() != manifest.layers.len() {
            return Err(ImageError::Broken(format!("{reference}: manifest and configuration disagree on layers")));
        }
        for (diff_id, layer) in diff_ids.into_iter().zip(&manifest.layers) {
            if self.has_layer(&diff_id) {
                continue;
            }
            let scratch = self.scratch_path()?;
            let fetched = client.download(layer, &scratch).await;
            let store = self.clone();
            let result = match fetched {
                Ok(()) => {
                    let path = scratch.clone();
                    tokio::task::spawn_blocking(move || {
                        let file = std::fs::File::open(&path).context(|| format!("cannot open {}", path.display()))?;
                        store.add_layer(&diff_id, file)
                    })
                    .await
                    .map_err(|e| ImageError::Broken(format!("unpacking was interrupted: {e}")))?
                }
                Err(e) => Err(e),
            };
            if scratch.exists() {
                std::fs::remove_file(&scratch).context(|| format!("cannot remove {}", scratch.display()))?;
            }
            result?;
        }
        let tags = reference.tag.as_ref().filter(|_| reference.digest.is_none()).map(|_| reference.to_string());
        self.commit(&document, tags, [format!("{}@{digest}", reference.name())])
    }
}

struct Client<'a> {
    reference: &'a Reference,
    config: &'a PullConfig,
    auth: Option<PullAuth>,
    /// The Authorization header that the registry accepted last.
    authorization: Option<String>,
    base: String,
}

impl<'a> Client<'a> {
    fn new(reference: &'a Reference, auth: Option<PullAuth>, config: &'a PullConfig) -> Client<'a> {
        let host = match reference.registry.as_str() {
            "docker.io" => "registry-1.docker.io",
            other => other,
        };
        let name = host.rsplit_once(':').map_or(host, |(name, _)| name);
        let local = matches!(name, "localhost" | "[::1]") || name.starts_with("127.");
        let scheme = if local || config.insecure_registries.iter().any(|r| r == host) { "http" } else { "https" };
        Client { reference, config, auth, authorization: None, base: format!("{scheme}://{host}/v2") }
    }

    async fn manifest(&mut self, wanted: &str) -> Result<(Bytes, String), ImageError> {
        let url = format!("{}/{}/manifests/{wanted}", self.base, self.reference.repository);
        let response = self.get(&url, DOCUMENTS).await?;
        let bytes = self.collect(response).await?;
        let digest = format!("sha256:{}", hex(&Sha256::digest(&bytes)));
        if wanted.starts_with("sha256:") && digest != wanted {
            return Err(ImageError::Broken(format!("the registry sent {digest} instead of {wanted}")));
        }
        Ok((bytes, digest))
    }

    async fn document(&mut self, descriptor: &Descriptor) -> Result<Bytes, ImageError> {
        let url = format!("{}/{}/blobs/{}", self.base, self.reference.repository, descriptor.digest);
        let response = self.get(&url, "*/*").await?;
        let bytes = self.collect(response).await?;
        let digest = format!("sha256:{}", hex(&Sha256::digest(&bytes)));
        if digest != descriptor.digest {
            return Err(ImageError::Broken(format!("the registry sent {digest} instead of {}", descriptor.digest)));
        }
        Ok(bytes)
    }

    async fn download(&mut self, layer: &Descriptor, into: &std::path::Path) -> Result<(), ImageError> {
        let url = format!("{}/{}/blobs/{}", self.base, self.reference.repository, layer.digest);
        let mut body = self.get(&url, "*/*").await?.into_body();
        let mut file = std::fs::File::create(into).context(|| format!("cannot create {}", into.display()))?;
        let mut hash = Sha256::new();
        let mut bytes = 0;
        while let Some(frame) = tokio::time::timeout(PATIENCE, body.frame()).await.map_err(|_| self.silent())? {
            let frame = frame.map_err(|e| self.unreachable(e))?;
            if let Ok(data) = frame.into_data() {
                bytes += data.len() as u64;
                if layer.size > 0 && bytes > layer.size {
                    return Err(ImageError::Broken(format!("layer {} is longer than announced", layer.digest)));
                }
                hash.update(&data);
                file.write_all(&data).context(|| format!("cannot write {}", into.display()))?;
            }
        }
        let digest = format!("sha256:{}", hex(&hash.finalize()));
        if digest != layer.digest {
            return Err(ImageError::Broken(format!("the registry sent {digest} instead of {}", layer.digest)));
        }
        Ok(())
    }

    async fn collect(&self, response: Response<Incoming>) -> Result<Bytes, ImageError> {
        let body = Limited::new(response.into_body(), DOCUMENT_LIMIT);
        let collected = tokio::time::timeout(PATIENCE, body.collect()).await.map_err(|_| self.silent())?;
        Ok(collected.map_err(|e| self.unreachable(e))?.to_bytes())
    }

    /// Follows redirects, and answers the registry's challenge once.
    async fn get(&mut self, url: &str, accept: &str) -> Result<Response<Incoming>, ImageError> {
        let mut url = url.to_owned();
        let mut challenged = false;
        for _ in 0..8 {
            // Storage behind a redirect must not learn the registry's token, and refuses it besides.
            let ours = url.starts_with(&self.base);
            let authorization = self.authorization.clone().filter(|_| ours);
            let response = self.request(&url, accept, authorization).await?;
            match response.status() {
                StatusCode::OK => return Ok(response),
                StatusCode::UNAUTHORIZED if ours && !challenged => {
                    challenged = true;
                    let challenge = header(&response, WWW_AUTHENTICATE);
                    self.authorization = Some(self.answer(&challenge).await?);
                }
                status if status.is_redirection() => url = header(&response, LOCATION),
                StatusCode::NOT_FOUND => return Err(ImageError::NotFound(self.reference.to_string())),
                status => {
                    let body = self.collect(response).await.unwrap_or_default();
                    let message = String::from_utf8_lossy(&body).chars().take(300).collect();
                    return Err(ImageError::Registry {
                        reference: self.reference.to_string(),
                        status: status.as_u16(),
                        message,
                    });
                }
            }
        }
        Err(ImageError::Broken(format!("{}: the registry redirects in circles", self.reference)))
    }

    async fn answer(&self, challenge: &str) -> Result<String, ImageError> {
        let basic = self.auth.as_ref().map(|auth| {
            let pair = format!("{}:{}", auth.username, auth.password);
            format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
        });
        let refused = |message: &str| ImageError::Registry {
            reference: self.reference.to_string(),
            status: 401,
            message: message.to_owned(),
        };
        let Some(parameters) = challenge.strip_prefix("Bearer ") else {
            return basic.ok_or_else(|| refused("it wants credentials: add an imagePullSecret"));
        };
        let parameters = parse_challenge(parameters);
        let realm = parameters.get("realm").ok_or_else(|| refused("a challenge without realm"))?;
        let mut url = format!("{realm}{}", if realm.contains('?') { '&' } else { '?' });
        if let Some(service) = parameters.get("service") {
            url.push_str(&format!("service={service}&"));
        }
        let scope = format!("repository:{}:pull", self.reference.repository);
        url.push_str(&format!("scope={}", parameters.get("scope").unwrap_or(&scope).replace(' ', "%20")));
        let response = self.request(&url, "application/json", basic).await?;
        let status = response.status();
        let body = self.collect(response).await?;
        if status != StatusCode::OK {
            return Err(refused("the token service refuses: check the image's name and the imagePullSecret"));
        }
        #[derive(serde::Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let token: Token = serde_json::from_slice(&body).map_err(|_| refused("an unreadable token"))?;
        let token = token.token.or(token.access_token).ok_or_else(|| refused("no token in the answer"))?;
        Ok(format!("Bearer {token}"))
    }

    async fn request(
        &self,
        url: &str,
        accept: &str,
        authorization: Option<String>,
    ) -> Result<Response<Incoming>, ImageError> {
        let uri: Uri = url.parse().map_err(|e| ImageError::Broken(format!("{url:?} is no address: {e}")))?;
        let host = uri.host().unwrap_or_default().to_owned();
        let tls = uri.scheme_str() == Some("https");
        let port = uri.port_u16().unwrap_or(if tls { 443 } else { 80 });
        let attempt = async {
            let stream = (self.config.dialer)(host.clone(), port).await.map_err(|e| self.unreachable(e))?;
            let mut builder = Request::get(uri.path_and_query().map_or("/", |p| p.as_str()))
                .header(HOST, uri.authority().map_or(host.as_str(), |a| a.as_str()))
                .header(USER_AGENT, concat!("fairlead/", env!("CARGO_PKG_VERSION")))
                .header(ACCEPT, accept);
            if let Some(authorization) = authorization {
                builder = builder.header(AUTHORIZATION, authorization);
            }
            let request = builder.body(Empty::<Bytes>::new()).map_err(|e| self.unreachable(e))?;
            if tls {
                let connector = self.connector()?;
                let name = ServerName::try_from(host.clone()).map_err(|e| self.unreachable(e))?;
                let stream = connector.connect(name, stream).await.map_err(|e| self.unreachable(e))?;
                send(TokioIo::new(stream), request).await.map_err(|e| self.unreachable(e))
            } else {
                send(TokioIo::new(stream), request).await.map_err(|e| self.unreachable(e))
            }
        };
        tokio::time::timeout(PATIENCE, attempt).await.map_err(|_| self.silent())?
    }

    fn connector(&self) -> Result<tokio_rustls::TlsConnector, ImageError> {
        let default = std::path::Path::new("/etc/ssl/certs/ca-certificates.crt");
        let path = self.config.certificate_authorities.as_deref().unwrap_or(default);
        let mut roots = rustls::RootCertStore::empty();
        let certificates = CertificateDer::pem_file_iter(path).map_err(|e| {
            ImageError::Broken(format!("cannot read {} ({e}): install ca-certificates", path.display()))
        })?;
        // A bundle may hold certificates of kinds we do not know; those cannot vouch for anybody.
        roots.add_parsable_certificates(certificates.flatten());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| self.unreachable(e))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        Ok(tokio_rustls::TlsConnector::from(Arc::new(config)))
    }

    fn unreachable(&self, cause: impl std::fmt::Display) -> ImageError {
        ImageError::Unreachable { registry: self.reference.registry.clone(), message: cause.to_string() }
    }

    fn silent(&self) -> ImageError {
        self.unreachable(format!("no answer within {} s", PATIENCE.as_secs()))
    }
}

async fn send<S>(stream: S, request: Request<Empty<Bytes>>) -> Result<Response<Incoming>, hyper::Error>
where
    S: hyper::rt::Read + hyper::rt::Write + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(stream).await?;
    // Ends with the body; an error of the connection shows up in the body as well.
    tokio::spawn(connection);
    sender.send_request(request).await
}

fn header(response: &Response<Incoming>, name: http::HeaderName) -> String {
    response.headers().get(name).and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned()
}

/// `realm="https://…",service="…",scope="…"`
fn parse_challenge(text: &str) -> BTreeMap<String, String> {
    let mut found = BTreeMap::new();
    let mut rest = text.trim();
    while let Some((key, after)) = rest.split_once('=') {
        let after = after.trim_start();
        let (value, next) = match after.strip_prefix('"') {
            Some(quoted) => quoted.split_once('"').unwrap_or((quoted, "")),
            None => after.split_once(',').unwrap_or((after, "")),
        };
        found.insert(key.trim().to_owned(), value.to_owned());
        rest = next.trim_start_matches([',', ' ']);
    }
    found
}

fn parse(bytes: &[u8]) -> Result<Manifest, ImageError> {
    serde_json::from_slice(bytes).map_err(|e| ImageError::Broken(format!("the registry's manifest is unreadable: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_challenge_may_hold_commas_in_quotes() {
        let found = parse_challenge("realm=\"https://a/t\",service=\"r\",scope=\"repository:a/b:pull,push\"");
        assert_eq!(found["realm"], "https://a/t");
        assert_eq!(found["scope"], "repository:a/b:pull,push");
    }
}
