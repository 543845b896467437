//! What the Ingress proxy can be told, the same for a node's agent, for `up` and for `fairlead ingress`.

use clap::{Args, ValueEnum};
use ingress::{LogFormat, ProxyConfig};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
pub enum Log {
    #[default]
    Off,
    /// One line a request, as nginx's combined format with the Ingress and the endpoint behind.
    Text,
    Json,
}

#[derive(Args, Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct IngressOptions {
    /// A line on standard output for every request through an Ingress.
    #[arg(long, value_enum, default_value = "off")]
    pub ingress_log: Log,
    /// Proxies in front, whose X-Forwarded-* headers are believed; those of others are replaced.
    #[arg(long, value_name = "RANGE", value_delimiter = ',')]
    pub ingress_trusted_proxy: Vec<IpNet>,
    /// Load balancers in front that begin each connection by the PROXY protocol (version 1 or 2) with who their client is. What
    /// comes from them without it is refused.
    #[arg(long, value_name = "RANGE", value_delimiter = ',')]
    pub ingress_proxy_protocol: Vec<IpNet>,
    /// Backends of the kind ExternalName answer 503: whoever writes one chooses where this machine connects to.
    #[arg(long)]
    pub ingress_no_external_names: bool,
    /// Requests that bring no trace (W3C Trace Context, header traceparent) get one, and the log names each request's.
    #[arg(long)]
    pub ingress_trace: bool,
    /// Threads that carry requests; one for each processor unless set.
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub ingress_workers: Option<u16>,
}

impl IngressOptions {
    /// Tells a configuration all of this.
    pub fn apply(&self, config: &mut ProxyConfig) {
        config.log = match self.ingress_log {
            Log::Off => LogFormat::Off,
            Log::Text => LogFormat::Text,
            Log::Json => LogFormat::Json,
        };
        config.trusted.clone_from(&self.ingress_trusted_proxy);
        config.announcers.clone_from(&self.ingress_proxy_protocol);
        config.external_names = !self.ingress_no_external_names;
        config.trace = self.ingress_trace;
        config.workers = self.ingress_workers.map_or(config.workers, usize::from);
    }

    /// The same as flags, for a process that is started with them.
    pub fn flags(&self) -> Vec<String> {
        let mut flags = vec![format!("--ingress-log={:?}", self.ingress_log).to_ascii_lowercase()];
        flags.extend(self.ingress_trusted_proxy.iter().map(|range| format!("--ingress-trusted-proxy={range}")));
        flags.extend(self.ingress_proxy_protocol.iter().map(|range| format!("--ingress-proxy-protocol={range}")));
        flags.extend(self.ingress_no_external_names.then(|| "--ingress-no-external-names".to_owned()));
        flags.extend(self.ingress_trace.then(|| "--ingress-trace".to_owned()));
        flags.extend(self.ingress_workers.map(|count| format!("--ingress-workers={count}")));
        flags
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: IngressOptions,
    }

    #[test]
    fn flags_say_what_they_were_made_from() {
        let given = [
            "fairlead",
            "--ingress-log=json",
            "--ingress-trusted-proxy=10.0.0.0/8,192.0.2.0/24",
            "--ingress-proxy-protocol=192.0.2.0/24",
            "--ingress-no-external-names",
            "--ingress-trace",
            "--ingress-workers=3",
        ];
        let options = Line::try_parse_from(given).expect("good flags").options;
        assert_eq!(options.ingress_trusted_proxy.len(), 2);
        let flags = options.flags();
        let again = ["fairlead"].into_iter().chain(flags.iter().map(String::as_str));
        assert_eq!(Line::try_parse_from(again).expect("its own flags").options, options);
    }
}
