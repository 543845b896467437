//! A real etcd, started and ended by the test that needs it, and what only concerns our client of it.

use std::io::{BufRead, BufReader};
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use futures::StreamExt;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use store::{Error, EtcdOptions, EtcdStore, EtcdTls, Outcome, Store, Txn};

use crate::scratch::Scratch;

const BINARY: &str = "/usr/bin/etcd";

pub struct Etcd {
    process: Child,
    url: String,
    arguments: Vec<String>,
    _scratch: Scratch,
}

impl Etcd {
    pub fn start() -> Self {
        Self::start_with("http", Scratch::new(), &[])
    }

    /// `arguments` are etcd's, beside those for its addresses and data.
    fn start_with(scheme: &str, scratch: Scratch, more: &[String]) -> Self {
        assert!(Path::new(BINARY).exists(), "{BINARY} is missing: run make deps");
        // A free port may be taken by another before etcd gets it; then others are tried.
        for attempt in 0..5 {
            let [client, peer] = free_ports();
            let url = format!("{scheme}://127.0.0.1:{client}");
            let peer = format!("http://127.0.0.1:{peer}");
            let data = scratch.path().join(format!("data-{attempt}"));
            let mut arguments: Vec<String> = vec![
                format!("--data-dir={}", data.display()),
                format!("--listen-client-urls={url}"),
                format!("--advertise-client-urls={url}"),
                format!("--listen-peer-urls={peer}"),
                format!("--initial-advertise-peer-urls={peer}"),
                format!("--initial-cluster=default={peer}"),
            ];
            arguments.extend_from_slice(more);
            if let Some(process) = spawn(&arguments) {
                return Self { process, url, arguments, _scratch: scratch };
            }
        }
        panic!("etcd did not start in five attempts");
    }

    pub fn url(&self) -> &str {
        &self.url
    }

    fn kill(&mut self) {
        self.process.kill().expect("it is our child");
        self.process.wait().expect("it is our child");
    }

    fn restart(&mut self) {
        self.process = spawn(&self.arguments).expect("etcd starts again on its data");
    }
}

impl Drop for Etcd {
    fn drop(&mut self) {
        self.process.kill().ok();
        self.process.wait().ok();
    }
}

/// Returns when etcd says that it serves; `None` if it ends before.
fn spawn(arguments: &[String]) -> Option<Child> {
    let mut command = Command::new(BINARY);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    let mut process = command.spawn().expect("etcd can be executed");
    let log = process.stderr.take().expect("it is piped");
    let (serves, told) = mpsc::channel();
    // Reads to the end, or etcd would stop when the pipe is full.
    thread::spawn(move || {
        for line in BufReader::new(log).lines().map_while(Result::ok) {
            if line.contains("ready to serve client requests") {
                serves.send(()).ok();
            }
        }
    });
    if told.recv_timeout(Duration::from_secs(30)).is_ok() {
        return Some(process);
    }
    process.kill().ok();
    process.wait().ok();
    None
}

fn free_ports() -> [u16; 2] {
    let listen = || TcpListener::bind(("127.0.0.1", 0)).expect("the loopback has a free port");
    [listen(), listen()].map(|socket| socket.local_addr().expect("it is bound").port())
}

fn options(urls: &[&str]) -> EtcdOptions {
    EtcdOptions::new(urls.iter().map(|url| (*url).to_owned()))
}

