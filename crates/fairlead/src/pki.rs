//! A cluster's certificate authority, and every certificate that hangs from it.
//!
//! One ECDSA P-256 authority per cluster lives in `DIR/pki`; keys never leave that directory except into the hands of
//! those they are made for. Files are written whole, synced and 0600, so that a crash leaves the old one or the new one.
#![allow(clippy::disallowed_methods, reason = "certificates live by the wall clock, and this is the edge")]

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::net::IpAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail, ensure};
use apiserver::auth::token::TokenKey;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use rcgen::string::Ia5String;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use x509_parser::prelude::{
    FromDer, GeneralName, ParsedExtension, X509Certificate, X509CertificationRequest, X509Name,
};

const DAY: Duration = Duration::from_secs(24 * 3600);
const AUTHORITY_LIFE: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// How long the certificates live that are renewed without anybody noticing.
pub const LEAF_LIFE: Duration = Duration::from_secs(365 * 24 * 3600);
/// Certificates are good from an hour ago, for machines whose clocks are behind.
const BACKDATE: Duration = Duration::from_secs(3600);

/// What a certificate is for: a name or an address that its holder answers to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum San {
    Name(String),
    Address(IpAddr),
}

impl San {
    fn to_rcgen(&self) -> anyhow::Result<SanType> {
        Ok(match self {
            San::Name(name) => SanType::DnsName(
                Ia5String::try_from(name.as_str())
                    .with_context(|| format!("{name:?} is not a DNS name that a certificate can hold"))?,
            ),
            San::Address(address) => SanType::IpAddress(*address),
        })
    }
}

/// An address when it reads as one, a name otherwise.
impl From<&str> for San {
    fn from(text: &str) -> San {
        text.parse::<IpAddr>().map_or_else(|_| San::Name(text.to_ascii_lowercase()), San::Address)
    }
}

impl From<IpAddr> for San {
    fn from(address: IpAddr) -> San {
        San::Address(address)
    }
}

impl std::fmt::Display for San {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            San::Name(name) => f.write_str(name),
            San::Address(address) => address.fmt(f),
        }
    }
}

/// A certificate chain, the holder's first, with its private key, DER.
pub struct CertifiedKey {
    pub chain: Vec<CertificateDer<'static>>,
    pub key: PrivateKeyDer<'static>,
}

impl Clone for CertifiedKey {
    fn clone(&self) -> Self {
        CertifiedKey { chain: self.chain.clone(), key: self.key.clone_key() }
    }
}

impl std::fmt::Debug for CertifiedKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CertifiedKey").field("certificates", &self.chain.len()).finish_non_exhaustive()
    }
}

impl CertifiedKey {
    /// Reads a chain and its key.
    pub fn from_pem(chain: &[u8], key: &[u8]) -> anyhow::Result<CertifiedKey> {
        let chain = certificates(chain)?;
        let key = PrivateKeyDer::from_pem_slice(key).context("no private key in PEM form")?;
        let made = CertifiedKey { chain, key };
        made.to_rustls()?;
        Ok(made)
    }

    pub fn chain_pem(&self) -> String {
        self.chain.iter().map(|c| to_pem("CERTIFICATE", c)).collect()
    }

    pub fn key_pem(&self) -> String {
        let label = match &self.key {
            PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
            PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
            _ => "PRIVATE KEY",
        };
        to_pem(label, self.key.secret_der())
    }

    /// The form that rustls presents. Fails when the key is not the certificate's.
    pub fn to_rustls(&self) -> anyhow::Result<Arc<rustls::sign::CertifiedKey>> {
        let provider = rustls::crypto::ring::default_provider();
        let made = rustls::sign::CertifiedKey::from_der(self.chain.clone(), self.key.clone_key(), &provider);
        Ok(Arc::new(made.context("the private key does not fit the certificate")?))
    }

    /// Whether the certificate is used now and has more than a fifth of its life left.
    pub fn is_fresh(&self, now: SystemTime) -> bool {
        self.chain.first().is_some_and(|leaf| is_fresh(leaf, now))
    }

