//! From a request to its route: by host in one look, by path in one look for each element of it, however many there are.

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use http::header::HeaderName;

use crate::gateway::StreamRoute;
use crate::host::HostPattern;
use crate::route::{Action, Ask, Backends, Canary, Matches, PathMatch, Route, ValueMatch, WeightedBackend};

/// Every route of one entry. Replaced as a whole; the parts of hosts that did not change are shared with the one before.
#[derive(Clone, Debug, Default)]
pub struct RouteTable {
    exact: HashMap<Arc<str>, Arc<PathTable>>,
    one_label: HashMap<Arc<str>, Arc<PathTable>>,
    suffix: HashMap<Arc<str>, Arc<PathTable>>,
    any: Option<Arc<PathTable>>,
    /// When nothing else matches.
    default: Option<Arc<Route>>,
    /// Hosts whose clients are asked for a certificate.
    asking: usize,
    /// Hosts whose connections over TLS go to endpoints as they are.
    passing: usize,
}

impl RouteTable {
    /// Replaces the routes of one host; none take it away.
    pub fn set(&mut self, host: &HostPattern, paths: Option<Arc<PathTable>>) {
        let asks = |paths: Option<&Arc<PathTable>>| usize::from(paths.is_some_and(|paths| paths.asks()));
        let passes = |paths: Option<&Arc<PathTable>>| usize::from(paths.is_some_and(|paths| paths.passing.is_some()));
        self.asking += asks(paths.as_ref());
        self.passing += passes(paths.as_ref());
        let (map, name) = match host {
            HostPattern::Exact(name) => (&mut self.exact, name),
            HostPattern::OneLabel(name) => (&mut self.one_label, name),
            HostPattern::Suffix(name) => (&mut self.suffix, name),
            HostPattern::Any => {
                let before = std::mem::replace(&mut self.any, paths);
                self.asking -= asks(before.as_ref());
                self.passing -= passes(before.as_ref());
                return;
            }
        };
        let before = match paths {
            Some(paths) => map.insert(name.clone(), paths),
            None => map.remove(name),
        };
        self.asking -= asks(before.as_ref());
        self.passing -= passes(before.as_ref());
    }

    /// Connections for some names are not for us to take the TLS off.
    pub fn passes_any(&self) -> bool {
        self.passing > 0
    }

    /// Where connections for this name go as they are.
    pub fn passes(&self, name: &str) -> Option<&Arc<StreamRoute>> {
        self.of_name(name)?.passing.as_ref()
    }

    pub fn streams(&self) -> impl Iterator<Item = &Arc<StreamRoute>> {
        self.exact.values().chain(self.one_label.values()).filter_map(|paths| paths.passing.as_ref())
    }

    /// The host that a handshake is for.
    fn of_name(&self, name: &str) -> Option<&Arc<PathTable>> {
        let one_label = || name.split_once('.').and_then(|(_, rest)| self.one_label.get(rest));
        self.exact.get(name).or_else(one_label).or(self.any.as_ref())
    }

    /// Clients of any name are asked for a certificate.
    pub fn asks_anybody(&self) -> bool {
        self.asking > 0 || asks(self.default.as_ref())
    }

    /// Clients who make a connection for this name are asked for a certificate.
    pub fn asks(&self, name: &str) -> bool {
        self.of_name(name).map_or_else(|| asks(self.default.as_ref()), |paths| paths.asks())
    }

    pub fn set_default(&mut self, route: Option<Arc<Route>>) {
        self.default = route;
    }

    /// The route of the most exact host that has one for the request: a host without a fitting path leaves it to the next.
    pub fn find(&self, ask: &Ask<'_>) -> Option<&Arc<Route>> {
        let exact = self.exact.get(ask.host).and_then(|paths| paths.find(ask));
        exact.or_else(|| self.find_wildcard(ask)).or_else(|| self.any.as_ref()?.find(ask)).or(self.default.as_ref())
    }

