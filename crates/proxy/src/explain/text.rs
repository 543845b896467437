//! A report as a person reads it.

use std::fmt::{Display, Formatter};

use super::report::{AddressKind, Destination, Policy, Report};

/// The words of a value in JSON, without the quotes: one wording for people and programs.
fn words(value: &impl serde::Serialize) -> String {
    let value = serde_json::to_value(value).expect("a name is written to memory");
    value.as_str().unwrap_or_default().to_owned()
}

impl Display for AddressKind {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(&words(self))
    }
}

impl Display for Policy {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(&words(self))
    }
}

impl Display for Destination {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Destination::Frontend { name, address, policy, affinity_seconds, source_ranges, hidden } => {
                writeln!(f, "Service {name}, by its {address}")?;
                writeln!(f, "  {policy}")?;
                if let Some(seconds) = affinity_seconds {
                    writeln!(f, "  sessionAffinity: a client stays where it is for {seconds} s")?;
                }
                if let Some(ranges) = source_ranges {
                    let verdict = if ranges.is_allowed { "this client may" } else { "this client may not" };
                    writeln!(f, "  loadBalancerSourceRanges: {}: {verdict}", ranges.allowed.join(", "))?;
                }
                for other in hidden {
                    writeln!(f, "  {other} claims the same address and port, and does not get it")?;
                }
                Ok(())
            }
            Destination::UndefinedPort { service, ports } => {
                writeln!(f, "the cluster IP of {service}, which has no such port, only {}", ports.join(", "))
            }
            Destination::Unallocated => writeln!(f, "a cluster IP that no Service has"),
            Destination::Endpoint { services } => {
                writeln!(f, "an endpoint of {}, addressed directly: no Service is involved", services.join(", "))
            }
            Destination::Other => writeln!(f, "no address of a Service"),
        }
    }
}

impl Display for Report {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let Report { node, mode, from, to, protocol, destination, endpoints, kernel, drift } = self;
        writeln!(f, "{from} -> {to} {protocol}, on {node} (mode {mode})")?;
        write!(f, "{destination}")?;
        if let Destination::Frontend { .. } = destination {
            let used = endpoints.iter().filter(|endpoint| endpoint.used).count();
            writeln!(f, "Endpoints: {used} in, {} out", endpoints.len() - used)?;
        }
        for endpoint in endpoints {
            let side = if endpoint.used { "in " } else { "out" };
            let node = endpoint.node.as_deref().unwrap_or("an unknown node");
            let zone = endpoint.zone.as_deref().map(|zone| format!(", zone {zone}")).unwrap_or_default();
            writeln!(f, "  {side}  {} on {node}{zone}: {}", endpoint.address, endpoint.why)?;
        }
        writeln!(f, "Kernel: {}", kernel.fates.join(" | "))?;
        for rule in &kernel.rules {
            writeln!(f, "  {rule}")?;
        }
        match drift.as_deref() {
            None => Ok(()),
            Some([]) => writeln!(f, "Drift: none, the kernel holds the plan"),
            Some(lines) => {
                writeln!(f, "Drift: the kernel differs from the plan")?;
                lines.iter().try_for_each(|line| writeln!(f, "  {line}"))
            }
        }
    }
}