    /// When it should be replaced: at four fifths of its life.
    pub fn renew_at(&self) -> Option<SystemTime> {
        let leaf = self.chain.first()?;
        let (from, until) = validity(leaf)?;
        Some(until - until.duration_since(from).ok()? / 5)
    }

    /// Whether one of the authorities in `ca_pem` signed it.
    pub fn is_signed_by(&self, ca_pem: &str) -> bool {
        let authorities = certificates(ca_pem.as_bytes()).unwrap_or_default();
        self.chain.first().is_some_and(|leaf| authorities.iter().any(|ca| is_signed_by(leaf, ca)))
    }

    /// The names and addresses in the certificate.
    pub fn sans(&self) -> BTreeSet<San> {
        self.chain.first().map(|leaf| sans(leaf)).unwrap_or_default()
    }
}

/// The serving certificate of a listener, replaced while it serves.
#[derive(Debug)]
pub struct Rotating(RwLock<Arc<rustls::sign::CertifiedKey>>);

impl Rotating {
    pub fn new(first: &CertifiedKey) -> anyhow::Result<Arc<Rotating>> {
        Ok(Arc::new(Rotating(RwLock::new(first.to_rustls()?))))
    }

    /// New connections see the new certificate; open ones are left alone.
    pub fn replace(&self, next: &CertifiedKey) -> anyhow::Result<()> {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = next.to_rustls()?;
        Ok(())
    }
}

impl ResolvesServerCert for Rotating {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<rustls::sign::CertifiedKey>> {
        Some(self.0.read().unwrap_or_else(PoisonError::into_inner).clone())
    }
}

/// The authority of one cluster.
pub struct Pki {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
    authority: CertificateDer<'static>,
    authority_pem: String,
    token_key: Vec<u8>,
}

impl std::fmt::Debug for Pki {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pki").field("dir", &self.dir).finish_non_exhaustive()
    }
}

impl Pki {
    /// The authority in `DIR/pki`, made on first use. The key is written first: a crash between the two leaves a key
    /// from which the next start makes the certificate.
    pub fn open_or_create(dir: &Path) -> anyhow::Result<Pki> {
        let dir = dir.join("pki");
        private_directory(&dir)?;
        let (key_path, certificate_path) = (dir.join("ca.key"), dir.join("ca.crt"));
        let key = read(&key_path)?;
        let certificate = read(&certificate_path)?;
        let key = match (&key, &certificate) {
            (Some(pem), _) => KeyPair::from_pem(pem).with_context(|| {
                format!("{} holds no usable private key; restore it from a backup", key_path.display())
            })?,
            (None, Some(_)) => bail!(
                "{} is missing beside its certificate; restore it, or remove {} to begin with a new authority that no node knows",
                key_path.display(),
                certificate_path.display()
            ),
            (None, None) => {
                let key = KeyPair::generate().context("make the cluster's key")?;
                write_private(&key_path, key.serialize_pem().as_bytes())?;
                key
            }
        };
        let authority_pem = match certificate {
            Some(pem) => pem,
            None => {
                let pem = authority(&key)?;
                write_private(&certificate_path, pem.as_bytes())?;
                pem
            }
        };
        let authority = CertificateDer::from_pem_slice(authority_pem.as_bytes())
            .with_context(|| format!("{} holds no certificate", certificate_path.display()))?;
        let (_, parsed) = X509Certificate::from_der(&authority)
            .with_context(|| format!("{} cannot be read as a certificate", certificate_path.display()))?;
        ensure!(
            parsed.public_key().raw == key.subject_public_key_info(),
            "{} and {} do not belong together; restore the pair",
            certificate_path.display(),
            key_path.display()
        );
        let issuer = Issuer::from_ca_cert_der(&authority, key).context("use the cluster's certificate")?;
        let token_key = token_key(&dir.join("sa.key"))?;
        Ok(Pki { dir, issuer, authority, authority_pem, token_key })
    }

    pub fn ca_pem(&self) -> &str {
        &self.authority_pem
    }

    /// What an agent pins this authority by: `sha256:` and the digest of its public key.
    pub fn ca_hash(&self) -> String {
        public_key_hash(&self.authority).expect("the authority was parsed when it was opened")
    }

