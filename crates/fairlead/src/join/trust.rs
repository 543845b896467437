//! How a server is known to be the right one: by its authority, or by the digest of the authority's key.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use api::{ObjectExt, kinds};
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use reconcile::Api;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use serde_json::Value;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use super::{SERVER_AWAY, parse_url};
use crate::pki;

/// How the server is known to be the right one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Trust {
    /// The authority's certificate.
    Pem(String),
    /// `sha256:` and the digest of the authority's public key.
    Hash(String),
}

impl Trust {
    /// The same, known to be usable.
    pub fn checked(self) -> anyhow::Result<Trust> {
        match self {
            Trust::Pem(pem) => {
                pki::certificates(pem.as_bytes()).context("--ca-cert")?;
                Ok(Trust::Pem(pem))
            }
            Trust::Hash(hash) => {
                let digest = hash.strip_prefix("sha256:").unwrap_or_default();
                ensure!(
                    digest.len() == 64 && digest.bytes().all(|b| b.is_ascii_hexdigit()),
                    "--ca-hash must be sha256: and 64 hexadecimal digits, as the server prints it"
                );
                Ok(Trust::Hash(hash.to_ascii_lowercase()))
            }
        }
    }
}

pub fn hash_of(ca_pem: &str) -> Option<String> {
    let authority = pki::certificates(ca_pem.as_bytes()).ok()?;
    authority.first().and_then(|der| pki::public_key_hash(der))
}

/// The authority whose key has this digest: from the chain that the server shows, or, where it does not send its
/// authority along, from the ConfigMap that kubeadm publishes. Nothing but the digest is trusted.
pub async fn discover(server_url: &str, hash: &str) -> anyhow::Result<String> {
    match shown(server_url, hash).await {
        Ok(pem) => Ok(pem),
        Err(first) => match published(server_url, hash).await {
            Ok(pem) => Ok(pem),
            Err(second) => bail!(
                "the server at {server_url} is not the one of --ca-hash {hash}, or does not show its authority ({first:#}; {second:#}); give --ca-cert FILE"
            ),
        },
    }
}

async fn shown(server_url: &str, hash: &str) -> anyhow::Result<String> {
    let url = parse_url(server_url)?;
    let host = url.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']').to_string();
    let name = ServerName::try_from(host.clone()).context("the server's name")?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let pinned = Arc::new(Pinned { hash: hash.to_string(), provider: provider.clone(), found: Mutex::new(None) });
    let config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("choose TLS versions")?
        .dangerous()
        .with_custom_certificate_verifier(pinned.clone())
        .with_no_client_auth();
    let port = url.port_u16().unwrap_or(443);
    let connect = async {
        let stream = dial(&host, port).await?;
        TlsConnector::from(Arc::new(config)).connect(name, stream).await
    };
    tokio::time::timeout(SERVER_AWAY, connect).await.context("the server does not answer")??;
    let found = pinned.found.lock().unwrap_or_else(PoisonError::into_inner).take();
    let authority = found.context("the server has shown no authority")?;
    Ok(pki::to_pem("CERTIFICATE", &authority))
}

/// Connects, waiting for a server that is not up yet; whoever calls sets the limit.
async fn dial(host: &str, port: u16) -> std::io::Result<TcpStream> {
    let mut pause = Duration::from_millis(50);
    loop {
        match TcpStream::connect((host, port)).await {
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionRefused => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_secs(5));
            }
            other => return other,
        }
    }
}

async fn published(server_url: &str, hash: &str) -> anyhow::Result<String> {
    let mut config = kube::Config::new(parse_url(server_url)?);
    config.accept_invalid_certs = true;
    let client = kube::Client::try_from(config).context("prepare a client")?;
    let info = Api::new(&client, &kinds::CONFIG_MAPS).get("kube-public", "cluster-info").await?;
    let config: Value =
        serde_saphyr::from_str(info.text("/data/kubeconfig")).context("kube-public/cluster-info is not readable")?;
    let encoded = config.text("/clusters/0/cluster/certificate-authority-data");
    let pem = String::from_utf8(BASE64.decode(encoded).context("the published authority is not base64")?)
        .context("the published authority is not PEM")?;
    ensure!(hash_of(&pem).as_deref() == Some(hash), "kube-public/cluster-info names another authority");
    Ok(pem)
}

/// Finds the certificate with the right digest in a server's chain, and then checks the server against it as usual.
#[derive(Debug)]
struct Pinned {
    hash: String,
    provider: Arc<CryptoProvider>,
    found: Mutex<Option<CertificateDer<'static>>>,
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let refuse = |why: &str| rustls::Error::General(why.to_string());
        let authority = intermediates
            .iter()
            .find(|c| pki::public_key_hash(c).as_ref() == Some(&self.hash))
            .ok_or_else(|| refuse("no certificate in the server's chain has the expected public key"))?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), self.provider.clone())
            .build()
            .map_err(|e| refuse(&e.to_string()))?;
        let verified = verifier.verify_server_cert(certificate, intermediates, name, ocsp, now)?;
        *self.found.lock().unwrap_or_else(PoisonError::into_inner) = Some(authority.clone().into_owned());
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        rustls::crypto::verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::tests::Scratch;
    use crate::pki::{Pki, San};
    use crate::serve::tls_config;
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    #[test]
    fn a_server_is_known_by_its_authority_or_its_digest_and_nothing_less() {
        let hash = format!("sha256:{}", "0A".repeat(32));
        let good = Trust::Hash(hash.clone()).checked().expect("a digest");
        assert_eq!(good, Trust::Hash(hash.to_ascii_lowercase()));
        for bad in [Trust::Hash(String::new()), Trust::Hash("sha256:12".into()), Trust::Pem("x".into())] {
            assert!(bad.checked().is_err());
        }
    }

    #[tokio::test]
    async fn the_authority_is_found_by_its_digest_and_no_other_is_taken() {
        let (scratch, elsewhere) = (Scratch::new(), Scratch::new());
        let pki = Pki::open_or_create(&scratch.0).expect("an authority");
        let other = Pki::open_or_create(&elsewhere.0).expect("another");
        let certificate = pki.server_certificate(&[San::from("127.0.0.1")]).expect("a certificate");
        let tls =
            tls_config(crate::pki::Rotating::new(&certificate).expect("a certificate"), pki.ca_pem()).expect("TLS");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let url = format!("https://{}", listener.local_addr().expect("an address"));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                // A client that refuses the chain ends its handshake; the next one is served all the same.
                drop(TlsAcceptor::from(tls.clone()).accept(stream).await);
            }
        });
        let found = shown(&url, &pki.ca_hash()).await.expect("the authority");
        assert_eq!(hash_of(&found), Some(pki.ca_hash()));
        assert!(shown(&url, &other.ca_hash()).await.is_err());
    }
}
