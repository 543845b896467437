//! kube-proxy's flags. They fill the fields of its configuration file; with `--config` the file decides, and only what
//! differs from node to node may be said beside it.

use std::net::IpAddr;
use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use proxy::configuration::{
    API_VERSION, ClientConnection, Configuration, ConntrackSection, DetectLocal, GoDuration, Iptables, Ipvs, KIND,
    Logging, Nftables, Settings,
};
use proxy::{Feature, Features};
use serde_json::Value;

#[derive(Args, Debug, Clone)]
pub struct ProxyArgs {
    /// A file with kube-proxy's configuration (KubeProxyConfiguration, v1alpha1).
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// How the API server is reached, and as whom; in a pod its service account by default.
    #[arg(long, value_name = "FILE")]
    pub kubeconfig: Option<String>,
    /// The API server's URL, if not the kubeconfig's.
    #[arg(long, value_name = "URL")]
    pub master: Option<String>,
    /// The name of the Node this runs on; the host's name by default.
    #[arg(long, value_name = "NAME")]
    pub hostname_override: Option<String>,
    /// Serve only Services whose label service.kubernetes.io/service-proxy-name has this value.
    #[arg(long, value_name = "NAME")]
    pub service_proxy_name: Option<String>,
    /// Endpoints that do not answer leave the pick until they do.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "true", action = clap::ArgAction::Set)]
    pub ejection: bool,
    /// A first packet that nobody answers, or that is refused, is sent to another endpoint when the client repeats it.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "true", action = clap::ArgAction::Set)]
    pub first_packet_retry: bool,
    /// How the ebpf mode chooses among endpoints: random, maglev or least-load; the annotation fairlead.io/endpoint-selection of a
    /// Service comes before it.
    #[arg(long, default_value = "random")]
    pub endpoint_selection: services::Selection,
    /// Endpoints on other nodes answer clients from outside without the node that was asked (DSR), where both nodes' proxies are
    /// in the ebpf mode; the annotation fairlead.io/dsr of a Service comes before it.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", action = clap::ArgAction::Set)]
    pub dsr: bool,
    /// After how many milliseconds sockets that are sent to an endpoint repeat their first packet; by default after a second,
    /// as the kernel has it. The ebpf mode alone can set it.
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(20..=1000))]
    pub first_packet_timeout: Option<u64>,
    /// Remove what the proxy has put into the kernel, in whatever mode, and exit.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", action = clap::ArgAction::Set)]
    pub cleanup: bool,
    /// Apply the settings that need most rights, and exit.
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", action = clap::ArgAction::Set)]
    pub init_only: bool,
    /// Write the configuration that the flags mean to this file, and exit.
    #[arg(long, value_name = "FILE")]
    pub write_config_to: Option<PathBuf>,
    /// How much is logged: from 4 on every decision.
    #[arg(short = 'v', long = "v", value_name = "LEVEL")]
    pub verbosity: Option<u32>,
    /// Where the ebpf mode keeps what outlives the process.
    #[arg(long, value_name = "DIR", default_value = "/run/fairlead-proxy")]
    pub state_dir: PathBuf,
    /// The cgroup of all processes of this node, below the cgroup2 mount; the ebpf mode balances what they connect to.
    #[arg(long, value_name = "PATH", default_value = "/")]
    pub node_cgroup: PathBuf,
    #[command(flatten)]
    flags: Flags,
}