    /// The key that signs service account tokens, PKCS#8.
    pub fn token_key_pkcs8(&self) -> &[u8] {
        &self.token_key
    }

    /// The API server's certificate. The one kept on disk is used again while it names the same and is fresh.
    pub fn server_certificate(&self, sans: &[San]) -> anyhow::Result<CertifiedKey> {
        let (chain_path, key_path) = (self.dir.join("apiserver.crt"), self.dir.join("apiserver.key"));
        let wanted: BTreeSet<San> = sans.iter().cloned().collect();
        if let (Some(chain), Some(key)) = (read(&chain_path)?, read(&key_path)?)
            && let Ok(kept) = CertifiedKey::from_pem(chain.as_bytes(), key.as_bytes())
            && kept.is_fresh(SystemTime::now())
            && kept.is_signed_by(&self.authority_pem)
            && kept.sans() == wanted
        {
            return Ok(kept);
        }
        let wanted: Vec<San> = wanted.into_iter().collect();
        let mut made = self.issue("kube-apiserver", &[], &wanted, &[ExtendedKeyUsagePurpose::ServerAuth], LEAF_LIFE)?;
        // The authority goes along, so that an agent that knows only its digest gets to see it.
        made.chain.push(self.authority.clone());
        write_private(&key_path, made.key_pem().as_bytes())?;
        write_private(&chain_path, made.chain_pem().as_bytes())?;
        Ok(made)
    }

    /// The names and loopback addresses of the API server, which are nobody else's.
    pub fn server_names(&self) -> BTreeSet<San> {
        let chain = read(&self.dir.join("apiserver.crt")).ok().flatten().unwrap_or_default();
        let leaf = CertificateDer::from_pem_slice(chain.as_bytes());
        let mut names = leaf.map(|leaf| sans(&leaf)).unwrap_or_default();
        // Other addresses may be a node's too, where the server runs on one.
        names.retain(|san| match san {
            San::Name(_) => true,
            San::Address(address) => address.is_loopback(),
        });
        names
    }

    /// A certificate for a client: the common name is the user, the organizations are its groups.
    pub fn client_certificate(&self, cn: &str, orgs: &[&str], valid: Duration) -> anyhow::Result<(String, String)> {
        let made = self.issue(cn, orgs, &[], &[ExtendedKeyUsagePurpose::ClientAuth], valid)?;
        Ok((made.chain_pem(), made.key_pem()))
    }

    /// A kubelet's certificate without a signing request, for tests.
    #[cfg(test)]
    pub fn kubelet_certificate(&self, node: &str, addresses: &[IpAddr]) -> anyhow::Result<CertifiedKey> {
        let mut sans = vec![San::Name(node.to_string())];
        sans.extend(addresses.iter().copied().map(San::Address));
        let usages = [ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.issue(&format!("system:node:{node}"), &["system:nodes"], &sans, &usages, LEAF_LIFE)
    }

    fn issue(
        &self,
        cn: &str,
        orgs: &[&str],
        sans: &[San],
        usages: &[ExtendedKeyUsagePurpose],
        valid: Duration,
    ) -> anyhow::Result<CertifiedKey> {
        let key = KeyPair::generate().context("make a private key")?;
        let mut params = leaf(valid)?;
        params.distinguished_name = subject(cn, orgs)?;
        params.subject_alt_names = sans.iter().map(San::to_rcgen).collect::<anyhow::Result<_>>()?;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usages.to_vec();
        let certificate =
            params.signed_by(&key, &self.issuer).with_context(|| format!("sign the certificate of {cn:?}"))?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Ok(CertifiedKey { chain: vec![certificate.into()], key })
    }

    /// Signs a request: its subject and names are kept, its usages are those of `usages` (in the words of
    /// CertificateSigningRequest), and it is never an authority.
    pub fn sign_csr(&self, pem: &[u8], usages: &[String], valid: Duration) -> anyhow::Result<Vec<u8>> {
        let request = Request::parse(pem)?;
        let der = CertificateSigningRequestDer::from(request.der);
        let mut asked = CertificateSigningRequestParams::from_der(&der)
            .context("the request's signature or its extensions cannot be accepted")?;
        let mut params = leaf(valid)?;
        let orgs: Vec<&str> = request.organizations.iter().map(String::as_str).collect();
        params.distinguished_name = subject(&request.common_name, &orgs)?;
        params.subject_alt_names = std::mem::take(&mut asked.params.subject_alt_names);
        for usage in usages {
            match usage_of(usage)? {
                Usage::Key(key) if !params.key_usages.contains(&key) => params.key_usages.push(key),
                Usage::Key(_) => {}
                Usage::Extended(extended) => params.insert_extended_key_usage(extended),
            }
        }
        let certificate = params.signed_by(&asked.public_key, &self.issuer).context("sign the request")?;
        Ok(certificate.pem().into_bytes())
    }
}

/// A new key, and a request for its certificate: key and request, PEM.
pub fn request(cn: &str, org: &str, sans: &[San]) -> anyhow::Result<(String, String)> {
    let key = KeyPair::generate().context("make a private key")?;
    let mut params = CertificateParams::default();
    params.distinguished_name = subject(cn, &[org])?;
    params.subject_alt_names = sans.iter().map(San::to_rcgen).collect::<anyhow::Result<_>>()?;
    let request = params.serialize_request(&key).context("make a certificate signing request")?;
    Ok((key.serialize_pem(), request.pem().context("write a certificate signing request")?))
}

/// What a certificate signing request asks for, in the words of a decision about it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Request {
    pub common_name: String,
    pub organizations: Vec<String>,
    pub sans: BTreeSet<San>,
    der: Vec<u8>,
}

