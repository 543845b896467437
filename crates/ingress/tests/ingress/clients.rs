//! Clients who must show a certificate, with a real client.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use api::object::Key;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use ingress::SecretState;
use ingress::gateway::CaState;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::RootCertStore;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::server::{ServerConfig, WebPkiClientVerifier};

use crate::ports::{Authority, Certified, tls_echo};
use crate::proxy::NGINX;
use crate::world::{Backend, World, ingress};

/// Files with certificates and their keys, gone when dropped.
struct Files(PathBuf);

impl Files {
    fn new(name: &str) -> Files {
        let dir = std::env::temp_dir().join(format!("fairlead-clients-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        Files(dir)
    }

    fn put(&self, name: &str, text: &str) -> String {
        let path = self.0.join(name);
        std::fs::write(&path, text).expect("written");
        path.display().to_string()
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        std::fs::remove_dir_all(&self.0).ok();
    }
}

fn authorities(authority: &Authority) -> CaState {
    CaState::of_secret(Some(&HashMap::from([("ca.crt".to_owned(), BASE64.encode(&authority.pem))])))
}

/// `shop.example` with TLS and these annotations, and `shop/web` behind it.
async fn world(annotations: &str, authority: &Authority) -> (World, Backend) {
    let backend = Backend::named("hello").await;
    let tls = ingress(&format!("{NGINX}/auth-tls-secret: shop/ca{annotations}"));
    let tls = tls.replace("rules:", "tls: [{hosts: [shop.example], secretName: cert}], rules:");
    let mut world = World::start(&[&tls], |_| {}).await;
    world.serve("web", &[backend.address]);
    world.secret("cert", "shop.example");
    world.compiler.new_authorities();
    world.compiler.set_authorities(&Key::new("shop", "ca"), authorities(authority));
    world.publish();
    (world, backend)
}

#[tokio::test]
async fn who_shows_the_wrong_certificate_stays_outside() {
    let files = Files::new("wrong");
    let (authority, stranger) = (Authority::new(), Authority::new());
    let file = |name: &str, authority: &Authority| {
        let signed = authority.sign(&["client"]);
        format!("--cert {}", files.put(name, &format!("{}{}", signed.pem, signed.key.serialize_pem())))
    };
    let (good, bad) = (file("good", &authority), file("bad", &stranger));
    let (good, bad, none) = (good.as_str(), bad.as_str(), "");
    for (more, shown, status, verified) in [
        ("", good, 200, "SUCCESS"),
        ("", bad, 400, ""),
        ("", none, 400, ""),
        ("auth-tls-verify-client: optional", good, 200, "SUCCESS"),
        ("auth-tls-verify-client: optional", bad, 400, ""),
        ("auth-tls-verify-client: optional", none, 200, "NONE"),
        ("auth-tls-verify-client: optional_no_ca", bad, 200, "FAILED:"),
        ("auth-tls-error-page: \"https://shop.example/sorry\"", none, 302, ""),
        ("auth-tls-match-cn: CN=rcgen", good, 200, "SUCCESS"),
        ("auth-tls-match-cn: CN=ann", good, 403, ""),
    ] {
        let annotations = if more.is_empty() { String::new() } else { format!(", {NGINX}/{more}") };
        let (world, backend) = world(&annotations, &authority).await;
        for version in ["--http1.1", "--http2"] {
            let seen = world
                .curl(&format!("{version} {shown} -H ssl-client-verify:\u{a0}SUCCESS https://shop.example/"))
                .await;
            let line = seen.lines().next().unwrap_or_default();
            assert!(line.contains(&format!(" {status}")), "{more} {shown}: {seen}");
            assert!(status != 302 || seen.contains("location: https://shop.example/sorry\n"), "{seen}");
            assert_eq!(backend.count() > 0, status == 200, "{more} {shown}");
        }
        let head = backend.last();
        assert!(status != 200 || head.contains(&format!("\"ssl-client-verify\": \"{verified}")), "{head}");
        assert!(verified != "NONE" || !head.contains("subject-dn"), "{head}");
        if verified == "SUCCESS" {
            assert!(head.contains("\"ssl-client-subject-dn\": \"CN=rcgen self signed cert\""), "{head}");
            assert!(
                head.contains("\"ssl-client-issuer-dn\": \"CN=authority\"") && !head.contains("ssl-client-cert"),
                "{head}"
            );
        }
        world.end().await;
    }
    let (world, backend) =
        world(&format!(", {NGINX}/auth-tls-pass-certificate-to-upstream: \"true\""), &authority).await;
    world.curl(&format!("{good} https://shop.example/")).await;
    assert!(backend.last().contains("\"ssl-client-cert\": \"-----BEGIN%20CERTIFICATE-----%0A"), "{}", backend.last());
    world.end().await;
    depth(&files, &authority).await;
}

/// One authority between a client's and the one that is known is enough unless more are allowed.
async fn depth(files: &Files, authority: &Authority) {
    let below = |name: &str, issuer: &Issuer<'static, KeyPair>| {
        let key = KeyPair::generate().expect("a key");
        let mut params = CertificateParams::new(Vec::new()).expect("no names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(rcgen::DnType::CommonName, name);
        let certificate = params.signed_by(&key, issuer).expect("signed");
        Authority { pem: certificate.pem(), issuer: Issuer::new(params, key) }
    };
    let first = below("first", &authority.issuer);
    let second = below("second", &first.issuer);
    for (signing, chain, depth, status) in [
        (&first, vec![&first], 1, 200),
        (&second, vec![&second, &first], 1, 400),
        (&second, vec![&second, &first], 2, 200),
    ] {
        let own = signing.sign(&["client"]);
        let chain: String = chain.into_iter().map(|one| one.pem.as_str()).collect();
        let file = files.put("chain", &format!("{}{chain}{}", own.pem, own.key.serialize_pem()));
        let (world, _backend) = world(&format!(", {NGINX}/auth-tls-verify-depth: \"{depth}\""), authority).await;
        let seen = world.curl(&format!("--http1.1 --cert {file} https://shop.example/")).await;
        assert!(seen.starts_with(&format!("HTTP/1.1 {status}")), "{depth}: {seen}");
        world.end().await;
    }
}

#[tokio::test]
async fn authorities_change_and_a_host_is_asked_by_its_name() {
    let files = Files::new("change");
    let (before, after) = (Authority::new(), Authority::new());
    let signed = after.sign(&["client"]);
    let shown = format!("--cert {}", files.put("client", &format!("{}{}", signed.pem, signed.key.serialize_pem())));
    let (mut world, backend) = world("", &before).await;
    let asked = format!("--http1.1 {shown} https://shop.example/");
    assert!(world.curl(&asked).await.starts_with("HTTP/1.1 400"));
    world.compiler.set_authorities(&Key::new("shop", "ca"), authorities(&after));
    world.publish();
    assert!(world.curl(&asked).await.ends_with("hello"));
    world.compiler.set_authorities(&Key::new("shop", "ca"), CaState::of_secret(None));
    world.publish();
    assert!(world.curl(&asked).await.starts_with("HTTP/1.1 403"), "nobody knows whom to let in");
    world.compiler.set_authorities(&Key::new("shop", "ca"), authorities(&after));
    let open = ingress("").replace("shop/web", "shop/open").replace("shop.example", "open.example");
    world.apply(&[&open]);
    assert!(world.curl("https://open.example/").await.ends_with("hello"), "nobody is asked there");
    let count = backend.count();
    // A connection that was made for the open host carries no request for the other.
    let seen = world.curl(&format!("--http1.1 {shown} -H Host:\u{a0}shop.example https://open.example/")).await;
    assert!(seen.starts_with("HTTP/1.1 421"), "{seen}");
    // Without TLS nobody can show anything, and is sent to it.
    assert!(world.curl("http://shop.example/").await.starts_with("HTTP/1.1 308"));
    assert_eq!(backend.count(), count);
    world.end().await;
}

/// An endpoint over TLS that wants a certificate of `authority`, and has `own`.
async fn over_tls(own: &Certified, authority: &Authority) -> (SocketAddr, tokio::task::JoinHandle<()>) {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(authority.pem.as_bytes()).expect("a certificate")).expect("an authority");
    let provider = Arc::new(ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone()).build();
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("versions")
        .with_client_cert_verifier(verifier.expect("a verifier"))
        .with_single_cert(vec![own.der.clone()], PrivateKeyDer::try_from(own.key.serialize_der()).expect("a key"))
        .expect("a certificate and its key");
    let acceptor = TlsAcceptor::from(Arc::new(config));
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("loopback");
    let address = listener.local_addr().expect("bound");
    let task = tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // Who is refused goes away.
            let Ok(mut stream) = acceptor.accept(stream).await else { continue };
            let mut buffer = [0; 4096];
            if stream.read(&mut buffer).await.is_ok_and(|count| count > 0) {
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\nhello";
                stream.write_all(answer).await.ok();
                stream.shutdown().await.ok();
            }
        }
    });
    (address, task)
}

