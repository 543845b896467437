//! Whom TLS peers are taken for: endpoints by a BackendTLSPolicy, clients by what a Gateway asks of them.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use tokio_rustls::rustls::client::{ClientConfig, verify_server_cert_signed_by_trust_anchor, verify_server_name};
use tokio_rustls::rustls::crypto::CryptoProvider;
use tokio_rustls::rustls::crypto::{verify_tls12_signature, verify_tls13_signature};
use tokio_rustls::rustls::server::ParsedCertificate;
use tokio_rustls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use tokio_rustls::rustls::sign::CertifiedKey;
use tokio_rustls::rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme,
};

/// A ConfigMap with certificates of authorities, as it was last seen.
#[derive(Clone, Debug)]
pub enum CaState {
    /// Nobody has looked yet.
    Unknown,
    Missing,
    /// Says what is wrong.
    Broken(String),
    Good(Arc<RootCertStore>),
}

impl CaState {
    /// From the `data` of a ConfigMap; `None`: there is no such ConfigMap.
    pub fn of(data: Option<&HashMap<String, String>>) -> Self {
        let Some(data) = data else { return CaState::Missing };
        let Some(text) = data.get("ca.crt") else { return CaState::Broken("has no ca.crt".to_owned()) };
        CaState::read(text.as_bytes())
    }

    /// From the `data` of a Secret; `None`: there is no such Secret.
    pub fn of_secret(data: Option<&HashMap<String, String>>) -> Self {
        let Some(data) = data else { return CaState::Missing };
        let Some(text) = data.get("ca.crt") else { return CaState::Broken("has no ca.crt".to_owned()) };
        match BASE64.decode(text) {
            Ok(text) => CaState::read(&text),
            Err(_) => CaState::Broken("has a ca.crt that is not base64".to_owned()),
        }
    }

    fn read(text: &[u8]) -> Self {
        let mut roots = RootCertStore::empty();
        for certificate in CertificateDer::pem_slice_iter(text) {
            let added = certificate
                .map_err(|error| error.to_string())
                .and_then(|certificate| roots.add(certificate).map_err(|error| error.to_string()));
            if let Err(error) = added {
                return CaState::Broken(format!("has a ca.crt that cannot be read: {error}"));
            }
        }
        match roots.is_empty() {
            true => CaState::Broken("has a ca.crt without a certificate".to_owned()),
            false => CaState::Good(Arc::new(roots)),
        }
    }
}

/// A name that an endpoint's certificate may have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Name {
    Host(ServerName<'static>),
    Uri(Box<str>),
}

/// How endpoints of a Service are spoken to over TLS.
#[derive(Debug)]
pub struct BackendTls {
    /// Another one for each that was ever made: connections of one do not serve another.
    pub id: u64,
    /// What the handshake asks for (SNI).
    pub name: ServerName<'static>,
    tells_name: bool,
    verifier: Arc<EndpointVerifier>,
    provider: Arc<CryptoProvider>,
    /// By the identity that we show, 0 if we show none, and whether HTTP/2 will be spoken.
    configs: Mutex<HashMap<(u64, bool), Arc<ClientConfig>>>,
}

/// What we show to endpoints that ask who we are.
#[derive(Debug)]
pub struct Identity {
    /// Never 0.
    pub id: u64,
    pub key: Arc<CertifiedKey>,
}

/// A number that nothing else in the process has.
fn next_id() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl Identity {
    pub fn new(key: Arc<CertifiedKey>) -> Self {
        Identity { id: next_id(), key }
    }
}

impl BackendTls {
    /// Endpoints are who they are if their certificate is signed below `roots` and has one of `names`.
    pub fn new(
        roots: Arc<RootCertStore>,
        name: ServerName<'static>,
        names: Vec<Name>,
        provider: Arc<CryptoProvider>,
    ) -> Self {
        let verifier = Arc::new(EndpointVerifier { trusts: Some((roots, names)), provider: provider.clone() });
        BackendTls { id: next_id(), name, tells_name: true, verifier, provider, configs: Mutex::default() }
    }

    /// Endpoints are who they say they are. Without a name the handshake asks for none.
    pub fn unverified(name: Option<ServerName<'static>>, provider: Arc<CryptoProvider>) -> Self {
        let verifier = Arc::new(EndpointVerifier { trusts: None, provider: provider.clone() });
        let tells_name = name.is_some();
        let name = name.unwrap_or(ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into()));
        BackendTls { id: next_id(), name, tells_name, verifier, provider, configs: Mutex::default() }
    }

    /// # Errors
    /// The provider has no cipher for any version of TLS.
    pub fn config(&self, identity: Option<&Identity>, is_http2: bool) -> Result<Arc<ClientConfig>, Error> {
        let mut configs = self.configs.lock().unwrap_or_else(PoisonError::into_inner);
        let id = (identity.map_or(0, |identity| identity.id), is_http2);
        if let Some(held) = configs.get(&id) {
            return Ok(held.clone());
        }
        let builder = ClientConfig::builder_with_provider(self.provider.clone())
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(self.verifier.clone());
        let mut config = match identity {
            Some(identity) => {
                let shown = tokio_rustls::rustls::sign::SingleCertAndKey::from(identity.key.clone());
                builder.with_client_cert_resolver(Arc::new(shown))
            }
            None => builder.with_no_client_auth(),
        };
        config.enable_sni = self.tells_name;
        config.alpn_protocols = vec![if is_http2 { b"h2".to_vec() } else { b"http/1.1".to_vec() }];
        let config = Arc::new(config);
        configs.insert(id, config.clone());
        Ok(config)
    }
}

#[derive(Debug)]
struct EndpointVerifier {
    /// Authorities and names; `None`: anybody.
    trusts: Option<(Arc<RootCertStore>, Vec<Name>)>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for EndpointVerifier {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let Some((roots, names)) = &self.trusts else { return Ok(ServerCertVerified::assertion()) };
        let certificate = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&certificate, roots, intermediates, now, algorithms)?;
        let is_named = names.iter().any(|name| match name {
            Name::Host(name) => verify_server_name(&certificate, name).is_ok(),
            Name::Uri(uri) => has_uri(end_entity, uri),
        });
        match is_named {
            true => Ok(ServerCertVerified::assertion()),
            false => Err(Error::InvalidCertificate(CertificateError::NotValidForName)),
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls12_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

fn has_uri(certificate: &CertificateDer<'_>, uri: &str) -> bool {
    use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else { return false };
    let Ok(Some(names)) = certificate.subject_alternative_name() else { return false };
    names.value.general_names.iter().any(|name| matches!(name, GeneralName::URI(held) if *held == uri))
}

/// Asks clients for a certificate, and takes them with any or none: whoever is behind is told what they showed.
#[derive(Debug)]
pub struct AnyClient(pub Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for AnyClient {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.0.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}
