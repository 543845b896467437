//! What cluster DNS can be told, the same for a node's agent, for `up` and for `fairlead dns`.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::{Args, ValueEnum};
use dns::{DnsConfig, Hosts, PodMode, Transport, UpstreamServer, Upstreams, parse_resolv_conf, parse_stub};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use serde::{Deserialize, Serialize};
use tokio_rustls::rustls;

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// Debian's bundle, which other distributions have there, too.
const AUTHORITIES: &str = "/etc/ssl/certs/ca-certificates.crt";

/// A domain, and the servers that know it.
type Stub = (String, Vec<UpstreamServer>);

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Switch {
    #[default]
    On,
    Off,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Pods {
    /// Pods have no names.
    #[default]
    Disabled,
    /// The address in the name is echoed.
    Insecure,
    /// Only the address of a pod of the namespace is.
    Verified,
}

#[derive(Args, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct DnsOptions {
    /// A server for names outside the cluster: 192.0.2.1, tcp://192.0.2.1 or tls://192.0.2.1#name.example, with or without
    /// a port; may be repeated. Without one, those of /etc/resolv.conf.
    #[arg(long, value_name = "SERVER", value_parser = checked_server)]
    pub dns_upstream: Vec<String>,
    /// A domain that other servers know: corp.example=192.0.2.1[,SERVER…]; may be repeated.
    #[arg(long, value_name = "ZONE=SERVERS", value_parser = checked_stub)]
    pub dns_stub: Vec<String>,
    /// Names with fixed addresses, in the format of /etc/hosts. They come before all others.
    #[arg(long, value_name = "FILE")]
    pub dns_hosts: Option<PathBuf>,
    /// Certificate authorities of servers over TLS, PEM, instead of this machine's.
    #[arg(long, value_name = "FILE")]
    pub dns_upstream_ca: Option<PathBuf>,
    /// Walk the search path of pods here, in one round trip.
    #[arg(long, value_enum, default_value = "on")]
    pub dns_search_path: Switch,
    /// Names of pods, 10-244-1-5.NAMESPACE.pod.ZONE.
    #[arg(long, value_enum, default_value = "disabled")]
    pub dns_pods: Pods,
    /// Seconds that clients may keep an answer, from 0 to 3600; 5 unless set.
    #[arg(long, value_name = "SECONDS", value_parser = clap::value_parser!(u32).range(0..=3600))]
    pub dns_ttl: Option<u32>,
    /// Answer at this address of the node, too, such as 169.254.20.10; pods ask there first, without address translation.
    #[arg(long, value_name = "ADDRESS", value_parser = checked_local)]
    pub dns_local_address: Option<IpAddr>,
    /// A log line for every question.
    #[arg(long)]
    pub dns_log: bool,
}

fn checked_server(text: &str) -> Result<String, String> {
    text.parse::<UpstreamServer>().map(|_| text.to_owned()).map_err(|error| error.to_string())
}

fn checked_stub(text: &str) -> Result<String, String> {
    parse_stub(text).map(|_| text.to_owned()).map_err(|error| error.to_string())
}

fn checked_local(text: &str) -> Result<IpAddr, String> {
    let ip: IpAddr = text.parse().map_err(|_| format!("{text:?} is no IP address; write 169.254.20.10"))?;
    if ip.is_unspecified() || ip.is_loopback() || ip.is_multicast() {
        return Err(format!("pods cannot reach a server at {ip}; write 169.254.20.10"));
    }
    Ok(ip)
}

impl DnsOptions {
    /// Upstream servers and stub domains, read.
    fn servers(&self) -> anyhow::Result<(Vec<UpstreamServer>, Vec<Stub>)> {
        let upstreams = self.dns_upstream.iter().map(|text| text.parse()).collect::<Result<Vec<_>, _>>()?;
        let stubs = self.dns_stub.iter().map(|text| parse_stub(text)).collect::<Result<Vec<_>, _>>()?;
        Ok((upstreams, stubs))
    }

    /// What is said twice, or for nothing.
    pub fn check(&self) -> anyhow::Result<()> {
        let (upstreams, stubs) = self.servers()?;
        let mut all = upstreams.iter().chain(stubs.iter().flat_map(|(_, servers)| servers));
        if self.dns_upstream_ca.is_some() && !all.any(|server| matches!(server.transport, Transport::Tls(_))) {
            bail!(
                "--dns-upstream-ca is for servers over TLS, and there is none; write --dns-upstream tls://ADDRESS#NAME"
            );
        }
        let mut zones: Vec<String> = stubs.iter().map(|(zone, _)| zone.to_ascii_lowercase()).collect();
        zones.sort();
        if let Some(pair) = zones.windows(2).find(|pair| pair[0] == pair[1]) {
            bail!("--dns-stub names {} twice; write all of its servers in one, by comma", pair[0]);
        }
        Ok(())
    }