/// Those that the file replaces.
#[derive(Args, Debug, Clone, Default)]
#[command(next_help_heading = "Instead of --config")]
struct Flags {
    /// How Services reach the kernel: nftables, iptables …
    #[arg(long, value_name = "MODE")]
    proxy_mode: Option<String>,
    /// The node's primary address, if not the Node object's.
    #[arg(long, value_name = "IP")]
    bind_address: Option<IpAddr>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    bind_address_hard_fail: Option<bool>,
    /// Where /healthz and /livez answer; empty: nowhere.
    #[arg(long, value_name = "IP[:PORT]")]
    healthz_bind_address: Option<String>,
    /// Where /metrics and /proxyMode answer; empty: nowhere.
    #[arg(long, value_name = "IP[:PORT]")]
    metrics_bind_address: Option<String>,
    /// Deprecated; 0: nowhere.
    #[arg(long, value_name = "PORT", conflicts_with = "healthz_bind_address")]
    healthz_port: Option<u16>,
    /// Deprecated; 0: nowhere.
    #[arg(long, value_name = "PORT", conflicts_with = "metrics_bind_address")]
    metrics_port: Option<u16>,
    /// Networks of the pods, one of each family.
    #[arg(long, value_name = "CIDR[,CIDR]")]
    cluster_cidr: Option<String>,
    /// ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix.
    #[arg(long, value_name = "MODE")]
    detect_local_mode: Option<String>,
    #[arg(long, value_name = "NAME")]
    pod_bridge_interface: Option<String>,
    #[arg(long, value_name = "PREFIX")]
    pod_interface_name_prefix: Option<String>,
    /// Networks, or primary, localhost, all.
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    nodeport_addresses: Option<Vec<String>>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    masquerade_all: Option<bool>,
    #[arg(long, value_name = "BIT")]
    iptables_masquerade_bit: Option<u8>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    iptables_localhost_nodeports: Option<bool>,
    #[arg(long, value_name = "DURATION")]
    iptables_sync_period: Option<GoDuration>,
    #[arg(long, value_name = "DURATION")]
    iptables_min_sync_period: Option<GoDuration>,
    #[arg(long, value_name = "DURATION")]
    ipvs_sync_period: Option<GoDuration>,
    #[arg(long, value_name = "DURATION")]
    ipvs_min_sync_period: Option<GoDuration>,
    #[arg(long, value_name = "NAME")]
    ipvs_scheduler: Option<String>,
    #[arg(long, value_name = "LIST", value_delimiter = ',')]
    ipvs_exclude_cidrs: Option<Vec<String>>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    ipvs_strict_arp: Option<bool>,
    #[arg(long, value_name = "DURATION")]
    ipvs_tcp_timeout: Option<GoDuration>,
    #[arg(long, value_name = "DURATION")]
    ipvs_tcpfin_timeout: Option<GoDuration>,
    #[arg(long, value_name = "DURATION")]
    ipvs_udp_timeout: Option<GoDuration>,
    #[arg(long, value_name = "COUNT")]
    conntrack_max_per_core: Option<u32>,
    #[arg(long, value_name = "COUNT")]
    conntrack_min: Option<u32>,
    #[arg(long, value_name = "DURATION")]
    conntrack_tcp_timeout_established: Option<GoDuration>,
    #[arg(long, value_name = "DURATION")]
    conntrack_tcp_timeout_close_wait: Option<GoDuration>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    conntrack_tcp_be_liberal: Option<bool>,
    #[arg(long, value_name = "DURATION")]
    conntrack_udp_timeout: Option<GoDuration>,
    #[arg(long, value_name = "DURATION")]
    conntrack_udp_timeout_stream: Option<GoDuration>,
    #[arg(long, value_name = "DURATION")]
    config_sync_period: Option<GoDuration>,
    #[arg(long, value_name = "SCORE", allow_hyphen_values = true)]
    oom_score_adj: Option<i32>,
    /// NAME=true or NAME=false.
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = gate)]
    feature_gates: Option<Vec<(String, bool)>>,
    #[arg(long, value_name = "TYPE")]
    kube_api_content_type: Option<String>,
    #[arg(long, value_name = "COUNT")]
    kube_api_burst: Option<i32>,
    #[arg(long, value_name = "COUNT")]
    kube_api_qps: Option<f32>,
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    profiling: Option<bool>,
    #[arg(long, value_name = "VERSION")]
    show_hidden_metrics_for_version: Option<String>,
    #[arg(long, value_name = "FORMAT")]
    logging_format: Option<String>,
    #[arg(long, value_name = "DURATION")]
    log_flush_frequency: Option<GoDuration>,
}

fn gate(text: &str) -> Result<(String, bool), String> {
    let wrong = || format!("{text:?} is not NAME=true or NAME=false");
    let (name, value) = text.split_once('=').ok_or_else(wrong)?;
    Ok((name.trim().to_owned(), value.trim().parse().map_err(|_| wrong())?))
}

/// `None` where nothing in the section is set, so that it does not count as said.
fn section<T: Default + PartialEq>(section: T) -> Option<T> {
    (section != T::default()).then_some(section)
}