#[tokio::test]
async fn endpoints_are_judged_and_hear_who_asks() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (address, task) = over_tls(&authority.sign(&["a.internal"]), &authority).await;
    let annotations = |name: &str| {
        format!(
            "{NGINX}/backend-protocol: HTTPS, {NGINX}/proxy-ssl-secret: shop/tls, {NGINX}/proxy-ssl-verify: \"on\", \
             {NGINX}/proxy-ssl-name: {name}, {NGINX}/proxy-ssl-server-name: \"on\""
        )
    };
    let mut world = World::start(&[&ingress(&annotations("a.internal"))], |_| {}).await;
    world.serve("web", &[address]);
    let key = Key::new("shop", "tls");
    assert!(world.curl("http://shop.example/").await.starts_with("HTTP/1.1 503"), "nobody knows by whom");
    let own = authority.sign(&["ingress"]);
    let data = HashMap::from([
        ("tls.crt".to_owned(), BASE64.encode(&own.pem)),
        ("tls.key".to_owned(), BASE64.encode(own.key.serialize_pem())),
    ]);
    world.compiler.wanted_secrets();
    world.compiler.set_secret(&key, SecretState::of(Some(&data)));
    for (judge, name, works) in
        [(&authority, "a.internal", true), (&authority, "b.internal", false), (&stranger, "a.internal", false)]
    {
        world.apply(&[&ingress(&annotations(name))]);
        world.compiler.set_authorities(&key, authorities(judge));
        world.publish();
        let seen = world.curl("http://shop.example/").await;
        assert_eq!(seen.ends_with("hello"), works, "{name}: {seen}");
        assert!(works || seen.starts_with("HTTP/1.1 502"), "{name}: {seen}");
    }
    // Without a certificate of our own the endpoint does not want us.
    world.apply(&[&ingress(&annotations("a.internal"))]);
    world.compiler.set_authorities(&key, authorities(&authority));
    world.compiler.set_secret(&key, SecretState::of(None));
    world.publish();
    assert!(world.curl("http://shop.example/").await.starts_with("HTTP/1.1 502"));
    task.abort();
    world.end().await;
}

