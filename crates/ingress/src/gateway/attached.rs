//! Which routes are at which listeners of a Gateway. A change of one route costs its own hosts, however many others there are.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use api::object::Key;

use super::RouteType;
use super::attach::{attach, means};
use super::condition::Problem;
use super::listeners::{Held, Owner, World};
use super::objects::{AnyRoute, Reference};
use super::ports::StreamRoute;
use super::rules::Translated;
use crate::host::HostPattern;
use crate::route::Route;
use crate::table::{PathTable, RouteTable};

/// A route, by its kind and name.
pub type Place = (RouteType, Key);
/// A host of a listener, by the listener's place among those of its Gateway.
pub type Spot = (usize, HostPattern);

/// A route that wants a host, in the order in which they count: the older first, those of one second by name.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Claim {
    created: Option<String>,
    namespace: String,
    name: String,
    kind: RouteType,
}

impl Claim {
    fn place(&self) -> Place {
        (self.kind, Key::new(self.namespace.clone(), self.name.clone()))
    }
}

/// One parentRef: the hosts that it comes to, or why there are none.
struct Parent {
    reference: Reference,
    spots: Result<Vec<Spot>, Problem>,
}

/// All routes of one Gateway.
pub struct Attached {
    /// The Gateway and its ListenerSets.
    owners: BTreeSet<Owner>,
    routes: BTreeMap<Place, (Claim, Vec<Parent>)>,
    /// By listener.
    hosts: Vec<BTreeMap<HostPattern, BTreeSet<Claim>>>,
    /// By listener: in how many hosts a route is.
    inside: Vec<HashMap<Place, usize>>,
    /// By listener: what HTTP requests are routed by.
    pub tables: Vec<Arc<RouteTable>>,
    /// By listener: where everything else goes.
    pub streams: Vec<BTreeMap<HostPattern, Arc<StreamRoute>>>,
}

impl Attached {
    pub fn new(owners: BTreeSet<Owner>, listeners: usize) -> Self {
        Attached {
            owners,
            routes: BTreeMap::new(),
            hosts: vec![BTreeMap::new(); listeners],
            inside: vec![HashMap::new(); listeners],
            tables: vec![Arc::default(); listeners],
            streams: vec![BTreeMap::new(); listeners],
        }
    }

    /// Makes the hosts what one route says now; `None`: it is gone. What has to be settled then is added to `touched`. Says
    /// whether the route is or was one of this Gateway's.
    pub fn put(
        &mut self,
        world: &World<'_>,
        listeners: &[Held],
        place: &Place,
        route: Option<(&AnyRoute, &Translated)>,
        touched: &mut BTreeSet<Spot>,
    ) -> bool {
        let before = self.routes.remove(place);
        let was_ours = before.is_some();
        if let Some((claim, parents)) = before {
            for (at, host) in parents.into_iter().filter_map(|parent| parent.spots.ok()).flatten() {
                if let Some(claims) = self.hosts[at].get_mut(&host) {
                    claims.remove(&claim);
                }
                touched.insert((at, host));
            }
        }
        let Some((route, translated)) = route.filter(|(route, _)| route.metadata.deletion_timestamp.is_none()) else {
            return was_ours;
        };
        let namespace = &route.metadata.namespace;
        let is_ours =
            |parent: &&Reference| self.owners.iter().any(|owner| means(parent, namespace, owner.kind, &owner.key));
        let ours: Vec<Reference> = route.spec.parent_refs.iter().filter(is_ours).cloned().collect();
        if ours.is_empty() {
            return was_ours;
        }
        let claim = Claim {
            created: route.metadata.creation_timestamp.clone(),
            namespace: namespace.clone(),
            name: route.metadata.name.clone(),
            kind: place.0,
        };
        let mut parents = Vec::new();
        for reference in ours {
            let spots = match &translated.not_accepted {
                Some(problem) => Err(problem.clone()),
                None => attach(world, place.0, route, &reference, listeners),
            };
            for (at, host) in spots.iter().flatten() {
                self.hosts[*at].entry(host.clone()).or_default().insert(claim.clone());
                touched.insert((*at, host.clone()));
            }
            parents.push(Parent { reference, spots });
        }
        self.routes.insert(place.clone(), (claim, parents));
        true
    }