impl Flags {
    fn configuration(self) -> Configuration {
        let port = |any: &str, port: Option<u16>| port.filter(|port| *port != 0).map(|port| format!("{any}:{port}"));
        let v6 = self.bind_address.is_some_and(|address| address.is_ipv6());
        let (any, loopback) = if v6 { ("[::]", "[::1]") } else { ("0.0.0.0", "127.0.0.1") };
        Configuration {
            feature_gates: self.feature_gates.map(|gates| gates.into_iter().collect()),
            client_connection: section(ClientConnection {
                content_type: self.kube_api_content_type,
                qps: self.kube_api_qps,
                burst: self.kube_api_burst,
                ..ClientConnection::default()
            }),
            logging: section(Logging {
                format: self.logging_format,
                flush_frequency: self.log_flush_frequency,
                ..Logging::default()
            }),
            bind_address: self.bind_address.map(|address| address.to_string()),
            healthz_bind_address: self.healthz_bind_address.or(port(any, self.healthz_port)),
            metrics_bind_address: self.metrics_bind_address.or(port(loopback, self.metrics_port)),
            bind_address_hard_fail: self.bind_address_hard_fail,
            enable_profiling: self.profiling,
            show_hidden_metrics_for_version: self.show_hidden_metrics_for_version,
            mode: self.proxy_mode,
            iptables: section(Iptables {
                masquerade_bit: self.iptables_masquerade_bit,
                masquerade_all: self.masquerade_all,
                localhost_node_ports: self.iptables_localhost_nodeports,
                sync_period: self.iptables_sync_period,
                min_sync_period: self.iptables_min_sync_period,
                ..Iptables::default()
            }),
            ipvs: section(Ipvs {
                sync_period: self.ipvs_sync_period,
                min_sync_period: self.ipvs_min_sync_period,
                scheduler: self.ipvs_scheduler,
                exclude_cidrs: self.ipvs_exclude_cidrs,
                strict_arp: self.ipvs_strict_arp,
                tcp_timeout: self.ipvs_tcp_timeout,
                tcp_fin_timeout: self.ipvs_tcpfin_timeout,
                udp_timeout: self.ipvs_udp_timeout,
            }),
            // kube-proxy's flags of the iptables mode are those of the nftables mode, too.
            nftables: section(Nftables {
                masquerade_bit: None,
                masquerade_all: self.masquerade_all,
                sync_period: self.iptables_sync_period,
                min_sync_period: self.iptables_min_sync_period,
            }),
            detect_local_mode: self.detect_local_mode,
            detect_local: section(DetectLocal {
                bridge_interface: self.pod_bridge_interface,
                interface_name_prefix: self.pod_interface_name_prefix,
            }),
            cluster_cidr: self.cluster_cidr,
            node_port_addresses: self.nodeport_addresses,
            oom_score_adj: self.oom_score_adj,
            conntrack: section(ConntrackSection {
                max_per_core: self.conntrack_max_per_core,
                min: self.conntrack_min,
                tcp_established_timeout: self.conntrack_tcp_timeout_established,
                tcp_close_wait_timeout: self.conntrack_tcp_timeout_close_wait,
                tcp_be_liberal: self.conntrack_tcp_be_liberal,
                udp_timeout: self.conntrack_udp_timeout,
                udp_stream_timeout: self.conntrack_udp_timeout_stream,
            }),
            config_sync_period: self.config_sync_period,
            ..Configuration::default()
        }
    }
}

impl ProxyArgs {
    /// The configuration that the flags alone mean.
    pub fn configuration(&self) -> Configuration {
        let whole = Configuration {
            api_version: Some(API_VERSION.into()),
            kind: Some(KIND.into()),
            ..self.flags.clone().configuration()
        };
        self.over(whole)
    }

    /// What may be said beside a file.
    pub fn over(&self, mut file: Configuration) -> Configuration {
        if let Some(name) = &self.hostname_override {
            file.hostname_override = Some(name.clone());
        }
        if let Some(path) = &self.kubeconfig {
            file.client_connection.get_or_insert_default().kubeconfig = Some(path.clone());
        }
        if let Some(level) = self.verbosity {
            file.logging.get_or_insert_default().verbosity = Some(level);
        }
        file
    }

    /// The fields that flags have set although a file decides.
    pub fn ignored(&self) -> Vec<String> {
        let set = serde_json::to_value(self.flags.clone().configuration()).map(pruned);
        match set {
            Ok(Value::Object(fields)) => fields.into_iter().map(|(name, _)| name).collect(),
            _ => Vec::new(),
        }
    }

    /// The gates, and the two flags that say the same as one each.
    pub fn features(&self, settings: &Settings) -> Features {
        let mut features = settings.features.clone();
        for (feature, on) in [(Feature::Ejection, self.ejection), (Feature::Retry, self.first_packet_retry)] {
            if !on {
                features.set(feature, false);
            }
        }
        features
    }

