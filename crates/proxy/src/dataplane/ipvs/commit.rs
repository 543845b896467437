//! Reads what the kernel holds and takes the steps to what is wanted.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use linux::ipvs::{DEVICE, Ipvs as Kernel, Key as ServerKey, Op, Timeouts};
use linux::nft::{self, Chain, Datum, Fate, Nft, Packet, Transaction};
use services::{Frontend, Seed};

use super::claims::Claims;
use super::held::{ElementChange, Held, Steps};
use super::layout::{Base, FAMILY, Map, TABLE};
use super::plan::{Entries, Server, entries};
use super::retire;
use crate::dataplane::{Change, Dataplane};
use crate::{Error, NodeView};

/// How often connections to endpoints that have gone are counted, while there are some: IPVS tells nobody when the last one
/// closes.
pub(crate) const DRAIN: Duration = Duration::from_secs(5);

/// Services in IPVS, through the kernel or the fakes of it.
pub struct Ipvs<I, N> {
    ipvs: I,
    nft: N,
    base: Option<Base>,
    /// The layout mark found in the kernel by `read`.
    found_mark: Option<String>,
    claims: Claims,
    held: Held,
    /// A step failed: `held` may be wrong, and is read again before the next one.
    lost: bool,
}

/// What the table is like once the transaction is committed that lays it.
#[derive(Clone, Copy, PartialEq)]
enum Laid {
    Whole,
    /// The closing rules are missing until all Services are there: whoever serves them now goes on until then.
    Open {
        /// The elements went with the old table.
        is_new: bool,
    },
}

impl<I: Kernel, N: Nft> Ipvs<I, N> {
    pub fn new(ipvs: I, nft: N) -> Self {
        Ipvs { ipvs, nft, base: None, found_mark: None, claims: Claims::default(), held: Held::default(), lost: false }
    }

    /// The kernel behind it.
    pub fn kernel(&mut self) -> (&mut I, &mut N) {
        (&mut self.ipvs, &mut self.nft)
    }

    fn read_held(&mut self) -> Result<(), Error> {
        (self.held, self.found_mark) = read(&mut self.ipvs, &mut self.nft)?;
        Ok(())
    }

    fn apply(&mut self, ops: Vec<Op>) -> Result<(), Error> {
        for op in ops {
            self.ipvs.apply(&op)?;
            self.held.done(&op);
        }
        Ok(())
    }

    fn write(&mut self, changes: Vec<ElementChange>, mut transaction: Transaction) -> Result<(), Error> {
        self.held.write(&changes, &mut transaction);
        if transaction.is_empty() {
            return Ok(());
        }
        self.nft.commit(&transaction)?;
        self.held.written(changes);
        Ok(())
    }

    /// `base` is the transaction that lays the table.
    fn take(&mut self, steps: Steps, base: Transaction) -> Result<(), Error> {
        self.write(steps.marks, base)?;
        self.apply(steps.first)?;
        self.write(steps.elements, Held::transaction())?;
        self.apply(steps.bind)?;
        self.apply(steps.unbind)?;
        let retired: Vec<(ServerKey, SocketAddr)> = steps
            .last
            .iter()
            .filter_map(|op| match op {
                Op::SetDestination(key, destination) => Some((*key, destination.address)),
                _ => None,
            })
            .collect();
        self.apply(steps.last)?;
        self.write(steps.last_elements, Held::transaction())?;
        self.held.draining.extend(retired.iter().copied());
        self.drain(&retired.into_iter().map(|(key, _)| key).collect())
    }

    /// Removes destinations of these servers that have no connection left.
    fn drain(&mut self, of: &BTreeSet<ServerKey>) -> Result<(), Error> {
        let mut idle = Vec::new();
        for key in of {
            for (destination, connections) in self.ipvs.destinations(key)? {
                if connections.is_idle() && self.held.draining.contains(&(*key, destination.address)) {
                    idle.push(Op::DeleteDestination(*key, destination.address));
                }
            }
        }
        self.apply(idle)
    }

