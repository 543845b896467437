//! Names and passwords (RFC 7617) as htpasswd writes them, from the Secret that an Ingress names.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use api::object::Key;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use http::HeaderValue;
use md5::{Digest, Md5};
use tokio::sync::Semaphore;

use crate::registry::Slot;

/// Hashes that take long are computed for so many requests at once.
const AT_ONCE: usize = 2;
/// Answers that are remembered.
const KNOWN: usize = 1024;
/// A longer header is nobody's.
const LONGEST: usize = 1024;

/// What a route asks of its clients.
#[derive(Debug)]
pub struct Basic {
    pub realm: Box<str>,
    pub secret: Key,
    /// `None` as long as there is no such Secret, or it makes no sense: then nobody is let in.
    pub users: Slot<Users>,
}

impl PartialEq for Basic {
    fn eq(&self, other: &Self) -> bool {
        self.realm == other.realm && self.secret == other.secret
    }
}

impl Basic {
    /// What is asked for when nothing or the wrong thing was said.
    pub fn challenge(&self) -> HeaderValue {
        let text = format!("Basic realm=\"{}\", charset=\"UTF-8\"", self.realm);
        HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static("Basic realm=\"\""))
    }
}

/// Who may come, and what each has to say.
#[derive(Debug)]
pub struct Users {
    all: HashMap<String, Hash>,
    /// What was found right, as digests: a hash that is slow by intent is computed once.
    known: Mutex<HashSet<[u8; 32]>>,
    slow: Semaphore,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Hash {
    /// `{SHA}`: SHA-1 without salt, in base64.
    Sha(Vec<u8>),
    /// `$apr1$` and `$1$`: a thousand rounds of MD5.
    Md5 { magic: &'static str, salt: String, digest: String },
    /// `$2y$` and its sisters.
    Bcrypt(String),
}

impl Users {
    /// Reads the data of a Secret: the key `auth` with lines of htpasswd, or each user as a key of its own.
    ///
    /// # Errors
    /// Says what is missing or wrong.
    pub fn read(data: &HashMap<String, String>) -> Result<Arc<Self>, String> {
        let text = |key: &str, value: &str| -> Result<String, String> {
            let bytes = BASE64.decode(value).map_err(|_| format!("has a {key} that is not base64"))?;
            String::from_utf8(bytes).map_err(|_| format!("has a {key} that is no text"))
        };
        let mut all = HashMap::new();
        match data.get("auth") {
            Some(file) => {
                for line in text("auth", file)?.lines().map(str::trim) {
                    if line.is_empty() || line.starts_with('#') {
                        continue;
                    }
                    let (user, hash) = line.split_once(':').ok_or("has a line in auth that is not user:hash")?;
                    all.insert(user.to_owned(), Hash::parse(user, hash)?);
                }
            }
            None => {
                for (user, hash) in data {
                    all.insert(user.clone(), Hash::parse(user, text(user, hash)?.trim())?);
                }
            }
        }
        match all.is_empty() {
            true => Err("names no user".to_owned()),
            false => Ok(Arc::new(Users { all, known: Mutex::default(), slow: Semaphore::new(AT_ONCE) })),
        }
    }

    /// Whether this Authorization header is right.
    pub async fn admit(self: &Arc<Self>, header: Option<&HeaderValue>) -> bool {
        let Some(credentials) = header.and_then(credentials) else { return false };
        let Some((user, password)) = credentials.split_once(':') else { return false };
        let Some(hash) = self.all.get(user) else { return false };
        let digest: [u8; 32] = sha256(credentials.as_bytes());
        if self.known.lock().unwrap_or_else(PoisonError::into_inner).contains(&digest) {
            return true;
        }
        let is_right = match hash {
            Hash::Bcrypt(_) => {
                let Ok(_turn) = self.slow.acquire().await else { return false };
                let (hash, password) = (hash.clone(), password.to_owned());
                // Tens of milliseconds: not on the thread that carries requests.
                tokio::task::spawn_blocking(move || hash.fits(&password)).await.unwrap_or(false)
            }
            _ => hash.fits(password),
        };
        if is_right {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            if known.len() >= KNOWN {
                known.clear();
            }
            known.insert(digest);
        }
        is_right
    }
}

fn credentials(header: &HeaderValue) -> Option<String> {
    let text = header.to_str().ok().filter(|text| text.len() <= LONGEST)?;
    let (scheme, encoded) = text.split_once(' ')?;
    let bytes = BASE64.decode(encoded.trim()).ok().filter(|_| scheme.eq_ignore_ascii_case("basic"))?;
    String::from_utf8(bytes).ok()
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    sha2::Sha256::digest(bytes).into()
}

impl Hash {
    fn parse(user: &str, text: &str) -> Result<Self, String> {
        let wrong = || format!("has a hash for {user} that is neither bcrypt, apr1 nor SHA; write it with htpasswd -B");
        if let Some(encoded) = text.strip_prefix("{SHA}") {
            return BASE64.decode(encoded).ok().filter(|hash| hash.len() == 20).map(Hash::Sha).ok_or_else(wrong);
        }
        for magic in ["$apr1$", "$1$"] {
            if let Some((salt, digest)) = text.strip_prefix(magic).and_then(|rest| rest.split_once('$')) {
                let salt = salt.get(..8).unwrap_or(salt);
                return Ok(Hash::Md5 { magic, salt: salt.to_owned(), digest: digest.to_owned() });
            }
        }
        let is_bcrypt = ["$2y$", "$2b$", "$2a$"].iter().any(|magic| text.starts_with(magic)) && text.len() == 60;
        is_bcrypt.then(|| Hash::Bcrypt(text.to_owned())).ok_or_else(wrong)
    }

    fn fits(&self, password: &str) -> bool {
        match self {
            Hash::Sha(digest) => is_same(&sha1::Sha1::digest(password.as_bytes()), digest),
            Hash::Md5 { magic, salt, digest } => {
                is_same(md5_crypt(password, magic, salt).as_bytes(), digest.as_bytes())
            }
            Hash::Bcrypt(hash) => bcrypt::verify(password, hash).unwrap_or(false),
        }
    }
}

/// In a time that does not tell how much of it is the same.
fn is_same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |seen, (a, b)| seen | (a ^ b)) == 0
}

