//! What a controller has written and not yet seen.
//!
//! A cache lags behind the controller's own writes. Until it shows them, deciding again would create a second pod or
//! delete another one. Names of new objects are chosen here before they are sent, so that an expectation is always
//! older than the event that fulfils it.

use api::object::Key;
use std::collections::{BTreeSet, HashMap};
use std::hash::{BuildHasher, RandomState};
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// After this long a write that was never seen is forgotten.
pub const PATIENCE: Duration = Duration::from_secs(300);

#[derive(Default)]
pub struct Expectations {
    owners: Mutex<HashMap<Key, Expected>>,
}

struct Expected {
    created: BTreeSet<String>,
    deleted: BTreeSet<String>,
    until: Instant,
}

impl Expectations {
    fn change(&self, owner: &Key, change: impl FnOnce(&mut Expected)) {
        let mut owners = self.owners.lock().expect("no holder of this lock panics");
        let expected = owners.entry(owner.clone()).or_insert_with(|| Expected {
            created: BTreeSet::new(),
            deleted: BTreeSet::new(),
            until: Instant::now() + PATIENCE,
        });
        change(expected);
        if expected.created.is_empty() && expected.deleted.is_empty() {
            owners.remove(owner);
        }
    }

    pub fn expect_created(&self, owner: &Key, name: &str) {
        self.change(owner, |e| {
            e.until = Instant::now() + PATIENCE;
            e.created.insert(name.into());
        });
    }

    pub fn expect_deleted(&self, owner: &Key, uid: &str) {
        self.change(owner, |e| {
            e.until = Instant::now() + PATIENCE;
            e.deleted.insert(uid.into());
        });
    }

    /// The object is there, or creating it failed.
    pub fn saw_created(&self, owner: &Key, name: &str) {
        self.change(owner, |e| {
            e.created.remove(name);
        });
    }

    /// The object is gone or going, or deleting it failed.
    pub fn saw_deleted(&self, owner: &Key, uid: &str) {
        self.change(owner, |e| {
            e.deleted.remove(uid);
        });
    }

    /// Whether the cache shows all that was written for this owner.
    pub fn are_met(&self, owner: &Key) -> bool {
        let mut owners = self.owners.lock().expect("no holder of this lock panics");
        match owners.get(owner) {
            Some(expected) if expected.until > Instant::now() => false,
            Some(_) => {
                owners.remove(owner);
                true
            }
            None => true,
        }
    }

    pub fn forget(&self, owner: &Key) {
        self.owners.lock().expect("no holder of this lock panics").remove(owner);
    }
}

/// Letters and digits that spell no words: no vowels, nothing that looks like another.
const SAFE: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";

/// `BASE` and five random letters, as the API server makes names of `generateName`.
pub fn generated_name(base: &str) -> String {
    let mut random = RandomState::new().hash_one(std::process::id());
    let mut name = generate_base(base).to_string();
    for _ in 0..5 {
        let index = usize::try_from(random % 27).expect("below 27");
        name.push(char::from(SAFE[index]));
        random /= 27;
    }
    name
}

/// The base cut so that base and suffix are a label of at most 63 bytes.
fn generate_base(base: &str) -> &str {
    let mut end = base.len().min(58);
    while !base.is_char_boundary(end) {
        end -= 1;
    }
    &base[..end]
}

/// Any text in letters and digits that spell no words.
pub fn safe_encoded(text: &str) -> String {
    text.bytes().map(|b| char::from(SAFE[usize::from(b) % SAFE.len()])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_waits_for_exactly_what_it_wrote() {
        let (expectations, owner) = (Expectations::default(), Key::new("default", "web"));
        assert!(expectations.are_met(&owner));
        expectations.expect_created(&owner, "web-1");
        expectations.expect_deleted(&owner, "uid-7");
        expectations.saw_created(&owner, "web-9");
        expectations.saw_created(&owner, "web-1");
        assert!(!expectations.are_met(&owner));
        assert!(expectations.are_met(&Key::new("default", "other")));
        expectations.saw_deleted(&owner, "uid-7");
        assert!(expectations.are_met(&owner));
    }

    #[test]
    fn generated_names_differ_and_fit_a_label() {
        let (a, b) = (generated_name("web-"), generated_name("web-"));
        assert!(a.starts_with("web-") && a.len() == 9);
        assert_ne!(a, b);
        assert_eq!(generated_name(&"x".repeat(80)).len(), 63);
    }
}