impl Request {
    /// Reads a PEM request. What a certificate of ours could not say without loss is an error here, not a surprise later.
    pub fn parse(pem: &[u8]) -> anyhow::Result<Request> {
        let der = CertificateSigningRequestDer::from_pem_slice(pem)
            .context("the request is not PEM of type CERTIFICATE REQUEST")?;
        let (_, parsed) = X509CertificationRequest::from_der(&der).context("the request cannot be read as PKCS#10")?;
        let (common_name, organizations) = names(&parsed.certification_request_info.subject)?;
        let mut sans = BTreeSet::new();
        for extension in parsed.requested_extensions().into_iter().flatten() {
            if let ParsedExtension::SubjectAlternativeName(san) = extension {
                for name in &san.general_names {
                    sans.insert(san_of(name).context("the request names something other than hosts and addresses")?);
                }
            }
        }
        Ok(Request { common_name, organizations, sans, der: der.to_vec() })
    }
}

/// Common name and organizations of a subject that has nothing else.
fn names(subject: &X509Name<'_>) -> anyhow::Result<(String, Vec<String>)> {
    let mut common_names = Vec::new();
    let mut organizations = Vec::new();
    for rdn in subject.iter() {
        ensure!(rdn.iter().count() == 1, "the subject must have one attribute in each part");
        for attribute in rdn.iter() {
            let text = attribute.as_str().context("the subject is not text")?.to_string();
            match attribute.attr_type().to_id_string().as_str() {
                "2.5.4.3" => common_names.push(text),
                "2.5.4.10" => organizations.push(text),
                other => bail!("the subject may hold a common name and organizations, not the attribute {other}"),
            }
        }
    }
    ensure!(common_names.len() == 1, "the subject must have one common name");
    Ok((common_names.remove(0), organizations))
}

enum Usage {
    Key(KeyUsagePurpose),
    Extended(ExtendedKeyUsagePurpose),
}

fn usage_of(word: &str) -> anyhow::Result<Usage> {
    Ok(match word {
        "signing" | "digital signature" => Usage::Key(KeyUsagePurpose::DigitalSignature),
        "content commitment" => Usage::Key(KeyUsagePurpose::ContentCommitment),
        "key encipherment" => Usage::Key(KeyUsagePurpose::KeyEncipherment),
        "key agreement" => Usage::Key(KeyUsagePurpose::KeyAgreement),
        "data encipherment" => Usage::Key(KeyUsagePurpose::DataEncipherment),
        "client auth" => Usage::Extended(ExtendedKeyUsagePurpose::ClientAuth),
        "server auth" => Usage::Extended(ExtendedKeyUsagePurpose::ServerAuth),
        other => bail!("the usage {other:?} is not signed here"),
    })
}