#[tokio::test]
async fn tls_of_a_host_is_passed_through_beside_others() {
    let authority = Authority::new();
    let (inner, _task) = tls_echo(&authority.sign(&["shop.example"])).await;
    let plain = Backend::named("plain").await;
    let files = Files::new("passing");
    let ca = files.put("ca", &authority.pem);
    let host = |annotations: &str| ingress(annotations).replace("shop.example", "HOST");
    let pass = |on: bool| host(&format!("{NGINX}/ssl-passthrough: \"{on}\"")).replace("HOST", "shop.example");
    let asking = format!("{NGINX}/auth-tls-secret: shop/ca, {NGINX}/auth-tls-verify-client: optional");
    let of_other = |annotations: &str| {
        host(annotations)
            .replace("HOST", "other.example")
            .replace("shop/web", "shop/other")
            .replace("name: web", "name: other")
    };
    let mut world = World::start(&[&pass(true), &of_other("")], |_| {}).await;
    world.serve("web", &[inner]);
    world.serve("other", &[plain.address]);
    for annotations in ["", &asking] {
        world.apply(&[&of_other(annotations)]);
        world.compiler.set_authorities(&Key::new("shop", "ca"), authorities(&authority));
        world.publish();
        let seen = world.curl(&format!("--no-insecure --cacert {ca} https://shop.example/any/path")).await;
        assert!(seen.ends_with("secret"), "the endpoint shows its own certificate: {seen}");
        for version in ["--http1.1", "--http2"] {
            let seen = world.curl(&format!("{version} https://other.example/")).await;
            assert!(seen.ends_with("plain"), "{annotations} {version}: {seen}");
        }
    }
    let metrics = (world.metrics)();
    assert!(metrics.contains("ssl-passthrough"), "its bytes are counted: {metrics}");
    // Nobody wants it any more: the same name ends here.
    world.apply(&[&pass(false)]);
    world.serve("web", &[plain.address]);
    assert!(world.curl("https://shop.example/").await.ends_with("plain"));
    assert!(!(world.metrics)().contains("ssl-passthrough"));
    world.end().await;
}
