//! TLS as the proxy speaks it.

use std::sync::Arc;

use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::server::danger::ClientCertVerifier;
use tokio_rustls::rustls::server::{ResolvesServerCert, ServerConfig};

use crate::crypto;
use crate::error::IngressError;

/// TLS 1.2 and 1.3, with tickets so that a client that comes again need not shake hands in full, on whichever worker.
///
/// # Errors
/// No random numbers, or no cipher.
pub fn server(
    certificates: Arc<dyn ResolvesServerCert>,
    clients: Option<Arc<dyn ClientCertVerifier>>,
    protocols: &[&[u8]],
) -> Result<Arc<ServerConfig>, IngressError> {
    let wrong = |error: tokio_rustls::rustls::Error| IngressError::Tls(error.to_string());
    let builder =
        ServerConfig::builder_with_provider(crypto::provider()).with_safe_default_protocol_versions().map_err(wrong)?;
    let builder = match clients {
        Some(clients) => builder.with_client_cert_verifier(clients),
        None => builder.with_no_client_auth(),
    };
    let mut config = builder.with_cert_resolver(certificates);
    config.alpn_protocols = protocols.iter().map(|name| name.to_vec()).collect();
    config.ignore_client_order = true;
    // One is what a client needs that comes again; each costs two draws of random numbers and an encryption.
    config.send_tls13_tickets = 1;
    config.ticketer = ring::Ticketer::new().map_err(wrong)?;
    Ok(Arc::new(config))
}