    /// An empty address and port 0 mean: nowhere. A file cannot say that.
    pub fn switch_off(&self, settings: &mut Settings) {
        if self.config.is_some() {
            return;
        }
        let off = |address: &Option<String>, port: Option<u16>| address.as_deref() == Some("") || port == Some(0);
        if off(&self.flags.healthz_bind_address, self.flags.healthz_port) {
            settings.healthz = None;
        }
        if off(&self.flags.metrics_bind_address, self.flags.metrics_port) {
            settings.metrics = None;
        }
    }
}

/// Without what is not set.
fn pruned(value: Value) -> Value {
    match value {
        Value::Object(fields) => fields
            .into_iter()
            .filter(|(_, value)| !value.is_null())
            .map(|(name, value)| (name, pruned(value)))
            .collect(),
        other => other,
    }
}

/// A configuration as a file.
pub fn written(configuration: &Configuration) -> anyhow::Result<String> {
    serde_saphyr::to_string(&pruned(serde_json::to_value(configuration)?)).context("write YAML")
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use proxy::Mode;
    use proxy::configuration::PodDetection;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        args: ProxyArgs,
    }

    fn parse(line: &str) -> Result<ProxyArgs, String> {
        let words = std::iter::once("proxy").chain(line.split_whitespace());
        Line::try_parse_from(words).map(|line| line.args).map_err(|error| error.to_string())
    }

    #[test]
    fn flags_mean_what_they_mean_to_kube_proxy() {
        let line = "--kubeconfig=/f --hostname-override=N1 --proxy-mode=iptables --cluster-cidr=10.0.0.0/8,fd00::/64 \
                    --masquerade-all --iptables-masquerade-bit=13 --iptables-localhost-nodeports=false \
                    --nodeport-addresses=192.0.2.0/24,primary --conntrack-max-per-core=0 --oom-score-adj=-998 \
                    --conntrack-tcp-timeout-established=24h --metrics-port=0 --healthz-bind-address=127.0.0.1 -v=4 \
                    --feature-gates=NFTablesProxyMode=true --iptables-sync-period=1m";
        let args = parse(line).expect("good flags");
        let mut settings = args.configuration().settings().expect("settings");
        args.switch_off(&mut settings);
        assert_eq!(settings.kubeconfig, Some("/f".into()));
        assert_eq!(settings.node_name.as_deref(), Some("n1"));
        assert_eq!((settings.mode, settings.masquerade_all, settings.masquerade_bit), (Mode::Iptables, true, 13));
        assert!(!settings.localhost_node_ports);
        assert!(matches!(&settings.pods, PodDetection::ClusterCidr(nets) if nets.len() == 2));
        assert_eq!((settings.node_port_addresses.len(), settings.oom_score_adj), (2, Some(-998)));
        assert_eq!(settings.conntrack.sysctls(8).len(), 1);
        assert_eq!((settings.metrics, settings.verbosity), (None, 4));
        assert_eq!(settings.healthz.map(|at| at.to_string()).as_deref(), Some("127.0.0.1:10256"));
        assert_eq!(settings.sync_period.as_secs(), 60);
    }

    #[test]
    fn unknown_flags_and_bad_values_are_named() {
        for (line, named) in [
            ("--proxymode=iptables", "--proxymode"),
            ("--conntrack-udp-timeout=soon", "--conntrack-udp-timeout"),
            ("--masquerade-all=perhaps", "--masquerade-all"),
            ("--feature-gates=A", "--feature-gates"),
            ("--bind-address=here", "--bind-address"),
        ] {
            let error = parse(line).expect_err(line);
            assert!(error.contains(named), "{error}");
        }
    }

    #[test]
    fn a_file_decides_but_for_what_differs_from_node_to_node() {
        let args = parse("--config=/f --hostname-override=a --proxy-mode=iptables --masquerade-all").expect("flags");
        assert_eq!(args.ignored(), ["iptables", "mode", "nftables"]);
        let file = Configuration { hostname_override: Some("b".into()), ..Configuration::default() };
        let settings = args.over(file).settings().expect("settings");
        assert_eq!((settings.node_name.as_deref(), settings.mode), (Some("a"), Mode::Nftables));
    }

    #[test]
    fn what_is_written_is_read_back() {
        let args =
            parse("--conntrack-min=5 --ipvs-strict-arp --config-sync-period=15m --kube-api-qps=10").expect("flags");
        let configuration = args.configuration();
        let text = written(&configuration).expect("YAML");
        assert_eq!(Configuration::parse(&text).expect("readable"), configuration, "{text}");
    }
}
