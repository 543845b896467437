//! IPVS in memory: under the kernel's rules, failing one operation in so many if asked to, and choosing a destination for a
//! packet.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

use nix::errno::Errno;

use super::value::{Connections, Destination, Key, Op, Service};
use super::{Error, Ipvs};

#[derive(Clone, Debug)]
struct Held {
    service: Service,
    destinations: BTreeMap<SocketAddr, (Destination, Connections)>,
}

/// A kernel that is only a map.
#[derive(Clone, Default)]
pub struct Fake {
    services: BTreeMap<Key, Held>,
    addresses: Option<BTreeSet<IpAddr>>,
    sysctls: BTreeMap<String, String>,
    operations: u64,
    fail_every: Option<u64>,
    /// Operations applied so far: what a test counts to see that a change stayed small.
    pub changed: u64,
}

impl Fake {
    /// Fails each `n`th operation, so that the caller's retry is exercised.
    pub fn failing(n: u64) -> Self {
        Fake { fail_every: Some(n), ..Fake::default() }
    }

    /// Everything held: equal texts are equal kernels.
    pub fn dump(&self) -> String {
        let mut text = String::new();
        for Held { service, destinations } in self.services.values() {
            text += &format!("-A {service}\n");
            for (destination, _) in destinations.values() {
                text += &format!("-a {} {destination}\n", service.key);
            }
        }
        for address in self.addresses.iter().flatten() {
            text += &format!("{address}\n");
        }
        for (name, value) in &self.sysctls {
            text += &format!("{name}={value}\n");
        }
        text
    }

    /// Gives a destination so many connections.
    pub fn connect(&mut self, key: &Key, address: SocketAddr, connections: Connections) {
        if let Some(held) = self.services.get_mut(key).and_then(|held| held.destinations.get_mut(&address)) {
            held.1 = connections;
        }
    }

    /// Whom the kernel would give a new client's packet to: `None` if it is to no virtual service, `Some(None)` if nobody is
    /// left. Each scheduler is even over new clients, so one draw among those with the weight for it stands for all of them.
    pub fn pick(&self, key: &Key, random: &mut dyn FnMut(u32) -> u32) -> Option<(&Service, Option<&Destination>)> {
        let held = self.services.get(key)?;
        let open: Vec<&Destination> = held
            .destinations
            .values()
            .filter(|(destination, connections)| {
                let limit = destination.upper_threshold;
                destination.weight > 0 && (limit == 0 || connections.active + connections.inactive < limit)
            })
            .map(|(destination, _)| destination)
            .collect();
        let chosen = match open.len() as u32 {
            0 | 1 => open.first(),
            count => open.get(random(count) as usize),
        };
        Some((&held.service, chosen.copied()))
    }

    fn try_apply(&mut self, op: &Op) -> Result<(), Errno> {
        let service = |services: &mut BTreeMap<Key, Held>, key: &Key| match services.contains_key(key) {
            true => Ok(()),
            false => Err(Errno::ESRCH),
        };
        match op {
            Op::AddService(new) => {
                if self.services.contains_key(&new.key) {
                    return Err(Errno::EEXIST);
                }
                self.services.insert(new.key, Held { service: new.clone(), destinations: BTreeMap::new() });
            }
            Op::SetService(new) => self.services.get_mut(&new.key).ok_or(Errno::ESRCH)?.service = new.clone(),
            Op::DeleteService(key) => {
                service(&mut self.services, key)?;
                self.services.remove(key);
            }
            Op::AddDestination(key, new) => {
                let held = self.services.get_mut(key).ok_or(Errno::ESRCH)?;
                if held.destinations.contains_key(&new.address) {
                    return Err(Errno::EEXIST);
                }
                held.destinations.insert(new.address, (new.clone(), Connections::default()));
            }
            Op::SetDestination(key, new) => {
                let held = self.services.get_mut(key).ok_or(Errno::ESRCH)?;
                held.destinations.get_mut(&new.address).ok_or(Errno::ENOENT)?.0 = new.clone();
            }
            Op::DeleteDestination(key, address) => {
                let held = self.services.get_mut(key).ok_or(Errno::ESRCH)?;
                held.destinations.remove(address).ok_or(Errno::ENOENT)?;
            }
            Op::Bind(address) => drop(self.addresses.as_mut().ok_or(Errno::ENODEV)?.insert(*address)),
            Op::Unbind(address) => drop(self.addresses.as_mut().ok_or(Errno::ENODEV)?.remove(address)),
            Op::SetTimeouts(_) => {}
        }
        Ok(())
    }
}

impl Ipvs for Fake {
    fn apply(&mut self, op: &Op) -> Result<(), Error> {
        self.operations += 1;
        if self.fail_every.is_some_and(|every| self.operations.is_multiple_of(every)) {
            return Err(Error::Injected);
        }
        self.try_apply(op).map_err(|errno| Error::Refused { op: op.to_string(), errno, hint: " (fake)" })?;
        self.changed += 1;
        Ok(())
    }

    fn services(&mut self) -> Result<Vec<Service>, Error> {
        Ok(self.services.values().map(|held| held.service.clone()).collect())
    }

    fn destinations(&mut self, of: &Key) -> Result<Vec<(Destination, Connections)>, Error> {
        let held = self.services.get(of).ok_or(Error::Query { doing: "list destinations", errno: Errno::ESRCH })?;
        Ok(held.destinations.values().cloned().collect())
    }

    fn addresses(&mut self) -> Result<Option<BTreeSet<IpAddr>>, Error> {
        Ok(self.addresses.clone())
    }

    fn prepare(&mut self, sysctls: &[(&str, &str)]) -> Result<(), Error> {
        self.addresses.get_or_insert_default();
        self.sysctls.extend(sysctls.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        Ok(())
    }

    fn remove_device(&mut self) -> Result<(), Error> {
        self.addresses = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::Scheduler;
    use super::*;

    #[test]
    fn it_says_no_where_the_kernel_does() {
        let key = Key { address: "10.0.0.1:80".parse().expect("address"), protocol: 6 };
        let service = Service { key, scheduler: Scheduler::RoundRobin, persistence: None, flags: 0 };
        let there = Destination::new("10.244.0.5:80".parse().expect("address"), 1);
        let mut fake = Fake::default();
        let errno = |result: Result<(), Error>| match result {
            Err(Error::Refused { errno, .. }) => Some(errno),
            _ => None,
        };
        assert_eq!(errno(fake.apply(&Op::AddDestination(key, there.clone()))), Some(Errno::ESRCH));
        fake.apply(&Op::AddService(service.clone())).expect("added");
        assert_eq!(errno(fake.apply(&Op::AddService(service))), Some(Errno::EEXIST));
        assert_eq!(errno(fake.apply(&Op::SetDestination(key, there.clone()))), Some(Errno::ENOENT));
        fake.apply(&Op::AddDestination(key, there.clone())).expect("added");
        assert_eq!(errno(fake.apply(&Op::AddDestination(key, there.clone()))), Some(Errno::EEXIST));
        assert_eq!(fake.pick(&key, &mut |_| 0).and_then(|(_, found)| found.cloned()), Some(there.clone()));
        fake.apply(&Op::SetDestination(key, Destination { weight: 0, ..there.clone() })).expect("set");
        assert_eq!(fake.pick(&key, &mut |_| 0).map(|(_, found)| found.is_none()), Some(true));
        assert_eq!(errno(fake.apply(&Op::Bind(there.address.ip()))), Some(Errno::ENODEV));
        fake.apply(&Op::DeleteService(key)).expect("deleted");
        assert!(fake.pick(&key, &mut |_| 0).is_none());
    }
}