    /// Brings the tables of these hosts up to date, and returns the routes for which something may be another now.
    pub fn settle(
        &mut self,
        touched: &BTreeSet<Spot>,
        translated: &HashMap<Place, Arc<Translated>>,
        changed: &BTreeSet<Place>,
    ) -> BTreeSet<Place> {
        let mut concerned = BTreeSet::new();
        for (at, host) in touched {
            let claims = self.hosts[*at].get(host);
            let first = claims.and_then(BTreeSet::first).map(|claim| claim.kind);
            let mut routes: Vec<Arc<Route>> = Vec::new();
            let mut stream = None;
            // Of HTTPRoute and GRPCRoute the older has the host, with all others of its kind.
            for claim in claims.into_iter().flatten().filter(|claim| Some(claim.kind) == first) {
                if let Some(held) = translated.get(&claim.place()) {
                    routes.extend(held.routes.iter().cloned());
                    stream = stream.or_else(|| held.stream.clone());
                }
            }
            concerned.extend(claims.into_iter().flatten().map(Claim::place));
            if claims.is_some_and(BTreeSet::is_empty) {
                self.hosts[*at].remove(host);
            }
            let paths = (!routes.is_empty()).then(|| Arc::new(PathTable::new(routes)));
            Arc::make_mut(&mut self.tables[*at]).set(host, paths);
            match stream {
                Some(stream) => drop(self.streams[*at].insert(host.clone(), stream)),
                None => drop(self.streams[*at].remove(host)),
            }
        }
        concerned.extend(changed.iter().cloned());
        for place in &concerned {
            self.count(place);
        }
        concerned
    }

    /// Counts at how many hosts of each listener a route is.
    fn count(&mut self, place: &Place) {
        for inside in &mut self.inside {
            inside.remove(place);
        }
        let Some((_, parents)) = self.routes.get(place) else { return };
        let spots: BTreeSet<&Spot> = parents.iter().filter_map(|parent| parent.spots.as_ref().ok()).flatten().collect();
        for (at, host) in spots {
            if self.has(*at, host, place.0) {
                *self.inside[*at].entry(place.clone()).or_default() += 1;
            }
        }
    }

    /// Whether routes of this kind have the host.
    fn has(&self, at: usize, host: &HostPattern, kind: RouteType) -> bool {
        self.hosts[at].get(host).and_then(BTreeSet::first).is_some_and(|first| first.kind == kind)
    }

    /// Routes that are at a listener.
    pub fn count_at(&self, listener: usize) -> usize {
        self.inside[listener].len()
    }

    pub fn places(&self) -> impl Iterator<Item = &Place> {
        self.routes.keys()
    }

    /// What became of each parentRef of a route that means this Gateway.
    pub fn results(&self, place: &Place) -> Vec<(&Reference, Result<(), Problem>)> {
        let parents = self.routes.get(place).map(|(_, parents)| parents.as_slice()).unwrap_or_default();
        let result = |parent: &Parent| match &parent.spots {
            Err(problem) => Err(problem.clone()),
            Ok(spots) if spots.iter().any(|(at, host)| self.has(*at, host, place.0)) => Ok(()),
            Ok(_) => {
                let other = if place.0 == RouteType::Http { "GRPCRoute" } else { "HTTPRoute" };
                let message = format!("its hosts belong to an older {other} of the same listener");
                Err(Problem::new("HostnameConflict", message))
            }
        };
        parents.iter().map(|parent| (&parent.reference, result(parent))).collect()
    }
}