    /// Makes the kernel's table this base's.
    fn lay(&self, base: &Base, transaction: &mut Transaction) -> Laid {
        let (mark, opening) = (base.mark(), base.opening_mark());
        let held = self.base.as_ref().map(Base::mark).or(self.found_mark.clone());
        match held {
            Some(held) if held == mark => Laid::Whole,
            // An earlier attempt got no further.
            Some(held) if held == opening => Laid::Open { is_new: false },
            // Only rules are replaced, in place, so that translated connections live on.
            Some(held) if base.has_frame_of(&held) => {
                for (chain, _) in &base.chains {
                    transaction.push(nft::Op::FlushChain(chain.name.clone()));
                }
                base.fill(transaction);
                transaction.push(nft::Op::DeleteChain(held.into()));
                transaction.push(nft::Op::AddChain(Chain::regular(&mark)));
                Laid::Whole
            }
            _ => {
                let table = || nft::Op::AddTable {
                    comment: Some("Services beside IPVS, by fairlead: changes here are lost".into()),
                };
                transaction.push(table());
                transaction.push(nft::Op::DeleteTable);
                transaction.push(table());
                base.declare(transaction);
                base.open(transaction);
                transaction.push(nft::Op::AddChain(Chain::regular(&opening)));
                Laid::Open { is_new: true }
            }
        }
    }

    fn commit_once(&mut self, base: Option<&Base>, changes: &[Change<Entries>]) -> Result<(), Error> {
        if std::mem::take(&mut self.lost) {
            self.base = None;
            if let Err(error) = self.read_held() {
                self.lost = true;
                return Err(error);
            }
            // Whatever the last attempt did is looked at, too.
            self.attempt(base, changes, true)
        } else {
            self.attempt(base, changes, base.is_some())
        }
    }

    fn attempt(&mut self, base: Option<&Base>, changes: &[Change<Entries>], everything: bool) -> Result<(), Error> {
        let mut transaction = Held::transaction();
        let mut laid = Laid::Whole;
        if let Some(base) = base {
            self.ipvs.prepare(&base.sysctls)?;
            if base.timeouts != Timeouts::default() {
                self.ipvs.apply(&Op::SetTimeouts(base.timeouts))?;
            }
            laid = self.lay(base, &mut transaction);
            if laid == (Laid::Open { is_new: true }) {
                self.held.elements.clear();
            }
        }
        let mut touched = self.claims.touch(changes, base.is_some());
        if everything {
            touched.include(self.held.items().iter(), &self.claims);
            touched.include(self.claims.items(), &self.claims);
        }
        // An earlier attempt may have got no further than the server itself.
        self.held.adopt(&touched);
        let steps = self.held.steps(&touched);
        self.take(steps, transaction)?;
        if let (Some(base), Laid::Open { .. }) = (base, laid) {
            let mut transaction = Held::transaction();
            base.close(&mut transaction);
            transaction.push(nft::Op::DeleteChain(base.opening_mark().into()));
            transaction.push(nft::Op::AddChain(Chain::regular(&base.mark())));
            self.nft.commit(&transaction)?;
        }
        self.claims.settle(touched);
        if let Some(base) = base {
            self.base = Some(base.clone());
        }
        Ok(())
    }
}

impl<I: Kernel + 'static, N: Nft + 'static> Dataplane for Ipvs<I, N> {
    type Base = Base;
    type Entries = Entries;

    fn base(node: &NodeView) -> Base {
        Base::new(node)
    }

    fn entries(frontend: &Frontend, node: &NodeView) -> Entries {
        entries(frontend, node)
    }

    fn about(&self) -> String {
        format!("ipvs, `ipvsadm -Ln`, `ip address show {DEVICE}` and `nft list table {FAMILY} {TABLE}`")
    }

    /// Ids and slots leave no trace in IPVS.
    fn read(&mut self) -> Result<Seed, Error> {
        self.base = None;
        self.claims = Claims::default();
        self.read_held()?;
        self.lost = false;
        Ok(Seed::default())
    }

    fn commit(&mut self, base: Option<&Base>, changes: &[Change<Entries>]) -> Result<(), Error> {
        let done = self.commit_once(base, changes);
        self.lost |= done.is_err();
        done
    }

    fn tend(&mut self) -> Result<Option<Duration>, Error> {
        let servers: BTreeSet<ServerKey> = self.held.draining.iter().map(|(key, _)| *key).collect();
        if let Err(error) = self.drain(&servers) {
            self.lost = true;
            return Err(error);
        }
        Ok((!self.held.draining.is_empty()).then_some(DRAIN))
    }
}

