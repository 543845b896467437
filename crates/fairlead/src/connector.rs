//! The API server's way to its nodes: one connector for all of them, whose sockets are made in the network namespace
//! where nodes are reached, and whose TLS says who the server is and makes sure of the node.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use apiserver::{BoxedIo, Connector};
use futures::future::BoxFuture;
use linux::netns::Netns;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::{ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::pki::{self, CertifiedKey, LEAF_LIFE, Pki};

/// The identity under which the API server speaks to kubelets.
pub const KUBELET_CLIENT: &str = "kube-apiserver-kubelet-client";
const PATIENCE: Duration = Duration::from_secs(10);

/// Connects to kubelets from inside one network namespace.
pub struct LabConnector {
    namespace: Option<Netns>,
    verifier: Arc<WebPkiServerVerifier>,
    identity: CertifiedKey,
}

impl LabConnector {
    /// `namespace` is where nodes are reached; `None` is where this process is.
    pub fn new(namespace: Option<Netns>, pki: &Pki) -> anyhow::Result<LabConnector> {
        let (chain, key) = pki.client_certificate(KUBELET_CLIENT, &["system:masters"], LEAF_LIFE)?;
        let identity = CertifiedKey::from_pem(chain.as_bytes(), key.as_bytes())?;
        let mut roots = RootCertStore::empty();
        for authority in pki::certificates(pki.ca_pem().as_bytes())? {
            roots.add(authority).context("the certificate authority cannot be used for TLS")?;
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::new(roots), provider)
            .build()
            .context("prepare the check of kubelets' certificates")?;
        Ok(LabConnector { namespace, verifier, identity })
    }

    async fn tcp(&self, address: SocketAddr) -> io::Result<TcpStream> {
        let connect = async {
            match &self.namespace {
                Some(namespace) => namespace.tcp_connect(address).await.map_err(io::Error::other),
                None => TcpStream::connect(address).await,
            }
        };
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("no connection to {address} in time"));
        let stream = tokio::time::timeout(PATIENCE, connect).await.map_err(late)??;
        stream.set_nodelay(true)?;
        Ok(stream)
    }

    async fn connect(&self, node: &str, address: SocketAddr) -> io::Result<BoxedIo> {
        let check = NodeVerifier { inner: self.verifier.clone(), node: ServerName::try_from(node.to_string()).ok() };
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(check))
            .with_client_auth_cert(self.identity.chain.clone(), self.identity.key.clone_key())
            .map_err(io::Error::other)?;
        let stream = self.tcp(address).await?;
        let handshake = TlsConnector::from(Arc::new(config)).connect(ServerName::from(address.ip()), stream);
        let late = |_| io::Error::new(io::ErrorKind::TimedOut, format!("no TLS handshake with {node} in time"));
        let stream = tokio::time::timeout(PATIENCE, handshake).await.map_err(late)??;
        Ok(Box::new(stream))
    }
}

impl Connector for LabConnector {
    fn kubelet<'a>(&'a self, node: &'a str, address: SocketAddr) -> BoxFuture<'a, io::Result<BoxedIo>> {
        Box::pin(self.connect(node, address))
    }
}

/// Accepts a certificate of the cluster's authority for the address that was dialled or for the node's name: a kubelet's
/// certificate has its name from the first day, an address perhaps only later.
#[derive(Debug)]
struct NodeVerifier {
    inner: Arc<WebPkiServerVerifier>,
    node: Option<ServerName<'static>>,
}

impl ServerCertVerifier for NodeVerifier {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        address: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let by = |name: &ServerName<'_>| self.inner.verify_server_cert(certificate, intermediates, name, ocsp, now);
        match (by(address), &self.node) {
            (Err(error), Some(node)) => by(node).map_err(|_| error),
            (result, _) => result,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls12_signature(message, certificate, signature)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.inner.verify_tls13_signature(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.inner.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pki::San;
    use crate::pki::tests::Scratch;
    use crate::serve::tls_config;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::TcpListener;
    use tokio_rustls::TlsAcceptor;

    /// A kubelet that tells the caller the common name in the certificate it has shown.
    async fn kubelet(pki: &Pki, certificate: &CertifiedKey) -> SocketAddr {
        let tls =
            tls_config(crate::pki::Rotating::new(certificate).expect("a certificate"), pki.ca_pem()).expect("TLS");
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("loopback");
        let address = listener.local_addr().expect("an address");
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let Ok(mut stream) = TlsAcceptor::from(tls.clone()).accept(stream).await else { continue };
                let leaf = stream.get_ref().1.peer_certificates().and_then(|c| c.first()).map(|c| c.to_vec());
                let who = leaf.and_then(|l| apiserver::auth::authenticate::from_certificate(&l));
                let name = who.map_or_else(String::new, |w| w.user);
                let _ = stream.write_all(name.as_bytes()).await;
                let _ = stream.shutdown().await;
            }
        });
        address
    }

    #[tokio::test]
    async fn a_kubelet_is_known_by_its_address_or_its_name_and_knows_us() {
        let scratch = Scratch::new();
        let pki = Pki::open_or_create(&scratch.0).expect("an authority");
        let connector = LabConnector::new(None, &pki).expect("a connector");
        let by_address = pki.kubelet_certificate("other", &["127.0.0.1".parse().expect("an address")]).expect("a pair");
        let by_name = pki.kubelet_certificate("node-1", &[]).expect("a pair");
        for certificate in [by_address, by_name] {
            let address = kubelet(&pki, &certificate).await;
            let mut stream = connector.kubelet("node-1", address).await.expect("a connection");
            let mut said = String::new();
            stream.read_to_string(&mut said).await.expect("an answer");
            assert_eq!(said, KUBELET_CLIENT);
        }
    }

    #[tokio::test]
    async fn a_stranger_is_not_taken_for_a_kubelet() {
        let (scratch, elsewhere) = (Scratch::new(), Scratch::new());
        let pki = Pki::open_or_create(&scratch.0).expect("an authority");
        let foreign = Pki::open_or_create(&elsewhere.0).expect("another");
        let connector = LabConnector::new(None, &pki).expect("a connector");
        let other_node = pki.kubelet_certificate("node-2", &[]).expect("a pair");
        let address = kubelet(&pki, &other_node).await;
        assert!(connector.kubelet("node-1", address).await.is_err(), "another node's certificate");
        let forged = foreign.server_certificate(&[San::from("node-1"), San::from("127.0.0.1")]).expect("a pair");
        let address = kubelet(&foreign, &forged).await;
        assert!(connector.kubelet("node-1", address).await.is_err(), "another authority's certificate");
    }
}