    /// Tells a configuration all of this. It must know by then where pods have their addresses.
    pub fn apply(&self, config: &mut DnsConfig) -> anyhow::Result<()> {
        self.check()?;
        let (upstreams, stubs) = self.servers()?;
        let all = || upstreams.iter().chain(stubs.iter().flat_map(|(_, servers)| servers));
        if all().any(|server| matches!(server.transport, Transport::Tls(_))) {
            config.tls = Some(trusting(self.dns_upstream_ca.as_deref().unwrap_or(Path::new(AUTHORITIES)))?);
        }
        config.upstreams = match upstreams.is_empty() {
            true => Upstreams::ResolvConf(RESOLV_CONF.into()),
            false => Upstreams::Servers(upstreams),
        };
        config.stubs = stubs;
        if let Some(path) = &self.dns_hosts {
            let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
            config.hosts = Hosts::parse(&text).with_context(|| path.display().to_string())?;
        }
        if self.dns_search_path == Switch::Off {
            config.search_clients = Vec::new();
        }
        // Pods get the search domains of their node behind the cluster's. Without the file there are none.
        config.search_domains =
            std::fs::read_to_string(RESOLV_CONF).map(|text| parse_resolv_conf(&text).search).unwrap_or_default();
        config.pods = match self.dns_pods {
            Pods::Disabled => PodMode::Disabled,
            Pods::Insecure => PodMode::Insecure,
            Pods::Verified => PodMode::Verified,
        };
        config.ttl = self.dns_ttl.unwrap_or(config.ttl);
        config.log = self.dns_log;
        Ok(())
    }

    /// The same as flags, for a process that is started with them.
    pub fn flags(&self) -> Vec<String> {
        let text = |value: &dyn std::fmt::Debug| format!("{value:?}").to_ascii_lowercase();
        let mut flags = vec![
            format!("--dns-search-path={}", text(&self.dns_search_path)),
            format!("--dns-pods={}", text(&self.dns_pods)),
        ];
        flags.extend(self.dns_ttl.map(|seconds| format!("--dns-ttl={seconds}")));
        flags.extend(self.dns_upstream.iter().map(|server| format!("--dns-upstream={server}")));
        flags.extend(self.dns_stub.iter().map(|stub| format!("--dns-stub={stub}")));
        flags.extend(self.dns_hosts.iter().map(|path| format!("--dns-hosts={}", path.display())));
        flags.extend(self.dns_upstream_ca.iter().map(|path| format!("--dns-upstream-ca={}", path.display())));
        flags.extend(self.dns_local_address.iter().map(|ip| format!("--dns-local-address={ip}")));
        flags.extend(self.dns_log.then(|| "--dns-log".to_owned()));
        flags
    }

    /// The same with paths that mean the same in every directory.
    pub fn absolute(mut self) -> anyhow::Result<Self> {
        for path in [&mut self.dns_hosts, &mut self.dns_upstream_ca].into_iter().flatten() {
            *path = path.canonicalize().with_context(|| format!("find {}", path.display()))?;
        }
        Ok(self)
    }
}

fn trusting(path: &Path) -> anyhow::Result<Arc<rustls::ClientConfig>> {
    let mut roots = rustls::RootCertStore::empty();
    let certificates = CertificateDer::pem_file_iter(path)
        .with_context(|| format!("read {}; install ca-certificates or give --dns-upstream-ca", path.display()))?;
    // A bundle may hold certificates of kinds we do not know; those cannot vouch for anybody.
    roots.add_parsable_certificates(certificates.flatten());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .context("TLS for upstream DNS servers")?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: DnsOptions,
    }

    fn parse(flags: &[&str]) -> Result<DnsOptions, String> {
        let line = ["fairlead"].iter().chain(flags).copied();
        let options = Line::try_parse_from(line).map_err(|error| error.to_string())?.options;
        options.check().map_err(|error| error.to_string())?;
        Ok(options)
    }

    #[test]
    fn flags_say_what_they_were_made_from() {
        let flags = [
            "--dns-upstream=tls://192.0.2.1#dns.example",
            "--dns-upstream=192.0.2.2",
            "--dns-stub=corp.example=192.0.2.3,tcp://192.0.2.4",
            "--dns-search-path=off",
            "--dns-pods=verified",
            "--dns-ttl=30",
            "--dns-local-address=169.254.20.10",
            "--dns-log",
        ];
        let options = parse(&flags).expect("good flags");
        let again = options.flags();
        assert_eq!(parse(&again.iter().map(String::as_str).collect::<Vec<_>>()), Ok(options));
        let none = parse(&[]).expect("no flags");
        assert_eq!(parse(&none.flags().iter().map(String::as_str).collect::<Vec<_>>()), Ok(none));
    }

    #[test]
    fn what_cannot_be_meant_is_said_with_what_to_write() {
        for (flags, part) in [
            (vec!["--dns-upstream=dns.example"], "by address"),
            (vec!["--dns-stub=corp.example"], "there is no ="),
            (vec!["--dns-ttl=3601"], "3601"),
            (vec!["--dns-pods=maybe"], "verified"),
            (vec!["--dns-local-address=127.0.0.1"], "169.254.20.10"),
            (vec!["--dns-upstream-ca=/dev/null"], "there is none"),
            (vec!["--dns-stub=a.example=192.0.2.1", "--dns-stub=A.example=192.0.2.2"], "a.example twice"),
        ] {
            let error = parse(&flags).expect_err("not to be meant");
            assert!(error.contains(part), "{flags:?}: {error}");
        }
    }
}
