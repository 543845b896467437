//! The chains that pick an endpoint: frontends that differ only in their addresses share one.

use linux::nft::{ADDRESS_LOCAL, Datum, Rule, Statement, Value};

use sha2::{Digest, Sha256};

use super::layout::{Map, from_pods};
use crate::Pods;
use crate::dataplane::frame::count_rejected;

/// Which map says where a destination's endpoints are listed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Ids {
    Main,
    Local,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Pick {
    pub v6: bool,
    pub ids: Ids,
    /// How many endpoints there are; at least one.
    pub count: u32,
    /// Seconds of session affinity.
    pub affinity: Option<u32>,
}

/// A kind of frontend.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    Pick(Pick),
    /// `externalTrafficPolicy: Local`: the cluster's own traffic may go anywhere, the rest only to this node's own.
    External {
        anywhere: Pick,
        here: Option<Pick>,
    },
}

impl Pick {
    fn name(&self) -> String {
        let ids = match self.ids {
            Ids::Main => "pick",
            Ids::Local => "pick_local",
        };
        let sticky = self.affinity.map(|seconds| format!("_sticky_{seconds}")).unwrap_or_default();
        format!("{ids}{}_{}{sticky}", if self.v6 { 6 } else { 4 }, self.count)
    }

    fn parse(text: &str) -> Option<Self> {
        let rest = text.strip_prefix("pick")?;
        let (ids, rest) = match rest.strip_prefix("_local") {
            Some(rest) => (Ids::Local, rest),
            None => (Ids::Main, rest),
        };
        let (family, rest) = rest.split_once('_')?;
        let v6 = match family {
            "4" => false,
            "6" => true,
            _ => return None,
        };
        let (count, affinity) = match rest.split_once("_sticky_") {
            Some((count, seconds)) => (count, Some(seconds.parse().ok()?)),
            None => (rest, None),
        };
        Some(Pick { v6, ids, count: count.parse().ok()?, affinity })
    }

    fn rules(&self) -> Vec<Rule> {
        let v6 = self.v6;
        let name = |map: Map| map.name(v6);
        let ids = match self.ids {
            Ids::Main => Map::Ids,
            Ids::Local => Map::LocalIds,
        };
        let list = || Value::lookup(Value::destination(v6), &name(ids));
        let zero = || Value::Const(Datum::Mark(0));
        let number = || match self.count {
            1 => zero(),
            modulus => Value::Random { modulus },
        };
        let slot = |number, map| Statement::Choose(Value::lookup([zero(), list(), number], &name(map)));
        let mut rules = Vec::new();
        if let Some(timeout_seconds) = self.affinity {
            let client = || vec![zero(), list(), Value::SourceIp { v6 }];
            let map = || name(Map::Affinity).into();
            let endpoint = |number: &[Value]| {
                let key = [zero(), list()].into_iter().chain(number.iter().cloned());
                Statement::Choose(Value::lookup(key, &name(Map::Endpoints)))
            };
            let remembered = Statement::Choose(Value::lookup(client(), &name(Map::Affinity)));
            let refresh = Statement::Update { map: map(), key: client(), data: vec![zero(), zero()], timeout_seconds };
            // Holds only while the endpoint of that number lives.
            let same = endpoint(&[Value::Chosen { words: 2 }]);
            rules.push(Rule::new([Statement::of_family(v6), remembered, refresh, same, Statement::Dnat { v6 }]));
            let chosen = || vec![zero(), Value::Chosen { words: 1 }];
            // An update does not replace what a client whose endpoint died still has.
            let forget = Statement::Forget { map: map(), key: client(), data: chosen() };
            let remember = Statement::Update { map: map(), key: client(), data: chosen(), timeout_seconds };
            let another = slot(number(), Map::Numbers);
            rules.push(Rule::new([
                Statement::of_family(v6),
                another,
                forget,
                remember,
                endpoint(&chosen()),
                Statement::Dnat { v6 },
            ]));
        }
        rules.push(Rule::new([Statement::of_family(v6), slot(number(), Map::Slots), Statement::Dnat { v6 }]));
        // A packet that took the count of one commit earlier may ask for a slot that has gone: the first is never empty.
        if self.count > 1 {
            rules.push(Rule::new([Statement::of_family(v6), slot(zero(), Map::Slots), Statement::Dnat { v6 }]));
        }
        rules
    }
}

impl Class {
    pub fn name(&self) -> String {
        match self {
            Class::Pick(pick) => pick.name(),
            Class::External { anywhere, here } => {
                let here = here.map_or("none".to_owned(), |here| here.name());
                format!("external_{}_or_{here}", anywhere.name())
            }
        }
    }

    pub fn v6(&self) -> bool {
        match self {
            Class::Pick(pick) | Class::External { anywhere: pick, .. } => pick.v6,
        }
    }

    /// The class's number in maps: a hash of its name, so that a plan needs no memory of other plans.
    pub fn number(&self) -> u32 {
        let hash = Sha256::digest(self.name());
        u32::from_be_bytes([hash[0], hash[1], hash[2], hash[3]])
    }

    /// The class whose chain has this name.
    pub fn parse(name: &str) -> Option<Self> {
        let Some(rest) = name.strip_prefix("external_") else { return Pick::parse(name).map(Class::Pick) };
        let (anywhere, here) = rest.split_once("_or_")?;
        let here = match here {
            "none" => None,
            here => Some(Pick::parse(here)?),
        };
        Some(Class::External { anywhere: Pick::parse(anywhere)?, here })
    }

    /// Classes whose chains this one's rules name.
    pub fn needs(&self) -> Vec<Class> {
        match self {
            Class::Pick(_) => Vec::new(),
            Class::External { anywhere, here } => {
                [Some(*anywhere), *here].into_iter().flatten().map(Class::Pick).collect()
            }
        }
    }

    pub fn rules(&self, pods: &Pods) -> Vec<Rule> {
        let (anywhere, here) = match self {
            Class::Pick(pick) => return pick.rules(),
            Class::External { anywhere, here } => (anywhere, here),
        };
        let v6 = anywhere.v6;
        let short_circuit = || Statement::goto(&anywhere.name());
        let pods = from_pods(pods, v6).into_iter();
        let mut rules: Vec<Rule> =
            pods.map(|from_pod| Rule::new([Statement::of_family(v6), from_pod, short_circuit()])).collect();
        rules.push(Rule::new([Statement::Equal(Value::FibSourceType, Datum::Mark(ADDRESS_LOCAL)), short_circuit()]));
        rules.push(match here {
            Some(here) => Rule::new([Statement::goto(&here.name())]),
            None => Rule::new([count_rejected(v6), Statement::drop()]),
        });
        rules
    }
}
