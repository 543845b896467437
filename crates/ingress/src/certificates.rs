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

/// The key of a Secret that holds an OCSP response in DER.
const STAPLE: &str = "tls.ocsp-staple";

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
    let mut pair = CertifiedKey::new(chain, key);
    // What the authority says of the certificate, to be shown with it (RFC 6066 8). Who brings it renews it.
    pair.ocsp = data.contains_key(STAPLE).then(|| field(STAPLE)).transpose()?.filter(|staple| !staple.is_empty());
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use rustls_pki_types::{ServerName, UnixTime};
    use tokio_rustls::rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
    use tokio_rustls::rustls::{
        ClientConfig, ClientConnection, DigitallySignedStruct, Error, ServerConnection, SignatureScheme,
    };

    use super::*;
    use crate::crypto;

    /// A client that believes everything, and remembers what was stapled.
    #[derive(Debug, Default)]
    struct Credulous(Mutex<Vec<u8>>);

    impl ServerCertVerifier for Credulous {
        fn verify_server_cert(
            &self,
            _: &CertificateDer<'_>,
            _: &[CertificateDer<'_>],
            _: &ServerName<'_>,
            staple: &[u8],
            _: UnixTime,
        ) -> Result<ServerCertVerified, Error> {
            *self.0.lock().expect("unpoisoned") = staple.to_vec();
            Ok(ServerCertVerified::assertion())
        }

        fn verify_tls12_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn verify_tls13_signature(
            &self,
            _: &[u8],
            _: &CertificateDer<'_>,
            _: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            Ok(HandshakeSignatureValid::assertion())
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            crypto::provider().signature_verification_algorithms.supported_schemes()
        }
    }

    fn secret(staple: Option<&str>) -> HashMap<String, String> {
        let key = rcgen::KeyPair::generate().expect("a key");
        let params = rcgen::CertificateParams::new(vec!["a.example".to_owned()]).expect("a name");
        let certificate = params.self_signed(&key).expect("signed");
        let mut data = HashMap::from([
            ("tls.crt".to_owned(), BASE64.encode(certificate.pem())),
            ("tls.key".to_owned(), BASE64.encode(key.serialize_pem())),
        ]);
        data.extend(staple.map(|text| (STAPLE.to_owned(), text.to_owned())));
        data
    }

    /// What a client sees stapled to the certificate of this Secret.
    fn stapled(data: &HashMap<String, String>) -> Vec<u8> {
        let certificates = Certificates::new(read_tls(data).expect("a certificate"));
        let resolver = Arc::new(Resolver(Arc::new(Swap::new(certificates))));
        let server = crate::tls::server(resolver, None, &[]).expect("a configuration");
        let client = Arc::new(Credulous::default());
        let config = ClientConfig::builder_with_provider(crypto::provider())
            .with_safe_default_protocol_versions()
            .expect("versions")
            .dangerous()
            .with_custom_certificate_verifier(client.clone())
            .with_no_client_auth();
        let name = ServerName::try_from("a.example").expect("a name");
        let mut here = ClientConnection::new(Arc::new(config), name).expect("a client");
        let mut there = ServerConnection::new(server).expect("a server");
        // A full handshake is two flights of each.
        for _ in 0..4 {
            let mut flight = Vec::new();
            while here.wants_write() {
                here.write_tls(&mut flight).expect("memory");
            }
            there.read_tls(&mut &flight[..]).expect("memory");
            there.process_new_packets().expect("understood");
            let mut flight = Vec::new();
            while there.wants_write() {
                there.write_tls(&mut flight).expect("memory");
            }
            here.read_tls(&mut &flight[..]).expect("memory");
            here.process_new_packets().expect("understood");
        }
        assert!(!here.is_handshaking() && !there.is_handshaking());
        client.0.lock().expect("unpoisoned").clone()
    }

    #[test]
    fn what_the_authority_says_is_shown_with_the_certificate() {
        assert_eq!(stapled(&secret(Some(&BASE64.encode("an answer in DER")))), b"an answer in DER");
        assert!(stapled(&secret(None)).is_empty() && stapled(&secret(Some(""))).is_empty());
        let problem = read_tls(&secret(Some("???"))).expect_err("no base64");
        assert_eq!(problem, "has a tls.ocsp-staple that is not base64");
    }
}