impl Ipvs<linux::ipvs::Fake, nft::Fake> {
    /// Walks a packet through the plan, on a node whose own addresses are `locals`; notes what decided.
    pub fn explain(
        &mut self,
        packet: Packet,
        locals: &[IpAddr],
        random: &mut dyn FnMut(u32) -> u32,
        log: &mut Vec<String>,
    ) -> Fate {
        let mut all = locals.to_vec();
        all.extend(&self.held.addresses);
        let ipvs = &self.ipvs;
        let mut divert = |packet: &Packet, random: &mut dyn FnMut(u32) -> u32, log: &mut Vec<String>| {
            let key = ServerKey { address: packet.to, protocol: packet.protocol };
            let (service, chosen) = ipvs.pick(&key, random)?;
            log.push(format!("ipvs: {service}"));
            log.extend(chosen.iter().map(|destination| format!("    {destination}")));
            Some(chosen.map(|destination| destination.address))
        };
        self.nft.explain_with(packet, &all, random, log, &mut divert)
    }
}

fn server_key(key: &nft::Key) -> Option<ServerKey> {
    let [address, Datum::Proto(protocol), Datum::Port(port)] = &key.0[..] else { return None };
    let address: IpAddr = match address {
        Datum::V4(address) => (*address).into(),
        Datum::V6(address) => (*address).into(),
        _ => return None,
    };
    Some(ServerKey { address: SocketAddr::new(address, *port), protocol: *protocol })
}

/// What the kernel holds of ours, and the layout mark of the table.
pub(super) fn read(ipvs: &mut impl Kernel, nft: &mut impl Nft) -> Result<(Held, Option<String>), Error> {
    let mut held = Held::default();
    let mut mark = None;
    if nft.table_comment(FAMILY, TABLE)?.is_some() {
        mark = nft.chains(FAMILY, TABLE)?.into_iter().find(|chain| chain.starts_with(Base::MARK));
    }
    // Sets of another layout would be misread, and go with their table.
    let maps: &[Map] = match &mark {
        Some(mark) if mark == retire::MARK => &retire::MAPS,
        Some(mark) if Base::new(&NodeView::default()).has_frame_of(mark) => &Map::ALL,
        _ => &[],
    };
    for (map, v6) in maps.iter().flat_map(|map| [(*map, false), (*map, true)]) {
        for element in nft.elements(FAMILY, TABLE, &map.set(v6))? {
            held.elements.insert((map, v6, element.key, element.end), element.data);
        }
    }
    held.addresses = ipvs.addresses()?.unwrap_or_default();
    let served = held.elements.keys().filter(|(map, ..)| *map == Map::Served);
    let served: BTreeSet<ServerKey> = served.filter_map(|(_, _, key, _)| server_key(key)).collect();
    for service in ipvs.services()? {
        let key = service.key;
        let ours = served.contains(&key) || held.addresses.contains(&key.address.ip());
        let servers = if ours { &mut held.servers } else { &mut held.foreign };
        let destinations = ipvs.destinations(&key)?.into_iter();
        let destinations = destinations.map(|(there, _)| (there.address, there)).collect();
        servers.insert(key, Server { service, destinations });
    }
    Ok((held, mark))
}

/// Our servers, their destinations and addresses, as commands that would make them. What only drains is left out.
pub fn lines(ipvs: &mut impl Kernel, nft: &mut impl Nft) -> Result<BTreeSet<String>, Error> {
    let (held, _) = read(ipvs, nft)?;
    let mut lines: BTreeSet<String> = held.addresses.iter().map(|address| Op::Bind(*address).to_string()).collect();
    for (key, server) in &held.servers {
        lines.insert(format!("ipvsadm {}", Op::AddService(server.service.clone())));
        let open = server.destinations.values().filter(|destination| destination.weight > 0);
        lines.extend(open.map(|destination| format!("ipvsadm {}", Op::AddDestination(*key, destination.clone()))));
    }
    Ok(lines)
}

/// Takes our servers, the interface and the table out at once, and cuts their connections; whether anything was there.
pub fn remove(ipvs: &mut impl Kernel, nft: &mut impl Nft) -> Result<bool, Error> {
    let (held, _) = read(ipvs, nft)?;
    let has_device = ipvs.addresses()?.is_some();
    for key in held.servers.keys() {
        ipvs.apply(&Op::DeleteService(*key))?;
    }
    ipvs.remove_device()?;
    let has_table = nft.table_comment(FAMILY, TABLE)?.is_some();
    if has_table {
        nft.commit(&Transaction { family: FAMILY, table: TABLE.into(), ops: vec![nft::Op::DeleteTable] })?;
    }
    Ok(has_device || has_table)
}
