//! What TLS handshakes are computed with: the same algorithms for all, by the code that is fastest on this processor.

use std::sync::{Arc, LazyLock};

use rustls_graviola::kx::{P256, P384, X25519};
use rustls_pki_types::PrivateKeyDer;
use tokio_rustls::rustls::crypto::{CryptoProvider, ring};
use tokio_rustls::rustls::sign::SigningKey;
use tokio_rustls::rustls::{CipherSuite, Error, SupportedCipherSuite};

/// Key exchange and signatures by graviola where the processor can (adx and avx2, or Arm's cryptography extensions), all else
/// by ring. The suites are in our order: AES-128 with SHA-256 costs a handshake a sixth less than AES-256 with SHA-384, for
/// which processors have no instructions, and no less is out of anybody's reach.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        let mut provider = ring::default_provider();
        // Stable: TLS 1.3 stays before TLS 1.2.
        provider.cipher_suites.sort_by_key(|suite| (suite.tls13().is_none(), !is_short(suite)));
        if is_fast() {
            provider.kx_groups = vec![&X25519, &P256, &P384];
        }
        Arc::new(provider)
    });
    PROVIDER.clone()
}

/// A private key to sign handshakes with.
///
/// # Errors
/// No key, or one of a kind that TLS does not use.
pub fn signing_key(key: PrivateKeyDer<'static>) -> Result<Arc<dyn SigningKey>, Error> {
    if is_fast()
        && let Ok(key) = rustls_graviola::default_provider().key_provider.load_private_key(key.clone_key())
    {
        return Ok(key);
    }
    ring::sign::any_supported_type(&key)
}

fn is_fast() -> bool {
    graviola::util::is_cpu_supported()
}

fn is_short(suite: &SupportedCipherSuite) -> bool {
    matches!(
        suite.suite(),
        CipherSuite::TLS13_AES_128_GCM_SHA256
            | CipherSuite::TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256
            | CipherSuite::TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256
    )
}
