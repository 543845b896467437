//! Something for each of many hosts, and where two patterns of hosts meet.

use std::collections::HashMap;
use std::sync::Arc;

use crate::host::HostPattern;

/// Values by the hosts that they are for; the most exact one counts. A wildcard stands for one or more labels, as in Gateway API.
#[derive(Clone, Debug)]
pub struct HostMap<T> {
    exact: HashMap<Arc<str>, T>,
    suffix: HashMap<Arc<str>, T>,
    any: Option<T>,
}

impl<T> Default for HostMap<T> {
    fn default() -> Self {
        HostMap { exact: HashMap::new(), suffix: HashMap::new(), any: None }
    }
}

impl<T> HostMap<T> {
    /// The first one for a pattern stays; says whether this was it.
    pub fn insert(&mut self, host: &HostPattern, value: T) -> bool {
        let (map, name) = match host {
            HostPattern::Exact(name) => (&mut self.exact, name),
            HostPattern::OneLabel(name) | HostPattern::Suffix(name) => (&mut self.suffix, name),
            HostPattern::Any => {
                let is_new = self.any.is_none();
                self.any.get_or_insert(value);
                return is_new;
            }
        };
        let is_new = !map.contains_key(name);
        if is_new {
            map.insert(name.clone(), value);
        }
        is_new
    }

    /// `host` is in lower case.
    pub fn find(&self, host: &str) -> Option<&T> {
        if let Some(held) = self.exact.get(host) {
            return Some(held);
        }
        let mut rest = host;
        while !self.suffix.is_empty() {
            let Some((_, shorter)) = rest.split_once('.') else { break };
            if let Some(held) = self.suffix.get(shorter) {
                return Some(held);
            }
            rest = shorter;
        }
        self.any.as_ref()
    }

    pub fn values(&self) -> impl Iterator<Item = &T> {
        self.exact.values().chain(self.suffix.values()).chain(&self.any)
    }
}

impl HostPattern {
    /// The hosts that both are for, if there are any.
    pub fn meet(&self, other: &HostPattern) -> Option<HostPattern> {
        use HostPattern::{Any, Exact, OneLabel, Suffix};
        match (self, other) {
            (Any, held) | (held, Any) => Some(held.clone()),
            (Exact(a), Exact(b)) => (a == b).then(|| self.clone()),
            (Exact(name), Suffix(rest) | OneLabel(rest)) | (Suffix(rest) | OneLabel(rest), Exact(name)) => {
                is_below(name, rest).then(|| Exact(name.clone()))
            }
            (Suffix(a) | OneLabel(a), Suffix(b) | OneLabel(b)) => match () {
                () if a == b || is_below(a, b) => Some(Suffix(a.clone())),
                () if is_below(b, a) => Some(Suffix(b.clone())),
                () => None,
            },
        }
    }
}

/// `a.b.c` is below `b.c`.
fn is_below(name: &str, rest: &str) -> bool {
    name.strip_suffix(rest).is_some_and(|front| front.ends_with('.') && front.len() > 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> HostPattern {
        match text.strip_prefix("*.") {
            Some(rest) => HostPattern::Suffix(rest.into()),
            None if text.is_empty() => HostPattern::Any,
            None => HostPattern::Exact(text.into()),
        }
    }

    #[test]
    fn two_patterns_meet_in_what_both_are_for() {
        for (a, b, both) in [
            ("", "", Some("")),
            ("", "a.example", Some("a.example")),
            ("*.example", "a.example", Some("a.example")),
            ("*.example", "b.a.example", Some("b.a.example")),
            ("*.example", "example", None),
            ("*.example", "aexample", None),
            ("*.example", "*.example", Some("*.example")),
            ("*.example", "*.a.example", Some("*.a.example")),
            ("*.b.example", "*.a.example", None),
            ("a.example", "b.example", None),
        ] {
            assert_eq!(of(a).meet(&of(b)), both.map(of), "{a} {b}");
            assert_eq!(of(b).meet(&of(a)), both.map(of), "{b} {a}");
        }
    }

    #[test]
    fn the_most_exact_host_counts() {
        let mut map = HostMap::default();
        for host in ["", "*.example", "*.a.example", "a.example"] {
            assert!(map.insert(&of(host), host));
            assert!(!map.insert(&of(host), "another"));
        }
        for (asked, found) in [
            ("a.example", "a.example"),
            ("b.example", "*.example"),
            ("c.b.example", "*.example"),
            ("b.a.example", "*.a.example"),
            ("d.c.b.a.example", "*.a.example"),
            ("example", ""),
            ("", ""),
        ] {
            assert_eq!(map.find(asked), Some(&found), "{asked}");
        }
    }
}