    fn find_wildcard(&self, ask: &Ask<'_>) -> Option<&Arc<Route>> {
        if self.one_label.is_empty() && self.suffix.is_empty() {
            return None;
        }
        let (_, mut rest) = ask.host.split_once('.')?;
        if let Some(route) = self.one_label.get(rest).and_then(|paths| paths.find(ask)) {
            return Some(route);
        }
        while !self.suffix.is_empty() {
            if let Some(route) = self.suffix.get(rest).and_then(|paths| paths.find(ask)) {
                return Some(route);
            }
            (_, rest) = rest.split_once('.')?;
        }
        None
    }

    pub fn routes(&self) -> impl Iterator<Item = &Arc<Route>> {
        let maps = [&self.exact, &self.one_label, &self.suffix].into_iter().flat_map(HashMap::values);
        maps.chain(&self.any).flat_map(|paths| paths.routes()).chain(&self.default)
    }
}

fn asks(route: Option<&Arc<Route>>) -> bool {
    route.is_some_and(|route| route.policy.clients.is_some())
}

/// The routes of one host.
#[derive(Clone, Debug, Default)]
pub struct PathTable {
    exact: HashMap<Box<str>, Vec<Arc<Route>>>,
    /// Without slashes at the end.
    prefix: HashMap<Box<str>, Vec<Arc<Route>>>,
    longest_prefix: usize,
    /// The longest first.
    patterns: Vec<Arc<Route>>,
    /// Where its connections over TLS go as they are.
    passing: Option<Arc<StreamRoute>>,
}

impl PathTable {
    pub fn passing(self, passing: Option<Arc<StreamRoute>>) -> Self {
        PathTable { passing, ..self }
    }

    /// Routes in the order in which they win over others of the same path, hosts apart.
    pub fn new(routes: Vec<Arc<Route>>) -> Self {
        let mut table = PathTable::default();
        let (canaries, mut routes): (Vec<_>, Vec<_>) = routes.into_iter().partition(|route| route.canary.is_some());
        for canary in &canaries {
            routes = with_canary(routes, canary);
        }
        // Stable: what asks for as much stays in the order it came in.
        routes.sort_by_key(|route| Reverse(route.matches.rank()));
        for route in routes {
            match &route.path {
                PathMatch::Exact(path) => table.exact.entry(path.clone()).or_default().push(route),
                PathMatch::Prefix(path) => {
                    table.longest_prefix = table.longest_prefix.max(path.len());
                    table.prefix.entry(path.clone()).or_default().push(route);
                }
                PathMatch::Pattern { .. } => table.patterns.push(route),
            }
        }
        let length = |route: &Arc<Route>| match &route.path {
            PathMatch::Pattern { length, .. } => *length,
            PathMatch::Exact(path) | PathMatch::Prefix(path) => path.len(),
        };
        table.patterns.sort_by_key(|route| Reverse(length(route)));
        table
    }

    /// Its clients are asked for a certificate: those of one route as those of all.
    fn asks(&self) -> bool {
        asks(self.routes().next())
    }

    /// An exact path, then the longest; of a pattern and a prefix of one length the pattern.
    pub fn find(&self, ask: &Ask<'_>) -> Option<&Arc<Route>> {
        let fits = |routes: &'_ &Vec<Arc<Route>>| routes.iter().position(|route| route.matches.hold(ask));
        if let Some(routes) = self.exact.get(ask.path)
            && let Some(at) = fits(&routes)
        {
            return routes.get(at);
        }
        let mut patterns = self.patterns.iter().peekable();
        let mut pattern_of = |least: usize| {
            while let Some(route) = patterns.next_if(|route| pattern_length(route) >= least) {
                if let PathMatch::Pattern { regex, .. } = &route.path
                    && regex.is_match(ask.path)
                    && route.matches.hold(ask)
                {
                    return Some(route);
                }
            }
            None
        };
        // The path itself, and what is in front of each slash of it, the longest first.
        let mut end = if self.prefix.is_empty() { None } else { Some(ask.path.len()) };
        while let Some(length) = end {
            if length <= self.longest_prefix {
                let held = &ask.path[..length];
                if let Some(routes) = self.prefix.get(held) {
                    // A prefix is written with a slash more when it is the root.
                    if let Some(route) = pattern_of(length.max(1)) {
                        return Some(route);
                    }
                    if let Some(at) = fits(&routes) {
                        return routes.get(at);
                    }
                }
                end = held.rfind('/');
            } else {
                // What is longer than any prefix need not be looked for.
                end = match ask.path.as_bytes().get(self.longest_prefix) {
                    Some(b'/') => Some(self.longest_prefix),
                    _ => ask.path[..floor(ask.path, self.longest_prefix)].rfind('/'),
                };
            }
        }
        pattern_of(0)
    }

