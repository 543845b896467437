//! Who gets which address of the pools.
//!
//! A Service keeps what it has as long as that is allowed, so a restart changes nothing. Whoever fills a new allocator gives
//! those that hold addresses theirs before it serves others.

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use api::object::Key;

use crate::pool::{is_buggy, number, numbered};
use crate::{Pool, PoolError, Request};

/// What a Service was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Given {
    pub addresses: Vec<IpAddr>,
    pub pool: String,
}

/// Why a Service gets nothing. The text says what to do.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error("no pool has a free address for it: {0}; add an IPAddressPool or widen one")]
    Exhausted(String),
    #[error("there is no pool {0:?}; see `kubectl get ipaddresspools -A`")]
    NoSuchPool(String),
    #[error("pool {0:?} is not for this Service; see its spec.serviceAllocation")]
    NotForIt(String),
    #[error("address {0} is in no pool that this Service may use; see `kubectl get ipaddresspools -A`")]
    NotInPool(IpAddr),
    #[error(
        "address {address} belongs to {owner}; choose another, or let both have one value of the annotation metallb.io/allow-shared-ip, different ports and, with externalTrafficPolicy Local, the same selector"
    )]
    Taken { address: IpAddr, owner: String },
    #[error("the addresses asked for, {0}, are not one of each of its ipFamilies; ask for these")]
    Families(String),
}

impl Refusal {
    /// A word for an event and a condition.
    pub fn reason(&self) -> &'static str {
        match self {
            Refusal::Exhausted(_) => "AllocationFailed",
            Refusal::NoSuchPool(_) | Refusal::NotForIt(_) | Refusal::NotInPool(_) => "AddressNotAllowed",
            Refusal::Taken { .. } => "AddressConflict",
            Refusal::Families(_) => "AddressFamilyMismatch",
        }
    }
}

#[derive(Debug, Default)]
pub struct Allocator {
    pools: BTreeMap<String, Pool>,
    given: HashMap<Key, (Given, Request)>,
    users: HashMap<IpAddr, Vec<Key>>,
    /// For each pool and family: all ranges before this one, and this one before this address, are taken.
    cursors: HashMap<(String, bool), (usize, u128)>,
}

impl Allocator {
    /// Takes other pools. Services keep what they have; ask again for each.
    ///
    /// # Errors
    /// Those pools that overlap others, which are left out.
    pub fn set_pools(&mut self, pools: impl IntoIterator<Item = Pool>) -> Vec<(String, PoolError)> {
        self.pools.clear();
        self.cursors.clear();
        let mut errors = Vec::new();
        for pool in pools {
            match self.pools.values().find(|held| held.overlaps(&pool)) {
                Some(held) => errors.push((pool.name, PoolError::Overlap(held.name.clone()))),
                None => drop(self.pools.insert(pool.name.clone(), pool)),
            }
        }
        errors
    }

    pub fn pools(&self) -> impl Iterator<Item = &Pool> {
        self.pools.values()
    }

    pub fn given(&self, key: &Key) -> Option<&Given> {
        self.given.get(key).map(|(given, _)| given)
    }

    /// How many addresses of a pool are given away: of IPv4 and of IPv6.
    pub fn used(&self, pool: &str) -> (u64, u64) {
        let Some(pool) = self.pools.get(pool) else { return (0, 0) };
        self.users
            .keys()
            .filter(|address| pool.contains(**address))
            .fold((0, 0), |(four, six), address| if address.is_ipv4() { (four + 1, six) } else { (four, six + 1) })
    }

    /// Takes back what a Service has.
    pub fn release(&mut self, key: &Key) -> Option<Given> {
        let (given, _) = self.given.remove(key)?;
        for address in &given.addresses {
            if let Some(users) = self.users.get_mut(address) {
                users.retain(|user| user != key);
                if users.is_empty() {
                    self.users.remove(address);
                }
            }
        }
        // What is free again may lie before where we look.
        self.cursors.retain(|(pool, _), _| *pool != given.pool);
        Some(given)
    }

    /// Gives a Service what it asks for; what it has already it keeps if that is still allowed.
    ///
    /// # Errors
    /// Says why it has nothing now.
    pub fn assign(&mut self, request: Request) -> Result<Given, Refusal> {
        if let Some((given, known)) = self.given.get(&request.key) {
            let asks_the_same =
                Request { held: Vec::new(), ..known.clone() } == Request { held: Vec::new(), ..request.clone() };
            if asks_the_same
                && self
                    .pools
                    .get(&given.pool)
                    .is_some_and(|pool| pool.is_for(&request) && given.addresses.iter().all(|a| pool.contains(*a)))
            {
                return Ok(given.clone());
            }
        }
        let had = self.release(&request.key).map(|given| given.addresses);
        let keeps = had.unwrap_or_else(|| request.held.clone());
        let given = self.choose(&request, &keeps)?;
        for address in &given.addresses {
            self.users.entry(*address).or_default().push(request.key.clone());
        }
        self.given.insert(request.key.clone(), (given.clone(), request));
        Ok(given)
    }

