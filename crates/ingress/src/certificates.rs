//! Which certificate a client is shown: by the name it asks for (SNI), from Secrets, or one of our own making.

use std::collections::HashMap;
use std::sync::Arc;

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::rustls::server::{ClientHello, ResolvesServerCert};
use tokio_rustls::rustls::sign::CertifiedKey;

use crate::crypto::signing_key;
use crate::error::IngressError;
use crate::host::HostPattern;
use crate::swap::Swap;

/// Certificates by host.
#[derive(Clone, Debug)]
pub struct Certificates {
    exact: HashMap<Arc<str>, Arc<CertifiedKey>>,
    one_label: HashMap<Arc<str>, Arc<CertifiedKey>>,
    fallback: Arc<CertifiedKey>,
}

impl Certificates {
    pub fn new(fallback: Arc<CertifiedKey>) -> Self {
        Certificates { exact: HashMap::new(), one_label: HashMap::new(), fallback }
    }

    /// Says whether nobody had a certificate for this host yet; the first stays.
    pub fn insert(&mut self, host: &HostPattern, certificate: &Arc<CertifiedKey>) -> bool {
        let (map, name) = match host {
            HostPattern::Exact(name) => (&mut self.exact, name),
            HostPattern::OneLabel(name) | HostPattern::Suffix(name) => (&mut self.one_label, name),
            HostPattern::Any => {
                self.fallback = certificate.clone();
                return true;
            }
        };
        let is_new = !map.contains_key(name);
        if is_new {
            map.insert(name.clone(), certificate.clone());
        }
        is_new
    }

    /// A name that nobody has a certificate for gets the fallback: the handshake succeeds, and the client decides.
    pub fn find(&self, name: &str) -> &Arc<CertifiedKey> {
        let wildcard = || name.split_once('.').and_then(|(_, rest)| self.one_label.get(rest));
        self.exact.get(name).or_else(wildcard).unwrap_or(&self.fallback)
    }
}

/// Answers a handshake with the certificates as they are at that moment.
#[derive(Debug)]
pub struct Resolver(pub Arc<Swap<Certificates>>);

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let certificates = self.0.load();
        let name = hello.server_name().unwrap_or_default();
        if name.bytes().any(|byte| byte.is_ascii_uppercase()) {
            return Some(certificates.find(&name.to_ascii_lowercase()).clone());
        }
        Some(certificates.find(name).clone())
    }
}

/// Reads a certificate and its key as a Secret of type kubernetes.io/tls has them.
///
/// # Errors
/// Says which key of the Secret is missing or wrong.
pub fn read_tls(data: &HashMap<String, String>) -> Result<Arc<CertifiedKey>, String> {
    let field = |key: &str| -> Result<Vec<u8>, String> {
        let text = data.get(key).ok_or_else(|| format!("has no {key}"))?;
        BASE64.decode(text).map_err(|_| format!("has a {key} that is not base64"))
    };
    let (chain, key) = (field("tls.crt")?, field("tls.key")?);
    let chain = CertificateDer::pem_slice_iter(&chain)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| format!("has a tls.crt that is no PEM: {error}"))?;
    if chain.is_empty() {
        return Err("has a tls.crt without a certificate".to_owned());
    }
    let key = PrivateKeyDer::from_pem_slice(&key).map_err(|error| format!("has a tls.key that is no key: {error}"))?;
    let key = signing_key(key).map_err(|error| format!("has a tls.key of an unknown kind: {error}"))?;
    let pair = CertifiedKey::new(chain, key);
    pair.keys_match().map_err(|error| format!("has a tls.key that does not belong to its tls.crt: {error}"))?;
    Ok(Arc::new(pair))
}

/// Made anew at each start: whoever sees it sees that nothing was set up for the name.
///
/// # Errors
/// No random numbers.
pub fn fallback() -> Result<Arc<CertifiedKey>, IngressError> {
    let wrong = |error: rcgen::Error| IngressError::Fallback(error.to_string());
    let key = rcgen::KeyPair::generate().map_err(wrong)?;
    let mut params = rcgen::CertificateParams::new(vec!["ingress.local".to_owned()]).map_err(wrong)?;
    params.distinguished_name.push(rcgen::DnType::CommonName, "Fairlead Ingress fallback certificate");
    let certificate = params.self_signed(&key).map_err(wrong)?;
    let key = PrivateKeyDer::try_from(key.serialize_der()).map_err(|error| IngressError::Fallback(error.to_owned()))?;
    let key = signing_key(key).map_err(|error| IngressError::Fallback(error.to_string()))?;
    Ok(Arc::new(CertifiedKey::new(vec![certificate.der().clone()], key)))
}
