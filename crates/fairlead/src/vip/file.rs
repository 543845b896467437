//! The file of `fairlead vip`.

use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, bail};
use api::duration::GoDuration;
use loadbalancer::vrrp::instance::RouterConfig;
use loadbalancer::vrrp::machine::Settings;
use loadbalancer::vrrp::packet::Checksum;
use serde::Deserialize;

use super::check::{Check, Target};

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
pub struct VipFile {
    pub routers: Vec<RouterFile>,
}

/// A virtual router. With addresses of both families it is one of each, with the same id.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct RouterFile {
    pub name: String,
    pub interface: String,
    pub id: u8,
    pub priority: u8,
    pub interval: GoDuration,
    pub preempt: bool,
    pub preempt_delay: GoDuration,
    pub addresses: Vec<IpAddr>,
    pub peers: Vec<IpAddr>,
    pub source: Vec<IpAddr>,
    /// `rfc5798`, as keepalived has it, or `rfc9568`.
    pub checksum: String,
    pub checks: Vec<CheckFile>,
}

impl Default for RouterFile {
    fn default() -> Self {
        RouterFile {
            name: String::new(),
            interface: String::new(),
            id: 0,
            priority: 100,
            interval: GoDuration(Duration::from_secs(1)),
            preempt: true,
            preempt_delay: GoDuration::default(),
            addresses: Vec::new(),
            peers: Vec::new(),
            source: Vec::new(),
            checksum: "rfc5798".into(),
            checks: Vec::new(),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub struct CheckFile {
    pub url: String,
    pub interval: GoDuration,
    pub timeout: GoDuration,
    /// So many failures in a row count.
    pub fall: u32,
    /// So many successes do.
    pub rise: u32,
    /// What a failure takes off the priority; without it, nothing is held.
    pub weight: Option<u8>,
}

impl Default for CheckFile {
    fn default() -> Self {
        let second = GoDuration(Duration::from_secs(1));
        CheckFile { url: String::new(), interval: second, timeout: second, fall: 2, rise: 1, weight: None }
    }
}

impl CheckFile {
    pub fn of(url: &str) -> CheckFile {
        CheckFile { url: url.to_owned(), ..CheckFile::default() }
    }

    pub fn parse(&self) -> anyhow::Result<Check> {
        let target: Target = self.url.parse().map_err(|why: String| anyhow::anyhow!("check {:?}: {why}", self.url))?;
        if self.fall == 0 || self.rise == 0 || self.interval.0.is_zero() || self.timeout.0.is_zero() {
            bail!("check {:?}: fall, rise, interval and timeout are greater than zero; correct it", self.url);
        }
        let (interval, timeout) = (self.interval.0, self.timeout.0);
        Ok(Check { target, interval, timeout, fall: self.fall, rise: self.rise })
    }
}

impl RouterFile {
    /// One of each family that it has addresses of.
    pub fn configs(&self) -> anyhow::Result<Vec<RouterConfig>> {
        if self.addresses.is_empty() {
            bail!("router {:?} has no addresses; give it one", self.name);
        }
        let checksum = match self.checksum.as_str() {
            "rfc5798" => Checksum::WithPseudoHeader,
            "rfc9568" => Checksum::Plain,
            other => bail!("router {:?}: checksum is {other:?}; write rfc5798 or rfc9568", self.name),
        };
        let mut configs = Vec::new();
        for v4 in [true, false] {
            let of = |all: &[IpAddr]| all.iter().filter(|one| one.is_ipv4() == v4).copied().collect::<Vec<_>>();
            let (addresses, peers) = (of(&self.addresses), of(&self.peers));
            if addresses.is_empty() {
                continue;
            }
            if peers.is_empty() && !self.peers.is_empty() {
                let family = if v4 { "IPv4" } else { "IPv6" };
                bail!("router {:?} has {family} addresses and no peer of that family; name one", self.name);
            }
            let config = RouterConfig {
                name: if v4 { self.name.clone() } else { format!("{}-ipv6", self.name) },
                interface: self.interface.clone(),
                id: self.id,
                settings: Settings {
                    priority: self.priority,
                    interval: self.interval.0,
                    preempts: self.preempt,
                    preempt_delay: self.preempt_delay.0,
                },
                addresses,
                peers,
                source: of(&self.source).first().copied(),
                checksum,
                waits: !self.checks.is_empty(),
            };
            config.check().context("virtual routers")?;
            configs.push(config);
        }
        Ok(configs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_read() {
        let text = "
routers:
  - name: api
    interface: eth0
    id: 51
    priority: 150
    interval: 200ms
    preemptDelay: 10s
    addresses: [192.0.2.10, '2001:db8::10']
    checks:
      - {url: 'https://127.0.0.1:6443/readyz', interval: 500ms, weight: 60}
      - {url: 'tcp://[::1]:6443'}
";
        let file: VipFile = serde_saphyr::from_str(text).expect("read");
        let configs = file.routers[0].configs().expect("good routers");
        let names: Vec<&str> = configs.iter().map(|one| one.name.as_str()).collect();
        assert_eq!(names, ["api", "api-ipv6"]);
        assert_eq!(configs[1].settings.interval, Duration::from_millis(200));
        assert!(configs[0].waits && configs[0].settings.preempts);
        assert!(file.routers[0].checks.iter().all(|check| check.parse().is_ok()));
    }

    #[test]
    fn what_cannot_be_meant_is_named() {
        for (change, part) in [
            ("id: 0", "id is 0"),
            ("priority: 0", "priority is 0"),
            ("interval: 15ms", "interval is 15ms"),
            ("interval: 41s", "interval is 41s"),
            ("addresses: []", "no addresses"),
            ("peers: ['2001:db8::1']", "no peer of that family"),
            ("checksum: crc", "rfc5798 or rfc9568"),
            ("weight: 3", "weight"),
        ] {
            let base = "name: x\n    interface: eth0\n    id: 1\n    addresses: [192.0.2.1]";
            let key = change.split(':').next().expect("a key");
            let kept: Vec<&str> = base.lines().filter(|line| !line.trim().starts_with(&format!("{key}:"))).collect();
            let text = format!("routers:\n  - {}\n    {change}\n", kept.join("\n"));
            let read: Result<VipFile, _> = serde_saphyr::from_str(&text);
            let error = match read {
                Ok(file) => format!("{:#}", file.routers[0].configs().expect_err("not to be meant")),
                Err(error) => error.to_string(),
            };
            assert!(error.contains(part), "{change}: {error}");
        }
    }
}