fn authority(key: &KeyPair) -> anyhow::Result<String> {
    let mut params = leaf(AUTHORITY_LIFE)?;
    // The name carries the key's digest, so that two clusters' authorities are told apart in a trust store.
    let digest = hex(ring::digest::digest(&ring::digest::SHA256, &key.subject_public_key_info()).as_ref());
    params.distinguished_name = subject(&format!("fairlead-{}", &digest[..8]), &[])?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign, KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = false;
    Ok(params.self_signed(key).context("make the cluster's certificate")?.pem())
}

/// What all certificates have in common.
fn leaf(valid: Duration) -> anyhow::Result<CertificateParams> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).context("this machine's clock is before 1970; set it")?;
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    let seconds = |d: Duration| Duration::from_secs(d.as_secs());
    let mut serial = [0; 16];
    getrandom::fill(&mut serial).map_err(|e| anyhow::anyhow!("no randomness from the kernel: {e}"))?;
    // Positive, and without a leading zero byte.
    serial[0] = (serial[0] & 0x7f) | 0x40;
    let mut params = CertificateParams::default();
    params.not_before = epoch + seconds(now.saturating_sub(BACKDATE));
    // A hundred years are enough for anybody, and no date of a request can overflow.
    params.not_after = epoch + seconds(now + valid.min(36500 * DAY));
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.is_ca = IsCa::ExplicitNoCa;
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// rcgen's subjects hold one value for each type; the second organization goes in by its number, which is the same thing on the wire.
fn subject(cn: &str, orgs: &[&str]) -> anyhow::Result<DistinguishedName> {
    let mut name = DistinguishedName::new();
    let kinds = [DnType::OrganizationName, DnType::CustomDnType(vec![2, 5, 4, 10])];
    ensure!(orgs.len() <= kinds.len(), "a certificate can hold {} groups; {cn:?} asks for {}", kinds.len(), orgs.len());
    for (kind, org) in kinds.into_iter().zip(orgs) {
        name.push(kind, *org);
    }
    name.push(DnType::CommonName, cn);
    Ok(name)
}

fn token_key(path: &Path) -> anyhow::Result<Vec<u8>> {
    if let Some(pem) = read(path)? {
        let key = PrivatePkcs8KeyDer::from_pem_slice(pem.as_bytes()).with_context(|| {
            format!(
                "{} holds no private key; remove it to have a new one made: tokens in use become invalid",
                path.display()
            )
        })?;
        return Ok(key.secret_pkcs8_der().to_vec());
    }
    let key = TokenKey::generate()?;
    write_private(path, to_pem("PRIVATE KEY", &key).as_bytes())?;
    Ok(key)
}

/// All certificates in a PEM text; an error when there is none.
pub fn certificates(pem: &[u8]) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    let found = found.context("the certificates are not good PEM")?;
    ensure!(!found.is_empty(), "no certificate in PEM form");
    Ok(found)
}

/// `sha256:` and the digest of a certificate's public key, as kubeadm's discovery hash.
pub fn public_key_hash(certificate: &[u8]) -> Option<String> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let digest = ring::digest::digest(&ring::digest::SHA256, parsed.public_key().raw);
    Some(format!("sha256:{}", hex(digest.as_ref())))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// From when until when.
pub fn validity(certificate: &[u8]) -> Option<(SystemTime, SystemTime)> {
    let (_, parsed) = X509Certificate::from_der(certificate).ok()?;
    let at = |seconds: i64| UNIX_EPOCH.checked_add(Duration::from_secs(u64::try_from(seconds).ok()?));
    Some((at(parsed.validity().not_before.timestamp())?, at(parsed.validity().not_after.timestamp())?))
}

fn is_fresh(certificate: &[u8], now: SystemTime) -> bool {
    let Some((from, until)) = validity(certificate) else { return false };
    let (Ok(life), Ok(left)) = (until.duration_since(from), until.duration_since(now)) else { return false };
    from <= now && left > life / 5
}

fn is_signed_by(certificate: &[u8], authority: &[u8]) -> bool {
    let (Ok((_, leaf)), Ok((_, ca))) = (X509Certificate::from_der(certificate), X509Certificate::from_der(authority))
    else {
        return false;
    };
    leaf.verify_signature(Some(ca.public_key())).is_ok()
}

