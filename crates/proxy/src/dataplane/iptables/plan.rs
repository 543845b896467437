//! A frontend's rules.

use std::collections::BTreeMap;
use std::fmt::{Display, Formatter};
use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;
use linux::iptables::{Part, Rule, Target};
use services::{Endpoint, Frontend, TrafficPolicy};

use super::names::{EXTERNAL_SERVICES, MARK_MASQ, NODE_PORTS, Names, PROXY_FIREWALL, SERVICES};
use crate::addresses::Addresses;
use crate::scope::{Scopes, scopes};
use crate::{NodeView, Pods};

/// What one frontend adds for one address family. Rules of shared chains are kept apart from chains of its own.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct FamilyEntries {
    pub nat: Vec<(&'static str, Rule)>,
    pub filter: Vec<(&'static str, Rule)>,
    /// In the nat table, in the order in which they are declared.
    pub chains: Vec<(String, Vec<Rule>)>,
}

/// IPv4 and IPv6.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Entries(pub [FamilyEntries; 2]);

impl Display for Entries {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        for family in &self.0 {
            for (chain, rule) in &family.filter {
                writeln!(f, "filter -A {chain} {rule}")?;
            }
            for (chain, rule) in &family.nat {
                writeln!(f, "nat -A {chain} {rule}")?;
            }
            for (chain, rule) in
                family.chains.iter().flat_map(|(chain, rules)| rules.iter().map(move |rule| (chain, rule)))
            {
                writeln!(f, "nat -A {chain} {rule}")?;
            }
        }
        Ok(())
    }
}

pub fn entries(frontend: &Frontend, node: &NodeView) -> Entries {
    Entries([false, true].map(|v6| {
        let plan = Plan {
            frontend,
            name: frontend.name.to_string(),
            names: Names::new(&frontend.name),
            scopes: scopes(frontend, node, v6),
            pods: from_pods(&node.pods, v6),
            v6,
            entries: FamilyEntries::default(),
        };
        plan.gather(node)
    }))
}

/// One family of one frontend, while its rules are gathered.
struct Plan<'a> {
    frontend: &'a Frontend,
    name: String,
    names: Names,
    scopes: Scopes<'a>,
    /// How a packet from a pod is told, if it can be.
    pods: Option<Local>,
    v6: bool,
    entries: FamilyEntries,
}

/// A match for packets of pods.
enum Local {
    From(IpNet),
    Through { name: Box<str>, is_prefix: bool },
}

fn from_pods(pods: &Pods, v6: bool) -> Option<Local> {
    match pods {
        // `check` has seen to it that there is no second one.
        Pods::Cidrs(_) => pods.cidrs(v6).next().copied().map(Local::From),
        Pods::Bridge(name) => Some(Local::Through { name: name.clone(), is_prefix: false }),
        Pods::InterfacePrefix(name) => Some(Local::Through { name: name.clone(), is_prefix: true }),
    }
}

impl Local {
    fn part(&self, not: bool) -> Part {
        match self {
            Local::From(net) => Part::Source { net: *net, not },
            Local::Through { name, is_prefix } => Part::InInterface { name: name.clone(), is_prefix: *is_prefix, not },
        }
    }
}

fn jump(parts: impl IntoIterator<Item = Part>, chain: &str) -> Rule {
    Rule { parts: parts.into_iter().collect(), target: Target::Jump(chain.to_owned()) }
}

