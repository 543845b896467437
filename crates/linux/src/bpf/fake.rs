//! Maps in memory, with the kernel's rules about sizes; one change in so many can fail half way.

use std::collections::BTreeMap;
use std::io;

use super::{Entries, Error, Kernel};

/// One map's name, and its sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub name: &'static str,
    pub key_size: usize,
    pub value_size: usize,
    pub limit: u32,
}

#[derive(Clone, Debug, Default)]
pub struct Fake {
    layouts: Vec<Layout>,
    maps: BTreeMap<&'static str, BTreeMap<Vec<u8>, Vec<u8>>>,
    changes: u64,
    fail_every: Option<u64>,
    /// Entries put and removed so far: what a test counts to see that a change stayed small.
    pub changed: u64,
}

impl Fake {
    pub fn new(layouts: &[Layout]) -> Self {
        Fake { layouts: layouts.to_vec(), ..Fake::default() }
    }

    /// Fails each `n`th change after its first half, so that the caller's retry is exercised.
    pub fn failing(layouts: &[Layout], n: u64) -> Self {
        Fake { fail_every: Some(n), ..Fake::new(layouts) }
    }

    pub fn get(&self, map: &str, key: &[u8]) -> Option<&[u8]> {
        self.maps.get(map)?.get(key).map(Vec::as_slice)
    }

    /// Keys and values of a map in the order of the keys' bytes.
    pub fn iter(&self, map: &str) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.maps.get(map).into_iter().flatten().map(|(key, value)| (key.as_slice(), value.as_slice()))
    }

    fn layout(&self, map: &str) -> Result<Layout, Error> {
        let known = self.layouts.iter().find(|layout| layout.name == map).copied();
        known.ok_or_else(|| Error::Map { map: map.into(), cause: io::ErrorKind::NotFound.into() })
    }

    /// How many of the entries a change gets through.
    fn luck(&mut self, entries: usize) -> usize {
        self.changes += 1;
        match self.fail_every {
            Some(n) if self.changes.is_multiple_of(n) => entries / 2,
            _ => entries,
        }
    }
}

fn failed(map: &str) -> Error {
    Error::Map { map: map.into(), cause: io::Error::from_raw_os_error(libc::ENOMEM) }
}

impl Kernel for Fake {
    fn about(&self) -> String {
        "eBPF maps in memory".into()
    }

    fn attach(&mut self) -> Result<(), Error> {
        Ok(())
    }

    fn namespace_cookie(&self) -> Result<u64, Error> {
        Ok(1)
    }

    fn mtu(&self) -> Result<u32, Error> {
        Ok(1_500)
    }

    fn entries(&mut self, map: &str) -> Result<Entries, Error> {
        self.layout(map)?;
        let mut entries = Entries::default();
        for (key, value) in self.iter(map) {
            entries.keys.extend_from_slice(key);
            entries.values.extend_from_slice(value);
        }
        Ok(entries)
    }

    fn put(&mut self, map: &str, entries: &Entries) -> Result<(), Error> {
        let layout = self.layout(map)?;
        let (keys, values) = (entries.keys.chunks(layout.key_size), entries.values.chunks(layout.value_size));
        let count = keys.len();
        if (count, count) != (entries.keys.len() / layout.key_size, values.len()) {
            return Err(Error::Map { map: map.into(), cause: io::Error::from_raw_os_error(libc::EINVAL) });
        }
        let luck = self.luck(count);
        for (key, value) in keys.zip(values).take(luck) {
            let held = self.maps.entry(layout.name).or_default();
            held.insert(key.to_vec(), value.to_vec());
            if held.len() > layout.limit as usize {
                held.remove(key);
                return Err(Error::Full { map: map.into(), limit: layout.limit });
            }
            self.changed += 1;
        }
        if luck == count { Ok(()) } else { Err(failed(map)) }
    }

    fn remove(&mut self, map: &str, keys: &[u8]) -> Result<(), Error> {
        let layout = self.layout(map)?;
        let keys = keys.chunks(layout.key_size);
        let count = keys.len();
        let luck = self.luck(count);
        for key in keys.take(luck) {
            self.maps.entry(layout.name).or_default().remove(key);
            self.changed += 1;
        }
        if luck == count { Ok(()) } else { Err(failed(map)) }
    }
}