/// The MD5 crypt of FreeBSD, which Apache has with a word of its own in front.
fn md5_crypt(password: &str, magic: &str, salt: &str) -> String {
    let (password, salt) = (password.as_bytes(), salt.as_bytes());
    let inner = Md5::new().chain_update(password).chain_update(salt).chain_update(password).finalize();
    let mut first = Md5::new().chain_update(password).chain_update(magic).chain_update(salt);
    for at in (0..password.len()).step_by(16) {
        first.update(&inner[..(password.len() - at).min(16)]);
    }
    let mut bits = password.len();
    while bits > 0 {
        first.update(if bits & 1 == 1 { &[0][..] } else { &password[..1] });
        bits >>= 1;
    }
    let mut hash = first.finalize();
    for round in 0..1000 {
        let mut next = Md5::new();
        next.update(if round & 1 == 1 { password } else { &hash[..] });
        if round % 3 != 0 {
            next.update(salt);
        }
        if round % 7 != 0 {
            next.update(password);
        }
        next.update(if round & 1 == 1 { &hash[..] } else { password });
        hash = next.finalize();
    }
    const DIGITS: &[u8; 64] = b"./0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    let mut out = String::with_capacity(22);
    let mut put = |mut number: u32, count: usize| {
        for _ in 0..count {
            out.push(char::from(DIGITS[number as usize & 63]));
            number >>= 6;
        }
    };
    for [a, b, c] in [[0, 6, 12], [1, 7, 13], [2, 8, 14], [3, 9, 15], [4, 10, 5]] {
        put(u32::from(hash[a]) << 16 | u32::from(hash[b]) << 8 | u32::from(hash[c]), 4);
    }
    put(u32::from(hash[11]), 2);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn users(lines: &str) -> Result<Arc<Users>, String> {
        Users::read(&HashMap::from([("auth".to_owned(), BASE64.encode(lines))]))
    }

    fn says(user: &str, password: &str) -> HeaderValue {
        let text = format!("Basic {}", BASE64.encode(format!("{user}:{password}")));
        HeaderValue::try_from(text).expect("a header")
    }

    #[tokio::test]
    async fn each_kind_of_hash_knows_its_password() {
        // Written by `openssl passwd -apr1` and `-1`, by htpasswd -s, and by htpasswd -B.
        let lines = "apr:$apr1$abcdefgh$h9FWgUz3n9YxylKLlR5SQ/\nlong:$apr1$xy$5fACeRpke.ZRvc4pSejwR/\none:$1$12345678$hj0uLpdidjPhbMMZeno8X/\nsha:{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=\nbcrypt:$2b$04$FvseDm55M0UWHPcLcXnAjOTiOToKW05lHAGIxP/dUN1pMtuBrCg.y\n";
        let users = users(lines).expect("users");
        for user in ["apr", "long", "one", "sha", "bcrypt"] {
            let password = if user == "long" { "a password of more than sixteen letters" } else { "secret" };
            for _ in 0..2 {
                assert!(users.admit(Some(&says(user, password))).await, "{user}");
            }
            for wrong in ["", "Secret", "secret ", "secret\0"] {
                assert!(!users.admit(Some(&says(user, wrong))).await, "{user}: {wrong:?}");
            }
        }
        assert!(!users.admit(Some(&says("nobody", "secret"))).await && !users.admit(None).await);
        for header in ["Bearer abc", "Basic", "Basic ???", "Basic YQ=="] {
            assert!(!users.admit(Some(&HeaderValue::from_static(header))).await, "{header}");
        }
    }

    #[test]
    fn what_is_no_hash_is_told_of() {
        for lines in ["", "a", "a:b", "a:$2y$05$short", "a:{SHA}x", "# nobody\n"] {
            assert!(users(lines).is_err(), "{lines:?}");
        }
        let map = HashMap::from([("ann".to_owned(), BASE64.encode("{SHA}5en6G6MezRroT3XKqkdPOmY/BfQ=\n"))]);
        assert!(Users::read(&map).is_ok_and(|users| users.all["ann"].fits("secret")));
    }
}