    pub fn routes(&self) -> impl Iterator<Item = &Arc<Route>> {
        self.exact.values().chain(self.prefix.values()).flatten().chain(&self.patterns)
    }
}

/// The next place at or before `at` where a character begins.
fn floor(text: &str, at: usize) -> usize {
    (0..=at).rev().find(|at| text.is_char_boundary(*at)).unwrap_or_default()
}

fn pattern_length(route: &Route) -> usize {
    match &route.path {
        PathMatch::Pattern { length, .. } => *length,
        PathMatch::Exact(_) | PathMatch::Prefix(_) => 0,
    }
}

fn is_same_path(a: &PathMatch, b: &PathMatch) -> bool {
    match (a, b) {
        (PathMatch::Exact(a), PathMatch::Exact(b)) | (PathMatch::Prefix(a), PathMatch::Prefix(b)) => a == b,
        (PathMatch::Pattern { regex: a, .. }, PathMatch::Pattern { regex: b, .. }) => a.as_str() == b.as_str(),
        _ => false,
    }
}

/// The routes with the canary's share taken from those of its path. Without such a route nobody asks for a canary.
fn with_canary(routes: Vec<Arc<Route>>, canary: &Arc<Route>) -> Vec<Arc<Route>> {
    let Some(rule) = &canary.canary else { return routes };
    let Action::Forward(theirs) = &canary.action else { return routes };
    let mut out = Vec::with_capacity(routes.len() + 3);
    for route in routes {
        let Action::Forward(ours) = &route.action else {
            out.push(route);
            continue;
        };
        // What is bound to a header already is another canary's, or has nothing to give.
        if !is_same_path(&route.path, &canary.path) || !route.matches.is_empty() {
            out.push(route);
            continue;
        }
        let variant = |matches: Matches, backends: &Backends| {
            Arc::new(Route { matches, action: Action::Forward(backends.clone()), ..Route::clone(&route) })
        };
        let header = |name: &HeaderName, wanted: ValueMatch| Matches {
            headers: vec![(name.clone(), wanted)],
            ..Matches::default()
        };
        let cookie = |name: &str, wanted: &str| Matches {
            cookies: vec![(name.into(), ValueMatch::Exact(wanted.into()))],
            ..Matches::default()
        };
        // The header comes before the cookie, the cookie before the weight.
        match &rule.header {
            Some((name, ValueMatch::Present)) => {
                out.push(variant(header(name, ValueMatch::Exact("always".into())), theirs));
                out.push(variant(header(name, ValueMatch::Exact("never".into())), ours));
            }
            Some((name, wanted)) => out.push(variant(header(name, wanted.clone()), theirs)),
            None => {}
        }
        if let Some(name) = &rule.cookie {
            out.push(variant(cookie(name, "always"), theirs));
            out.push(variant(cookie(name, "never"), ours));
        }
        out.push(variant(Matches::default(), &shared(ours, theirs, rule)));
    }
    out
}

fn shared(ours: &Backends, theirs: &Backends, rule: &Canary) -> Backends {
    let weight = rule.weight.min(rule.total);
    let scaled = |backends: &Backends, part: u32| -> Vec<WeightedBackend> {
        backends.list().iter().map(|one| WeightedBackend { weight: one.weight * part, ..one.clone() }).collect()
    };
    let mut all = scaled(ours, rule.total - weight);
    all.extend(scaled(theirs, weight));
    all.retain(|one| one.weight > 0);
    Backends::new(all)
}