fn sans(certificate: &[u8]) -> BTreeSet<San> {
    let Ok((_, parsed)) = X509Certificate::from_der(certificate) else { return BTreeSet::new() };
    let Ok(Some(extension)) = parsed.subject_alternative_name() else { return BTreeSet::new() };
    extension.value.general_names.iter().filter_map(san_of).collect()
}

fn san_of(name: &GeneralName<'_>) -> Option<San> {
    match name {
        GeneralName::DNSName(name) => Some(San::Name((*name).to_ascii_lowercase())),
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => Some(San::Address(IpAddr::from(<[u8; 4]>::try_from(*bytes).ok()?))),
            16 => Some(San::Address(IpAddr::from(<[u8; 16]>::try_from(*bytes).ok()?))),
            _ => None,
        },
        _ => None,
    }
}

pub fn to_pem(label: &str, der: &[u8]) -> String {
    let encoded = BASE64.encode(der);
    let mut pem = format!("-----BEGIN {label}-----\n");
    let mut rest = encoded.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(64));
        pem.push_str(line);
        pem.push('\n');
        rest = after;
    }
    pem.push_str(&format!("-----END {label}-----\n"));
    pem
}

/// The text of a file; `None` when there is none.
pub fn read(path: &Path) -> anyhow::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error).with_context(|| format!("read {}", path.display())),
    }
}

/// A directory for nobody but its owner.
pub fn private_directory(path: &Path) -> anyhow::Result<()> {
    let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(path);
    made.with_context(|| format!("make the directory {}", path.display()))
}

