//! Durations as Go writes them: `1h2m`, `250ms`, `1.5s`; a bare number is nanoseconds.

use std::fmt::{Display, Formatter};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A duration that is written as Go's `time.Duration` prints it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct GoDuration(pub Duration);

/// The longest first, where one unit begins another.
const UNITS: [(&str, f64); 7] =
    [("ns", 1e-9), ("us", 1e-6), ("µs", 1e-6), ("ms", 1e-3), ("s", 1.0), ("m", 60.0), ("h", 3600.0)];

impl FromStr for GoDuration {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no duration that is zero or longer, such as 30s, 1m30s or 250ms");
        if text == "0" {
            return Ok(GoDuration::default());
        }
        let mut rest = text.strip_prefix('+').unwrap_or(text);
        let mut seconds = 0.0;
        if rest.is_empty() {
            return Err(wrong());
        }
        while !rest.is_empty() {
            let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(wrong)?;
            let number: f64 = rest[..digits].parse().map_err(|_| wrong())?;
            rest = &rest[digits..];
            let (unit, scale) = UNITS.iter().find(|(unit, _)| rest.starts_with(unit)).ok_or_else(wrong)?;
            rest = &rest[unit.len()..];
            seconds += number * scale;
        }
        Duration::try_from_secs_f64(seconds).map(GoDuration).map_err(|_| wrong())
    }
}

impl Display for GoDuration {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let seconds = self.0.as_secs();
        let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
        if hours > 0 {
            write!(f, "{hours}h")?;
        }
        if hours > 0 || minutes > 0 {
            write!(f, "{minutes}m")?;
        }
        let rest = (seconds % 60) as f64 + f64::from(self.0.subsec_nanos()) / 1e9;
        write!(f, "{rest}s")
    }
}

impl Serialize for GoDuration {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for GoDuration {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl serde::de::Visitor<'_> for Visitor {
            type Value = GoDuration;

            fn expecting(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
                f.write_str("a duration such as 30s or 1h30m, or a number of nanoseconds")
            }

            fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<GoDuration, E> {
                text.parse().map_err(E::custom)
            }

            fn visit_u64<E: serde::de::Error>(self, nanoseconds: u64) -> Result<GoDuration, E> {
                Ok(GoDuration(Duration::from_nanos(nanoseconds)))
            }

            fn visit_i64<E: serde::de::Error>(self, nanoseconds: i64) -> Result<GoDuration, E> {
                let positive = u64::try_from(nanoseconds);
                positive.map_err(|_| E::custom("a duration is not negative")).and_then(|n| self.visit_u64(n))
            }
        }
        // YAML cannot tell `0` from a number, nor JSON `"0s"` from a text: both are taken.
        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_are_read_and_written_as_go_does() {
        let cases = [("0", 0), ("0s", 0), ("30s", 30_000), ("1m30s", 90_000), ("1.5s", 1500), ("250ms", 250)];
        for (text, milliseconds) in cases.into_iter().chain([("2h22m", 8_520_000), ("24h0m0s", 86_400_000)]) {
            let read: GoDuration = text.parse().expect(text);
            assert_eq!(read.0, Duration::from_millis(milliseconds), "{text}");
            assert_eq!(read.to_string().parse(), Ok(read), "{text}");
        }
        assert_eq!(GoDuration(Duration::from_secs(86_400)).to_string(), "24h0m0s");
        assert_eq!(GoDuration(Duration::from_millis(90_250)).to_string(), "1m30.25s");
        for bad in ["", "5", "s", "-1s", "1x", "1s5", "1..5s"] {
            assert!(bad.parse::<GoDuration>().is_err(), "{bad}");
        }
    }
}