    fn choose(&mut self, request: &Request, keeps: &[IpAddr]) -> Result<Given, Refusal> {
        if !request.wanted.is_empty() {
            return self.exactly(request, &request.wanted);
        }
        // Kept while the pool it came from is one that it may be given by itself or asks for.
        if let Ok(given) = self.exactly(request, keeps)
            && !keeps.is_empty()
            && request.pool.as_ref().is_none_or(|pool| *pool == given.pool)
        {
            return Ok(given);
        }
        let candidates = self.candidates(request)?;
        let mut why = Vec::new();
        for name in candidates {
            match self.any_of(request, &name) {
                Some(given) => return Ok(given),
                None => why.push(format!("{name} is full or lacks an address family")),
            }
        }
        Err(Refusal::Exhausted(if why.is_empty() { "there is none for this Service".into() } else { why.join(", ") }))
    }

    /// The pools that it may be given addresses of, best first.
    fn candidates(&self, request: &Request) -> Result<Vec<String>, Refusal> {
        if let Some(name) = &request.pool {
            let pool = self.pools.get(name).ok_or_else(|| Refusal::NoSuchPool(name.clone()))?;
            return if pool.is_for(request) { Ok(vec![name.clone()]) } else { Err(Refusal::NotForIt(name.clone())) };
        }
        let mut all: Vec<&Pool> = self.pools.values().filter(|pool| pool.auto_assign && pool.is_for(request)).collect();
        // Those made for it come first, then by priority, then by name.
        all.sort_by_key(|pool| (pool.only.is_none(), pool.priority == 0, pool.priority, pool.name.clone()));
        Ok(all.into_iter().map(|pool| pool.name.clone()).collect())
    }

    /// These addresses and no others.
    fn exactly(&self, request: &Request, addresses: &[IpAddr]) -> Result<Given, Refusal> {
        let families: Vec<bool> = addresses.iter().map(IpAddr::is_ipv4).collect();
        let text = || addresses.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ");
        let twice = families.len() > 1 && families[0] == families[1];
        let is_short = request.needs_all && families.len() < request.families.len();
        if families.len() > 2 || twice || is_short || families.iter().any(|f| !request.families.contains(f)) {
            return Err(Refusal::Families(text()));
        }
        let mut name = None;
        for address in addresses {
            let pool = self.pools.values().find(|pool| pool.contains(*address) && pool.is_for(request));
            let pool = pool.ok_or(Refusal::NotInPool(*address))?;
            if let Some(owner) = self.conflict(request, *address) {
                return Err(Refusal::Taken { address: *address, owner });
            }
            name.get_or_insert_with(|| pool.name.clone());
        }
        Ok(Given { addresses: addresses.to_vec(), pool: name.unwrap_or_default() })
    }

    /// A free address of each family.
    fn any_of(&mut self, request: &Request, name: &str) -> Option<Given> {
        let mut addresses = Vec::new();
        if let Some(shared) = self.shared(request, name) {
            return Some(Given { addresses: shared, pool: name.to_owned() });
        }
        for v4 in &request.families {
            addresses.extend(self.free(name, *v4));
        }
        let enough = if request.needs_all { addresses.len() == request.families.len() } else { !addresses.is_empty() };
        enough.then(|| Given { addresses, pool: name.to_owned() })
    }

    /// What others with its sharing key have in this pool and it can have with them.
    fn shared(&self, request: &Request, name: &str) -> Option<Vec<IpAddr>> {
        request.sharing.as_ref()?;
        let mut fits: Vec<&Vec<IpAddr>> = self
            .given
            .values()
            .filter(|(given, other)| given.pool == name && other.sharing == request.sharing)
            .map(|(given, _)| &given.addresses)
            .filter(|addresses| self.exactly(request, addresses).is_ok() && addresses.len() == request.families.len())
            .collect();
        fits.sort();
        fits.first().map(|addresses| (*addresses).clone())
    }

    /// The lowest free address.
    fn free(&mut self, name: &str, v4: bool) -> Option<IpAddr> {
        let pool = self.pools.get(name)?;
        let (from, mut next) = self.cursors.get(&(name.to_owned(), v4)).copied().unwrap_or_default();
        for (index, (first, last)) in pool.ranges.iter().enumerate().skip(from).filter(|(_, r)| r.0.is_ipv4() == v4) {
            let (mut at, last) = (next.max(number(*first)), number(*last));
            next = 0;
            while at <= last {
                let address = numbered(at, v4);
                let is_avoided = pool.avoids_buggy && is_buggy(address);
                if !is_avoided && !self.users.contains_key(&address) {
                    self.cursors.insert((name.to_owned(), v4), (index, at));
                    return Some(address);
                }
                at = at.checked_add(1)?;
            }
        }
        None
    }

    /// Who has the address and cannot share it with this Service.
    fn conflict(&self, request: &Request, address: IpAddr) -> Option<String> {
        let others = self.users.get(&address)?.iter().filter(|user| **user != request.key);
        let mut others = others.filter_map(|user| self.given.get(user).map(|(_, other)| (user, other)));
        let cannot = |other: &Request| {
            other.sharing.is_none()
                || other.sharing != request.sharing
                || !other.ports.is_disjoint(&request.ports)
                || other.backend != request.backend
        };
        others.find(|(_, other)| cannot(other)).map(|(user, _)| format!("{}/{}", user.namespace, user.name))
    }
}
