//! The kernel's settings of connection tracking. Only what is configured is written, and only where it differs.

use std::time::Duration;

/// What is wanted of the connection table; `None`: as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Conntrack {
    pub max_per_core: Option<u32>,
    pub min: Option<u32>,
    pub tcp_established: Option<Duration>,
    pub tcp_close_wait: Option<Duration>,
    pub tcp_be_liberal: bool,
    pub udp: Option<Duration>,
    pub udp_stream: Option<Duration>,
}

/// kube-proxy's floor where only a maximum per core is given.
const MIN: u32 = 128 * 1024;

impl Conntrack {
    /// The most connections that may be tracked on a machine of so many cores; `None`: as it is.
    pub fn max(&self, cores: usize) -> Option<u64> {
        let per_core = match (self.max_per_core, self.min) {
            // Zero leaves the limit as it is, and the minimum out of account.
            (Some(0), _) | (None, None) => return None,
            (Some(per_core), _) => u64::from(per_core),
            (None, Some(_)) => 0,
        };
        Some((per_core * cores as u64).max(u64::from(self.min.unwrap_or(MIN))))
    }

    /// Names (below /proc/sys) and values.
    pub fn sysctls(&self, cores: usize) -> Vec<(&'static str, String)> {
        // Zero means: as it is.
        let seconds = |wanted: Option<Duration>| wanted.filter(|time| !time.is_zero()).map(|time| time.as_secs());
        let all = [
            ("net/netfilter/nf_conntrack_max", self.max(cores)),
            ("net/netfilter/nf_conntrack_tcp_timeout_established", seconds(self.tcp_established)),
            ("net/netfilter/nf_conntrack_tcp_timeout_close_wait", seconds(self.tcp_close_wait)),
            ("net/netfilter/nf_conntrack_tcp_be_liberal", self.tcp_be_liberal.then_some(1)),
            ("net/netfilter/nf_conntrack_udp_timeout", seconds(self.udp)),
            ("net/netfilter/nf_conntrack_udp_timeout_stream", seconds(self.udp_stream)),
        ];
        all.into_iter().filter_map(|(name, value)| Some((name, value?.to_string()))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_limit_follows_the_cores_and_has_a_floor() {
        let cases = [
            (None, None, None),
            (Some(0), Some(1_000_000), None),
            (Some(32_768), None, Some(131_072)),
            (Some(100_000), None, Some(400_000)),
            (Some(1000), Some(200_000), Some(200_000)),
            (None, Some(5000), Some(5000)),
        ];
        for (max_per_core, min, expected) in cases {
            let wanted = Conntrack { max_per_core, min, ..Conntrack::default() };
            assert_eq!(wanted.max(4), expected, "{wanted:?}");
        }
    }

    #[test]
    fn what_is_not_configured_is_not_written() {
        assert!(Conntrack::default().sysctls(8).is_empty());
        let zero = Some(Duration::ZERO);
        let zeros = Conntrack { tcp_established: zero, tcp_close_wait: zero, udp: zero, ..Conntrack::default() };
        assert!(zeros.sysctls(8).is_empty());
        let wanted = Conntrack {
            tcp_established: Some(Duration::from_secs(3600)),
            tcp_be_liberal: true,
            udp_stream: Some(Duration::from_secs(5)),
            ..Conntrack::default()
        };
        let names = |(name, value): &(&str, String)| format!("{} {value}", name.rsplit('_').next().unwrap_or(""));
        let found: Vec<String> = wanted.sysctls(8).iter().map(names).collect();
        assert_eq!(found, ["established 3600", "liberal 1", "stream 5"]);
    }
}
