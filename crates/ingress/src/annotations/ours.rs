//! Reads annotations that ingress-nginx does not have, or has another way of saying.

use std::time::Duration;

use super::read;
use crate::policy::{Policy, ProxyProtocol};

/// The longest that a new endpoint is spared.
const LONGEST: Duration = Duration::from_secs(900);

/// `None`: the annotation is none of these.
pub fn read(policy: &mut Policy, key: &str, text: &str) -> Option<Result<(), String>> {
    Some(match key {
        "slow-start" => match read::seconds(text) {
            Ok(time) if time <= LONGEST => {
                policy.slow_start = (!time.is_zero()).then_some(time);
                Ok(())
            }
            _ => Err("is no time up to 900s; write 30s, or 0 for none".to_owned()),
        },
        "retry-budget" => match (text, text.trim_end_matches('%').parse::<u8>()) {
            ("off", _) => {
                policy.retry.budget = None;
                Ok(())
            }
            (_, Ok(percent @ 0..=100)) => {
                policy.retry.budget = Some(percent);
                Ok(())
            }
            _ => Err("is no share of the requests; write 20, or off".to_owned()),
        },
        "proxy-protocol" => match text {
            "v1" | "v2" => {
                policy.announces = Some(if text == "v1" { ProxyProtocol::V1 } else { ProxyProtocol::V2 });
                Ok(())
            }
            "off" => {
                policy.announces = None;
                Ok(())
            }
            _ => Err("is neither v1, v2 nor off".to_owned()),
        },
        "enable-opentelemetry" => read::flag(text).map(|on| policy.traces = Some(on)),
        "opentelemetry-trust-incoming-span" => read::flag(text).map(|on| policy.trusts_trace = on),
        _ => return None,
    })
}