/// Writes a file whole: 0600, synced, then renamed over the old one, and the directory synced.
pub fn write_private(path: &Path, contents: &[u8]) -> anyhow::Result<()> {
    let directory = path.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name =
        path.file_name().and_then(|n| n.to_str()).with_context(|| format!("{} names no file", path.display()))?;
    let beside = directory.join(format!(".{name}.{}", std::process::id()));
    let write = || -> std::io::Result<()> {
        match fs::remove_file(&beside) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
        file.write_all(contents)?;
        file.sync_all()?;
        fs::rename(&beside, path)?;
        File::open(directory)?.sync_all()
    };
    write().with_context(|| format!("write {}", path.display()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::sync::atomic::{AtomicU32, Ordering};

    /// A directory that goes with the test.
    pub(crate) struct Scratch(pub PathBuf);

    impl Scratch {
        pub(crate) fn new() -> Scratch {
            static NEXT: AtomicU32 = AtomicU32::new(0);
            let number = NEXT.fetch_add(1, Ordering::Relaxed);
            let path = std::env::temp_dir().join(format!("fairlead-pki-{}-{number}", std::process::id()));
            fs::create_dir_all(&path).expect("a scratch directory");
            Scratch(path)
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn the_authority_is_made_once_and_its_files_are_private() {
        let scratch = Scratch::new();
        let first = Pki::open_or_create(&scratch.0).expect("a new authority");
        let again = Pki::open_or_create(&scratch.0).expect("the same authority");
        assert_eq!(first.ca_pem(), again.ca_pem());
        assert_eq!(first.token_key_pkcs8(), again.token_key_pkcs8());
        assert!(first.ca_hash().starts_with("sha256:"));
        for name in ["ca.crt", "ca.key", "sa.key"] {
            let mode = fs::metadata(scratch.0.join("pki").join(name)).expect(name).permissions().mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        TokenKey::from_pkcs8(first.token_key_pkcs8(), "issuer").expect("a usable token key");
    }

    #[test]
    fn a_key_without_certificate_is_completed_and_a_foreign_pair_is_refused() {
        let (one, two) = (Scratch::new(), Scratch::new());
        let key = |s: &Scratch| s.0.join("pki/ca.key");
        let first = Pki::open_or_create(&one.0).expect("an authority").ca_hash();
        fs::remove_file(one.0.join("pki/ca.crt")).expect("the certificate");
        assert_eq!(Pki::open_or_create(&one.0).expect("completed").ca_hash(), first);
        Pki::open_or_create(&two.0).expect("another");
        fs::copy(key(&two), key(&one)).expect("copied");
        let refused = Pki::open_or_create(&one.0).expect_err("a foreign key").to_string();
        assert!(refused.contains("do not belong together"), "{refused}");
        fs::remove_file(key(&one)).expect("the key");
        assert!(Pki::open_or_create(&one.0).is_err(), "a certificate without its key");
    }

    #[test]
    fn the_serving_certificate_is_kept_until_its_names_change() {
        let scratch = Scratch::new();
        let pki = Pki::open_or_create(&scratch.0).expect("an authority");
        let names = [San::from("localhost"), San::from("127.0.0.1"), San::from("::1")];
        let first = pki.server_certificate(&names).expect("a certificate");
        let kept = pki.server_certificate(&names).expect("the same");
        assert_eq!(first.chain, kept.chain);
        assert!(first.is_fresh(SystemTime::now()) && !first.is_fresh(SystemTime::now() + 300 * DAY));
        let more = pki.server_certificate(&[&names[..], &[San::from("10.96.0.1")]].concat()).expect("another");
        assert_ne!(first.chain, more.chain);
        assert_eq!(more.sans().len(), 4);
    }

    #[test]
    fn a_client_is_who_its_certificate_says() {
        let scratch = Scratch::new();
        let pki = Pki::open_or_create(&scratch.0).expect("an authority");
        let (chain, key) = pki.client_certificate("jane", &["dev", "ops"], DAY).expect("a certificate");
        let jane = CertifiedKey::from_pem(chain.as_bytes(), key.as_bytes()).expect("a pair");
        let identity = apiserver::auth::authenticate::from_certificate(&jane.chain[0]).expect("an identity");
        assert_eq!(identity.user, "jane");
        assert_eq!(identity.groups, ["dev", "ops", "system:authenticated"]);
        assert!(jane.is_signed_by(pki.ca_pem()));
        assert!(pki.client_certificate("jane", &["a", "b", "c"], DAY).is_err());
    }

    #[test]
    fn a_request_is_signed_with_its_subject_and_names() {
        let scratch = Scratch::new();
        let pki = Pki::open_or_create(&scratch.0).expect("an authority");
        let sans = [San::from("node-1"), San::from("192.168.49.2")];
        let (key, pem) = request("system:node:node-1", "system:nodes", &sans).expect("a request");
        let usages = ["digital signature".to_string(), "server auth".to_string()];
        let signed = pki.sign_csr(pem.as_bytes(), &usages, DAY).expect("signed");
        let pair = CertifiedKey::from_pem(&signed, key.as_bytes()).expect("the request's own key");
        assert!(pair.is_signed_by(pki.ca_pem()));
        assert_eq!(pair.sans(), sans.iter().cloned().collect());
        let identity = apiserver::auth::authenticate::from_certificate(&pair.chain[0]).expect("an identity");
        assert_eq!(identity.node(), Some("node-1"));
        let (_, parsed) = X509Certificate::from_der(&pair.chain[0]).expect("a certificate");
        assert!(!parsed.is_ca());
        let extended = parsed.extended_key_usage().expect("readable").expect("present").value;
        assert!(extended.server_auth && !extended.client_auth);
        assert!(pki.sign_csr(pem.as_bytes(), &["code signing".to_string()], DAY).is_err());
    }

    #[test]
    fn a_request_that_was_changed_is_refused() {
        let scratch = Scratch::new();
        let pki = Pki::open_or_create(&scratch.0).expect("an authority");
        let (_, pem) = request("system:node:node-1", "system:nodes", &[]).expect("a request");
        let mut der = CertificateSigningRequestDer::from_pem_slice(pem.as_bytes()).expect("DER").to_vec();
        let at = der.windows(6).position(|w| w == b"node-1").expect("the name");
        der[at + 5] = b'2';
        let changed = to_pem("CERTIFICATE REQUEST", &der);
        assert!(pki.sign_csr(changed.as_bytes(), &["client auth".to_string()], DAY).is_err());
        assert!(pki.sign_csr(b"not PEM", &["client auth".to_string()], DAY).is_err());
    }
}