impl Plan<'_> {
    fn gather(mut self, node: &NodeView) -> FamilyEntries {
        // Fully, so that a new field asks for a decision here.
        let Frontend {
            id: _,
            name: _,
            app_protocol: _,
            port,
            cluster_ips: _,
            external_ips: _,
            load_balancer_ips: _,
            node_port,
            internal_policy,
            external_policy,
            affinity: _,
            source_ranges: _,
            // Connections are ended beside the plan (`end`), the same way wherever conntrack translates.
            end_policy: _,
            // The loop says that it is not this mode's to choose.
            selection: _,
            direct_return: _,
            health_check_node_port,
            endpoints: _,
        } = self.frontend;
        let Some(addresses) = Addresses::of(self.frontend, node, self.v6) else { return self.entries };
        let (port, external_policy) = (*port, *external_policy);
        let (cluster_ip, balancer_ips) = (addresses.cluster[0], &addresses.load_balancer);
        let is_external = node_port.is_some() || addresses.outside().next().is_some();
        let any = self.scopes.any;
        let reachable = |policy| any && (policy == TrafficPolicy::Cluster || !self.scopes.local.is_empty());
        let (inside, outside) = (reachable(*internal_policy), reachable(external_policy));
        let internal_chain = match internal_policy {
            TrafficPolicy::Cluster => self.names.cluster.clone(),
            TrafficPolicy::Local => self.names.local.clone(),
        };
        let external_chain = self.names.external.clone();
        let has_firewall = any && !balancer_ips.is_empty() && !addresses.sources.is_empty();
        let balancer_chain = if has_firewall { self.names.firewall.clone() } else { external_chain.clone() };

        self.capture(inside, SERVICES, (cluster_ip, port), "cluster IP", &internal_chain);
        if !inside {
            self.refuse(SERVICES, self.to(cluster_ip, port));
        }
        for address in &addresses.external {
            self.capture(any, SERVICES, (*address, port), "external IP", &external_chain);
            if !outside {
                self.refuse(EXTERNAL_SERVICES, self.to(*address, port));
            }
        }
        for address in balancer_ips {
            self.capture(any, SERVICES, (*address, port), "loadbalancer IP", &balancer_chain);
            if has_firewall {
                let text = format!("{} traffic not accepted by {}", self.name, self.names.firewall);
                let parts = vec![Part::Comment(text), self.to(*address, port)];
                self.entries.filter.push((PROXY_FIREWALL, Rule { parts, target: Target::Drop }));
            }
        }
        if !outside {
            for address in balancer_ips {
                self.refuse(EXTERNAL_SERVICES, self.to(*address, port));
            }
        }
        if let Some(node_port) = node_port {
            let at = self.port(None, node_port.get());
            if any {
                let rule = jump([Part::Comment(self.name.clone()), at.clone()], &external_chain);
                self.entries.nat.push((NODE_PORTS, rule));
            }
            if !outside {
                let mut parts = vec![self.no_endpoints().0, Part::DestinationTypeLocal];
                parts.push(at);
                let target = self.no_endpoints().1;
                self.entries.filter.push((EXTERNAL_SERVICES, Rule { parts, target }));
            }
        }
        if let Some(health) = health_check_node_port {
            let text = format!("{} health check node port", self.name);
            let tcp = Part::Port { protocol: "tcp", number: 6, destination: None, port: health.get() };
            let rule = Rule { parts: vec![Part::Comment(text), tcp], target: Target::Accept };
            self.entries.filter.push((NODE_PORTS, rule));
        }

        let mut internal_rules = Vec::new();
        if inside {
            let mut parts = vec![Part::Comment(format!("{} cluster IP", self.name)), self.to(cluster_ip, port)];
            // Someone outside may route the Service range to any node; the way back must lead through that node.
            match &self.pods {
                _ if node.masquerade_all => internal_rules.push(jump(parts, MARK_MASQ)),
                Some(pods) => {
                    parts.push(pods.part(true));
                    internal_rules.push(jump(parts, MARK_MASQ));
                }
                None => {}
            }
        }
        if any && is_external {
            self.external(external_policy, outside);
        }
        if has_firewall {
            self.firewall(&addresses);
        }
        let uses_cluster = *internal_policy == TrafficPolicy::Cluster || is_external;
        let uses_local =
            *internal_policy == TrafficPolicy::Local || (is_external && external_policy == TrafficPolicy::Local);
        let cluster: Vec<&Endpoint> = if uses_cluster { self.scopes.cluster.clone() } else { Vec::new() };
        let local: Vec<&Endpoint> = if uses_local { self.scopes.local.clone() } else { Vec::new() };
        for (policy, chain, endpoints) in [
            (TrafficPolicy::Cluster, self.names.cluster.clone(), &cluster),
            (TrafficPolicy::Local, self.names.local.clone(), &local),
        ] {
            if !endpoints.is_empty() {
                let mut rules =
                    if *internal_policy == policy { std::mem::take(&mut internal_rules) } else { Vec::new() };
                self.pick(&mut rules, endpoints);
                self.entries.chains.push((chain, rules));
            }
        }
        let reachable: BTreeMap<String, SocketAddr> =
            cluster.iter().chain(&local).map(|endpoint| (endpoint.address.to_string(), endpoint.address)).collect();
        for address in reachable.into_values() {
            self.endpoint(address);
        }
        self.entries
    }

    fn port(&self, destination: Option<IpNet>, port: u16) -> Part {
        let protocol = self.frontend.name.protocol;
        Part::Port { protocol: protocol.name(), number: protocol.number(), destination, port }
    }

    fn to(&self, address: IpAddr, port: u16) -> Part {
        self.port(Some(address.into()), port)
    }

    fn capture(&mut self, when: bool, chain: &'static str, (address, port): (IpAddr, u16), what: &str, target: &str) {
        if when {
            let comment = Part::Comment(format!("{} {what}", self.name));
            self.entries.nat.push((chain, jump([comment, self.to(address, port)], target)));
        }
    }

    /// Why there is nobody, and what is done about it.
    fn no_endpoints(&self) -> (Part, Target) {
        match self.scopes.any {
            true => (Part::Comment(format!("{} has no local endpoints", self.name)), Target::Drop),
            false => (Part::Comment(format!("{} has no endpoints", self.name)), Target::Reject),
        }
    }

    fn refuse(&mut self, chain: &'static str, at: Part) {
        let (comment, target) = self.no_endpoints();
        self.entries.filter.push((chain, Rule { parts: vec![comment, at], target }));
    }

    fn external(&mut self, policy: TrafficPolicy, outside: bool) {
        let says = |what: &str| Part::Comment(format!("{what} traffic for {} external destinations", self.name));
        let mut rules = Vec::new();
        match policy {
            // The endpoint may be on another node, whose reply must come back through this one.
            TrafficPolicy::Cluster => {
                let comment = Part::Comment(format!("masquerade traffic for {} external destinations", self.name));
                rules.push(jump([comment], MARK_MASQ));
            }
            TrafficPolicy::Local => {
                if let Some(pods) = &self.pods {
                    rules.push(jump([says("pod"), pods.part(false)], &self.names.cluster));
                }
                rules.push(jump([says("masquerade LOCAL"), Part::SourceTypeLocal], MARK_MASQ));
                rules.push(jump([says("route LOCAL"), Part::SourceTypeLocal], &self.names.cluster));
            }
        }
        if outside {
            let chain = match policy {
                TrafficPolicy::Cluster => &self.names.cluster,
                TrafficPolicy::Local => &self.names.local,
            };
            rules.push(jump([], chain));
        }
        self.entries.chains.push((self.names.external.clone(), rules));
    }

    fn firewall(&mut self, addresses: &Addresses) {
        let comment = || Part::Comment(format!("{} loadbalancer IP", self.name));
        let from = |net: IpNet| jump([comment(), Part::Source { net, not: false }], &self.names.external);
        let mut rules: Vec<Rule> = addresses.sources.iter().map(|net| from(*net)).collect();
        // A node in the ranges may loop its own packets through the load balancer's address.
        if addresses.node_may {
            rules.extend(addresses.load_balancer.iter().map(|address| from((*address).into())));
        }
        let text = format!("other traffic to {} will be dropped by KUBE-PROXY-FIREWALL", self.name);
        rules.push(Rule { parts: vec![Part::Comment(text)], target: Target::None });
        self.entries.chains.push((self.names.firewall.clone(), rules));
    }

    /// kube-proxy's order: by the text of the address.
    fn pick(&self, rules: &mut Vec<Rule>, endpoints: &[&Endpoint]) {
        let mut addresses: Vec<SocketAddr> = endpoints.iter().map(|endpoint| endpoint.address).collect();
        addresses.sort_by_key(|address| address.to_string());
        let comment = |address: &SocketAddr| Part::Comment(format!("{} -> {address}", self.name));
        if let Some(affinity) = self.frontend.affinity {
            for address in &addresses {
                let chain = self.names.endpoint(*address);
                let check = Part::RecentCheck { list: chain.clone(), seconds: affinity.timeout_seconds };
                rules.push(jump([comment(address), check], &chain));
            }
        }
        for (index, address) in addresses.iter().enumerate() {
            let mut parts = vec![comment(address)];
            match addresses.len() - index {
                1 => {}
                one_in => parts.push(Part::Random { one_in }),
            }
            rules.push(jump(parts, &self.names.endpoint(*address)));
        }
    }

    fn endpoint(&mut self, address: SocketAddr) {
        let chain = self.names.endpoint(address);
        let comment = || Part::Comment(self.name.clone());
        let itself = Part::Source { net: address.ip().into(), not: false };
        let mut parts = vec![comment()];
        if self.frontend.affinity.is_some() {
            parts.push(Part::RecentSet { list: chain.clone() });
        }
        let protocol = self.frontend.name.protocol;
        parts.push(Part::Protocol { protocol: protocol.name(), number: protocol.number() });
        let rules = vec![jump([comment(), itself], MARK_MASQ), Rule { parts, target: Target::Dnat(address) }];
        self.entries.chains.push((chain, rules));
    }
}
