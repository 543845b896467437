//! What this proxy does beyond kube-proxy, each with a switch: a feature gate, on by default.

use std::fmt::{Display, Formatter};
use std::str::FromStr;

use crate::Error;

/// One of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Feature {
    /// Endpoints that do not answer leave the pick until they do.
    Ejection,
    /// A first packet that nobody answers, or that is refused, is sent to another endpoint when the client repeats it.
    Retry,
    /// Connections are counted per Service and endpoint.
    Traffic,
    /// Connections to an endpoint that goes away end as their Service's annotation says.
    EndPolicy,
    /// The mode of a running node may be changed.
    HandOver,
    /// Kubelets are told which slices are applied, and wait for it before they stop a pod.
    Barrier,
}

impl Feature {
    pub const ALL: [Feature; 6] =
        [Feature::Ejection, Feature::Retry, Feature::Traffic, Feature::EndPolicy, Feature::HandOver, Feature::Barrier];

    /// The name of the gate.
    pub fn gate(self) -> &'static str {
        match self {
            Feature::Ejection => "EndpointEjection",
            Feature::Retry => "FirstPacketRetry",
            Feature::Traffic => "ServiceTraffic",
            Feature::EndPolicy => "EndPolicy",
            Feature::HandOver => "ModeHandOver",
            Feature::Barrier => "RemovalBarrier",
        }
    }

    pub fn of_gate(name: &str) -> Option<Self> {
        Feature::ALL.into_iter().find(|feature| feature.gate() == name)
    }
}

/// Those that are off.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Features(Vec<Feature>);

impl Features {
    pub fn set(&mut self, feature: Feature, on: bool) {
        self.0.retain(|held| *held != feature);
        if !on {
            self.0.push(feature);
            self.0.sort();
        }
    }

    pub fn is_on(&self, feature: Feature) -> bool {
        !self.0.contains(&feature)
    }
}

/// `EndpointEjection=false,RemovalBarrier=false`
impl FromStr for Features {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let mut features = Features::default();
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let found = part
                .split_once('=')
                .and_then(|(name, on)| Some((Feature::of_gate(name.trim())?, on.trim().parse::<bool>().ok()?)));
            let (feature, on) = found.ok_or_else(|| Error::Gate(part.to_owned()))?;
            features.set(feature, on);
        }
        Ok(features)
    }
}

impl Display for Features {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let off: Vec<String> = self.0.iter().map(|feature| format!("{}=false", feature.gate())).collect();
        f.write_str(&off.join(","))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gates_are_read_and_written() {
        let features: Features =
            "RemovalBarrier=false, EndpointEjection=false,FirstPacketRetry=true".parse().expect("gates");
        assert!(!features.is_on(Feature::Barrier) && !features.is_on(Feature::Ejection));
        assert!(features.is_on(Feature::Retry) && features.is_on(Feature::EndPolicy));
        assert_eq!(features.to_string(), "EndpointEjection=false,RemovalBarrier=false");
        assert_eq!(features.to_string().parse::<Features>().expect("gates"), features);
        assert_eq!("".parse::<Features>().expect("none"), Features::default());
        for wrong in ["Ejection=false", "EndpointEjection", "EndpointEjection=off"] {
            let error = wrong.parse::<Features>().expect_err(wrong).to_string();
            assert!(error.contains(wrong) && error.contains("EndpointEjection, FirstPacketRetry"), "{error}");
        }
    }
    #[test]
    fn the_docs_name_every_gate() {
        let text = include_str!("../../../docs/features.md");
        for feature in Feature::ALL {
            assert!(text.contains(&format!("`{}`", feature.gate())), "{}", feature.gate());
        }
    }
}