#[tokio::test(flavor = "multi_thread")]
async fn another_endpoint_is_used_when_one_is_dead() {
    let etcd = Etcd::start();
    let [dead, _] = free_ports();
    let dead = format!("http://127.0.0.1:{dead}");
    let alone = EtcdStore::connect(options(&[&dead])).await;
    assert!(matches!(&alone, Err(Error::Unavailable(reason)) if reason.contains(&dead)), "{alone:?}");
    let store = EtcdStore::connect(options(&[&dead, etcd.url()])).await.expect("the second endpoint answers");
    assert_eq!(store.commit(Txn::new().put("a", "1")).await.expect("it commits"), Outcome::Committed(2));
    assert!(store.watch("", 1).await.expect("it watches").next().await.expect("an event").is_ok());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restarted_etcd_is_found_again() {
    let mut etcd = Etcd::start();
    let store = EtcdStore::connect(options(&[etcd.url()])).await.expect("etcd answers");
    store.commit(Txn::new().put("a", "1")).await.expect("it commits");
    let mut stream = store.watch("", 1).await.expect("it watches");
    stream.next().await.expect("an event").expect("of the write");
    etcd.kill();
    let broken = stream.next().await.expect("the watch says that it broke");
    assert!(matches!(broken, Err(Error::Unavailable(_))), "{broken:?}");
    assert!(stream.next().await.is_none(), "and has then ended");
    assert!(matches!(store.health().await, Err(Error::Unavailable(_))));
    assert!(matches!(store.commit(Txn::new().put("a", "2")).await, Err(Error::Unavailable(_))));
    etcd.restart();
    // The first call may still find the broken connection.
    let mut answer = store.get("a").await;
    if answer.is_err() {
        answer = store.get("a").await;
    }
    let (revision, kv) = answer.expect("etcd answers again");
    assert_eq!((revision, &kv.expect("the key is there").value[..]), (2, &b"1"[..]));
}

#[tokio::test(flavor = "multi_thread")]
async fn prefixes_keep_strangers_apart() {
    let etcd = Etcd::start();
    let connect = async |prefix: &str| {
        let mut options = options(&[etcd.url()]);
        options.prefix = prefix.to_owned();
        EtcdStore::connect(options).await.expect("etcd answers")
    };
    let (one, other, whole) = (connect("/one").await, connect("/one-more").await, connect("").await);
    one.commit(Txn::new().put("key", "1")).await.expect("it commits");
    other.commit(Txn::new().put("key", "2")).await.expect("it commits");
    for store in [&one, &other] {
        assert_eq!(store.list("", None, 0, None).await.expect("it lists").items.len(), 1);
    }
    let keys = whole.list("", None, 0, None).await.expect("it lists").items;
    assert_eq!(keys.iter().map(|kv| &*kv.key).collect::<Vec<_>>(), ["one-more/key", "one/key"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_are_checked_both_ways() {
    let scratch = Scratch::new();
    let authority_key = KeyPair::generate().expect("a key");
    let mut authority = CertificateParams::new(Vec::new()).expect("valid names");
    authority.distinguished_name.push(DnType::CommonName, "test authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = authority.self_signed(&authority_key).expect("a certificate").pem();
    let issuer = Issuer::new(authority, authority_key);
    let issue = |name: &str| {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![name.to_owned()]).expect("a valid name");
        (params.signed_by(&key, &issuer).expect("a certificate").pem(), key.serialize_pem())
    };
    let (certificate, key) = issue("127.0.0.1");
    let file = |name: &str, content: &str| {
        let path = scratch.path().join(name);
        std::fs::write(&path, content).expect("the scratch directory can be written");
        path.display().to_string()
    };
    let arguments = [
        format!("--cert-file={}", file("server.crt", &certificate)),
        format!("--key-file={}", file("server.key", &key)),
        format!("--trusted-ca-file={}", file("ca.crt", &ca)),
        "--client-cert-auth".to_owned(),
    ];
    let etcd = Etcd::start_with("https", scratch, &arguments);
    let (certificate, key) = issue("client");
    let client = Some((certificate.into_bytes(), key.into_bytes()));
    let connect = async |ca: &str, client: Option<(Vec<u8>, Vec<u8>)>| {
        let mut options = options(&[etcd.url()]);
        options.tls = Some(EtcdTls { ca: ca.as_bytes().to_vec(), client });
        EtcdStore::connect(options).await
    };
    let store = connect(&ca, client.clone()).await.expect("etcd takes our certificate and we take its");
    assert_eq!(store.commit(Txn::new().put("a", "1")).await.expect("it commits"), Outcome::Committed(2));
    let nobody = connect(&ca, None).await;
    assert!(matches!(nobody, Err(Error::Unavailable(_))), "{nobody:?}");
    let strange_key = KeyPair::generate().expect("a key");
    let strange = CertificateParams::new(Vec::new()).expect("valid names").self_signed(&strange_key);
    let fooled = connect(&strange.expect("a certificate").pem(), client).await;
    assert!(matches!(fooled, Err(Error::Unavailable(_))), "{fooled:?}");
}

#[tokio::test]
async fn endpoints_that_make_no_sense_are_refused() {
    let cases: [&[&str]; 5] =
        [&[], &["127.0.0.1:2379"], &["https://127.0.0.1:2379"], &["ftp://127.0.0.1"], &["http://"]];
    for urls in cases {
        let refused = EtcdStore::connect(options(urls)).await;
        assert!(matches!(refused, Err(Error::Connection(_))), "{urls:?}: {refused:?}");
    }
}
