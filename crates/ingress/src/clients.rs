//! Whom clients of an Ingress's hosts must be by their certificates (`auth-tls-*`). The handshake takes any certificate or none:
//! who shows the wrong one is told so in HTTP, as by ingress-nginx.

use std::sync::{Arc, Mutex, PoisonError};

use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use regex::Regex;
use rustls_pki_types::{CertificateDer, UnixTime};
use tokio_rustls::rustls::client::danger::HandshakeSignatureValid;
use tokio_rustls::rustls::crypto::WebPkiSupportedAlgorithms;
use tokio_rustls::rustls::crypto::{verify_tls12_signature, verify_tls13_signature};
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use tokio_rustls::rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, SignatureScheme,
};
use x509_parser::objects::{oid_registry, oid2abbrev};
use x509_parser::prelude::{FromDer, X509Certificate, X509Name};

use crate::crypto;
use crate::variables::escaped;

/// Who must show a certificate.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Asks {
    #[default]
    Always,
    /// Who shows one must show a good one.
    IfShown,
    /// The same, but it may be of an authority that nobody knows.
    AnyAuthority,
}

/// What an Ingress says about it.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Whose `ca.crt` has the authorities.
    pub secret: Option<Box<str>>,
    pub asks: Asks,
    /// Certificates that may stand between a client's and its authority's.
    pub depth: usize,
    pub error_page: Option<Box<str>>,
    pub passes_certificate: bool,
    /// What a subject must look like.
    pub subject: Option<Regex>,
    /// Something of it makes no sense.
    pub is_broken: bool,
}

impl Default for Wanted {
    fn default() -> Self {
        let (asks, depth) = (Asks::default(), 1);
        Wanted {
            secret: None,
            asks,
            depth,
            error_page: None,
            passes_certificate: false,
            subject: None,
            is_broken: false,
        }
    }
}

/// Whom clients are taken for.
#[derive(Clone, Debug)]
pub struct ClientAuth {
    pub wanted: Wanted,
    /// `None` as long as they are not known: then nobody is let in.
    pub roots: Option<Arc<RootCertStore>>,
}

/// What came of a client's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    Success,
    /// Says why.
    Failed(String),
    /// Only its authority is not known.
    Stranger(String),
}

/// What a client has shown in its handshake.
#[derive(Debug)]
pub struct Shown {
    chain: Vec<CertificateDer<'static>>,
    /// As RFC 4514 writes them.
    pub subject: String,
    pub issuer: String,
    /// What came of it, by whom it was asked of: for the requests of its connection.
    known: Mutex<Option<(Arc<RootCertStore>, usize, Outcome)>>,
}

impl Shown {
    /// `None`: it has shown none.
    pub fn of(chain: Option<&[CertificateDer<'static>]>) -> Option<Self> {
        let chain: Vec<CertificateDer<'static>> = chain?.to_vec();
        let (subject, issuer) = match X509Certificate::from_der(chain.first()?) {
            Ok((_, certificate)) => (name(certificate.subject()), name(certificate.issuer())),
            Err(_) => (String::new(), String::new()),
        };
        Some(Shown { chain, subject, issuer, known: Mutex::default() })
    }

    /// Whether it is signed below these authorities, with at most so many certificates between.
    pub fn verify(&self, roots: &Arc<RootCertStore>, depth: usize) -> Outcome {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, at, outcome)) = &*known
            && Arc::ptr_eq(of, roots)
            && *at == depth
        {
            return outcome.clone();
        }
        let outcome = self.check(roots, depth);
        *known = Some((roots.clone(), depth, outcome.clone()));
        outcome
    }

    fn check(&self, roots: &Arc<RootCertStore>, depth: usize) -> Outcome {
        let Some((own, rest)) = self.chain.split_first() else { return Outcome::Failed("no certificate".to_owned()) };
        let between = &rest[..rest.len().min(depth)];
        let verifier = match WebPkiClientVerifier::builder_with_provider(roots.clone(), crypto::provider()).build() {
            Ok(verifier) => verifier,
            Err(error) => return Outcome::Failed(error.to_string()),
        };
        match verifier.verify_client_cert(own, between, UnixTime::now()) {
            Ok(_) => Outcome::Success,
            // An authority of the same name that has not signed it is another one.
            Err(Error::InvalidCertificate(
                error @ (CertificateError::UnknownIssuer | CertificateError::BadSignature),
            )) => Outcome::Stranger(error.to_string()),
            Err(error) => Outcome::Failed(error.to_string()),
        }
    }

    /// The certificate in PEM, as a value of a query.
    pub fn pem(&self) -> String {
        let encoded = self.chain.first().map(|own| BASE64.encode(own)).unwrap_or_default();
        let mut text = "-----BEGIN CERTIFICATE-----\n".to_owned();
        for line in encoded.as_bytes().chunks(64) {
            text.extend(line.iter().copied().map(char::from));
            text.push('\n');
        }
        text.push_str("-----END CERTIFICATE-----\n");
        escaped(&text)
    }
}

/// The last part first, as RFC 4514 has it.
fn name(name: &X509Name<'_>) -> String {
    let all: Vec<_> = name.iter_rdn().collect();
    let parts = all.into_iter().rev().map(|part| {
        let pairs = part.iter().map(|pair| {
            let oid = pair.attr_type();
            let key = oid2abbrev(oid, oid_registry()).map_or_else(|_| oid.to_id_string(), str::to_owned);
            format!("{key}={}", quoted(pair.as_str().unwrap_or_default()))
        });
        pairs.collect::<Vec<_>>().join("+")
    });
    parts.collect::<Vec<_>>().join(",")
}

fn quoted(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for (at, c) in value.char_indices() {
        let is_end = at + c.len_utf8() == value.len();
        if matches!(c, ',' | '+' | '"' | '\\' | '<' | '>' | ';')
            || (at == 0 && c == '#')
            || (c == ' ' && (at == 0 || is_end))
        {
            out.push('\\');
        }
        out.push(c);
    }
    out
}

/// Asks clients for a certificate and takes any, if it is really theirs, or none.
#[derive(Debug)]
pub struct AnyCertificate(WebPkiSupportedAlgorithms);

impl AnyCertificate {
    pub fn new() -> Arc<Self> {
        Arc::new(AnyCertificate(crypto::provider().signature_verification_algorithms))
    }
}

impl ClientCertVerifier for AnyCertificate {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
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
        verify_tls12_signature(message, certificate, signature, &self.0)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, certificate, signature, &self.0)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_schemes()
    }
}
