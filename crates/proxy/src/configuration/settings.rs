//! From the file's fields to what the proxy does.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnet::IpNet;
use linux::ipvs::{Scheduler, Timeouts};

use super::{
    Configuration, Conntrack, GoDuration, Logging, LoggingStreams, NodePortAddress, NumberOrText, Winkernel, problem,
};
use crate::{Error, Feature, Features, IpvsSettings, Mode};

/// Where kube-proxy answers probes and scrapes.
pub const HEALTHZ_PORT: u16 = 10256;
pub const METRICS_PORT: u16 = 10249;
const SYNC_PERIOD: Duration = Duration::from_secs(30);
/// Changes are committed as they come: a proxy that is asked to rest between commits for no longer than this does no wrong.
const MIN_SYNC_PERIOD: Duration = Duration::from_secs(1);
/// The connections of this proxy are four watches, and it writes an event now and then.
const REQUESTS_PER_SECOND: f32 = 5.0;
/// An interface name has room for 15 bytes.
const INTERFACE_NAME: usize = 15;

/// Feature gates of kube-proxy, and what this proxy does whether the gate is named or not.
const GATES: &[(&str, bool)] = &[
    ("AllowServiceExternalIPs", true),
    ("AllowServiceLBStatusOnNonLB", false),
    ("EndpointSliceProxying", true),
    ("IPv6DualStack", true),
    ("KubeProxyDrainingTerminatingNodes", true),
    ("KubeProxyNFTablesLocalhostNodePorts", true),
    ("LoadBalancerIPMode", true),
    ("MinimizeIPTablesRestore", true),
    ("MixedProtocolLBService", true),
    ("MultiCIDRServiceAllocator", true),
    ("NFTablesProxyMode", true),
    ("PreferSameTrafficDistribution", true),
    ("ProxyTerminatingEndpoints", true),
    ("SCTPSupport", true),
    ("ServiceInternalTrafficPolicy", true),
    ("ServiceTrafficDistribution", true),
    ("TopologyAwareHints", true),
];

/// How packets of pods are told from those of the outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodDetection {
    /// By these networks; without any nothing counts as outside.
    ClusterCidr(Vec<IpNet>),
    /// By the Node object's own pod CIDRs.
    NodeCidr,
    Bridge(String),
    InterfacePrefix(String),
}

/// What a stand-alone proxy is to do.
#[derive(Clone, Debug, PartialEq)]
pub struct Settings {
    /// `None`: as a pod, with the service account that is mounted into it.
    pub kubeconfig: Option<PathBuf>,
    /// The Node's name; `None`: the host's.
    pub node_name: Option<String>,
    /// The node's primary address of its family, if not the Node object's.
    pub bind_address: Option<IpAddr>,
    /// Where probes are answered; `None`: nowhere.
    pub healthz: Option<SocketAddr>,
    pub metrics: Option<SocketAddr>,
    /// A port of these two that cannot be opened ends the process.
    pub bind_hard_fail: bool,
    pub mode: Mode,
    /// A change that waits for twice as long makes the proxy unhealthy.
    pub sync_period: Duration,
    pub masquerade_all: bool,
    pub masquerade_bit: u8,
    pub localhost_node_ports: bool,
    pub pods: PodDetection,
    pub node_port_addresses: Vec<NodePortAddress>,
    pub oom_score_adj: Option<i32>,
    pub conntrack: Conntrack,
    /// What the ipvs mode asks for; default values in other modes.
    pub ipvs: IpvsSettings,
    /// What this proxy does beyond kube-proxy: feature gates of its own.
    pub features: Features,
    /// klog's: from 4 on the log is verbose.
    pub verbosity: u32,
}

/// The parts that every kernel mode has of its own.
#[derive(Default)]
struct Section {
    name: &'static str,
    masquerade_bit: Option<u8>,
    masquerade_all: bool,
    localhost_node_ports: Option<bool>,
    sync_period: Option<GoDuration>,
    min_sync_period: Option<GoDuration>,
}

fn text(value: Option<&String>) -> Option<&str> {
    value.map(String::as_str).filter(|value| !value.is_empty())
}

fn refuse(field: &str, wanted: bool, why: &str) -> Result<(), Error> {
    if wanted { Err(problem(field, why)) } else { Ok(()) }
}

impl Configuration {
    /// What the fields come to.
    ///
    /// # Errors
    /// A value makes no sense or asks for what this proxy does not do; says which and what to do.
    pub fn settings(&self) -> Result<Settings, Error> {
        self.refuse_what_is_not_done()?;
        let mode = match text(self.mode.as_ref()) {
            Some(mode) => mode.parse::<Mode>().map_err(|error| problem("mode", error.to_string()))?,
            None => Mode::default(),
        };
        let section = self.section(mode);
        if let Some(bit @ 32..) = section.masquerade_bit {
            return Err(problem(&format!("{}.masqueradeBit", section.name), format!("{bit} is not between 0 and 31")));
        }
        if section.min_sync_period.is_some_and(|period| period.0 > MIN_SYNC_PERIOD) {
            let why = "changes are committed as they come, and nothing is gained by waiting; leave it out";
            return Err(problem(&format!("{}.minSyncPeriod", section.name), why));
        }
        let bind_address = match text(self.bind_address.as_ref()) {
            Some(address) => Some(
                address
                    .parse::<IpAddr>()
                    .map_err(|_| problem("bindAddress", format!("{address:?} is no IP address")))?,
            ),
            None => None,
        };
        let v6 = bind_address.is_some_and(|address| address.is_ipv6());
        let (any, loopback): (IpAddr, IpAddr) = match v6 {
            false => (Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::LOCALHOST.into()),
            true => (Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::LOCALHOST.into()),
        };
        let healthz = SocketAddr::new(any, HEALTHZ_PORT);
        let metrics = SocketAddr::new(loopback, METRICS_PORT);
        let sync_period = section.sync_period.map(|period| period.0).filter(|period| !period.is_zero());
        let client = self.client_connection.as_ref();
        Ok(Settings {
            kubeconfig: client.and_then(|client| text(client.kubeconfig.as_ref())).map(PathBuf::from),
            node_name: text(self.hostname_override.as_ref()).map(|name| name.trim().to_lowercase()),
            bind_address: bind_address.filter(|address| !address.is_unspecified()),
            healthz: Some(listen("healthzBindAddress", self.healthz_bind_address.as_ref(), healthz)?),
            metrics: Some(listen("metricsBindAddress", self.metrics_bind_address.as_ref(), metrics)?),
            bind_hard_fail: self.bind_address_hard_fail.unwrap_or(false),
            mode,
            sync_period: sync_period.unwrap_or(SYNC_PERIOD),
            masquerade_all: section.masquerade_all,
            masquerade_bit: section.masquerade_bit.unwrap_or(14),
            localhost_node_ports: section.localhost_node_ports.unwrap_or(true),
            pods: self.pods(mode)?,
            node_port_addresses: self.node_port_addresses()?,
            oom_score_adj: self.oom_score_adj()?,
            conntrack: self.conntrack(),
            ipvs: self.ipvs_settings(mode)?,
            features: self.features(),
            verbosity: self.logging.as_ref().and_then(|logging| logging.verbosity).unwrap_or(0),
        })
    }

    fn section(&self, mode: Mode) -> Section {
        match mode {
            Mode::Iptables => self.iptables.as_ref().map_or_else(
                || Section { name: "iptables", ..Section::default() },
                |section| Section {
                    name: "iptables",
                    masquerade_bit: section.masquerade_bit,
                    masquerade_all: section.masquerade_all.unwrap_or(false),
                    localhost_node_ports: section.localhost_node_ports,
                    sync_period: section.sync_period,
                    min_sync_period: section.min_sync_period,
                },
            ),
            // As kube-proxy: this mode has periods of its own, and masquerades as the iptables section says.
            Mode::Ipvs => {
                let (masquerade, periods) = (self.section(Mode::Iptables), self.ipvs.as_ref());
                Section {
                    name: "ipvs",
                    localhost_node_ports: None,
                    sync_period: periods.and_then(|section| section.sync_period),
                    min_sync_period: periods.and_then(|section| section.min_sync_period),
                    ..masquerade
                }
            }
            // The modes that kube-proxy does not have share the section of the one they are closest to.
            _ => self.nftables.as_ref().map_or_else(
                || Section { name: "nftables", ..Section::default() },
                |section| Section {
                    name: "nftables",
                    masquerade_bit: section.masquerade_bit,
                    masquerade_all: section.masquerade_all.unwrap_or(false),
                    localhost_node_ports: None,
                    sync_period: section.sync_period,
                    min_sync_period: section.min_sync_period,
                },
            ),
        }
    }

    fn ipvs_settings(&self, mode: Mode) -> Result<IpvsSettings, Error> {
        let Some(section) = self.ipvs.as_ref().filter(|_| mode == Mode::Ipvs) else {
            return Ok(IpvsSettings::default());
        };
        let scheduler = match text(section.scheduler.as_ref()) {
            Some(name) => {
                name.parse().map_err(|error: linux::ipvs::Error| problem("ipvs.scheduler", error.to_string()))?
            }
            None => Scheduler::default(),
        };
        let excluded = section.exclude_cidrs.as_ref().is_some_and(|cidrs| !cidrs.is_empty());
        let why = "virtual servers of others are left alone unless their address is on kube-ipvs0; leave it out";
        refuse("ipvs.excludeCIDRs", excluded, why)?;
        let seconds = |field: &str, period: Option<GoDuration>| {
            u32::try_from(period.map_or(0, |period| period.0.as_secs()))
                .map_err(|_| problem(field, "it is longer than the kernel can count"))
        };
        Ok(IpvsSettings {
            scheduler,
            strict_arp: section.strict_arp.unwrap_or(false),
            timeouts: Timeouts {
                tcp: seconds("ipvs.tcpTimeout", section.tcp_timeout)?,
                tcp_fin: seconds("ipvs.tcpFinTimeout", section.tcp_fin_timeout)?,
                udp: seconds("ipvs.udpTimeout", section.udp_timeout)?,
            },
        })
    }

    fn pods(&self, mode: Mode) -> Result<PodDetection, Error> {
        let found = self.pod_detection()?;
        let by_interface = matches!(found, PodDetection::Bridge(_) | PodDetection::InterfacePrefix(_));
        let why = format!("the mode {mode} knows pods by their networks only; use ClusterCIDR or NodeCIDR");
        refuse("detectLocalMode", by_interface && !matches!(mode, Mode::Nftables | Mode::Iptables), &why)?;
        Ok(found)
    }

    fn pod_detection(&self) -> Result<PodDetection, Error> {
        let section = self.detect_local.as_ref();
        let interface = |field: &str, value: Option<&String>| match text(value) {
            None => Err(problem(
                field,
                format!("detectLocalMode {} needs it", self.detect_local_mode.as_deref().unwrap_or("")),
            )),
            // It goes into rules as it is.
            Some(name)
                if name.len() > INTERFACE_NAME
                    || !name.bytes().all(|b| b.is_ascii_graphic() && !b"/\"*+".contains(&b)) =>
            {
                Err(problem(field, format!("{name:?} is no interface name")))
            }
            Some(name) => Ok(name.to_owned()),
        };
        match text(self.detect_local_mode.as_ref()).unwrap_or("ClusterCIDR") {
            "ClusterCIDR" => {
                let nets = text(self.cluster_cidr.as_ref()).unwrap_or_default().split(',').map(str::trim);
                let nets = nets.filter(|net| !net.is_empty()).map(|net| {
                    let wrong = |_| problem("clusterCIDR", format!("{net:?} is no network such as 10.244.0.0/16"));
                    net.parse::<IpNet>().map(|net| net.trunc()).map_err(wrong)
                });
                Ok(PodDetection::ClusterCidr(nets.collect::<Result<_, _>>()?))
            }
            "NodeCIDR" => Ok(PodDetection::NodeCidr),
            "BridgeInterface" => {
                let name = section.and_then(|section| section.bridge_interface.as_ref());
                interface("detectLocal.bridgeInterface", name).map(PodDetection::Bridge)
            }
            "InterfaceNamePrefix" => {
                let name = section.and_then(|section| section.interface_name_prefix.as_ref());
                interface("detectLocal.interfaceNamePrefix", name).map(PodDetection::InterfacePrefix)
            }
            other => Err(problem(
                "detectLocalMode",
                format!("{other:?} is none of ClusterCIDR, NodeCIDR, BridgeInterface and InterfaceNamePrefix"),
            )),
        }
    }

    fn node_port_addresses(&self) -> Result<Vec<NodePortAddress>, Error> {
        let list = self.node_port_addresses.iter().flatten();
        list.map(|entry| entry.parse().map_err(|error: String| problem("nodePortAddresses", error))).collect()
    }

    fn oom_score_adj(&self) -> Result<Option<i32>, Error> {
        match self.oom_score_adj {
            Some(score) if !(-1000..=1000).contains(&score) => {
                Err(problem("oomScoreAdj", format!("{score} is not between -1000 and 1000")))
            }
            score => Ok(score),
        }
    }

    fn conntrack(&self) -> Conntrack {
        let section = self.conntrack.clone().unwrap_or_default();
        let time = |wanted: Option<GoDuration>| wanted.map(|time| time.0);
        Conntrack {
            max_per_core: section.max_per_core,
            min: section.min,
            tcp_established: time(section.tcp_established_timeout),
            tcp_close_wait: time(section.tcp_close_wait_timeout),
            tcp_be_liberal: section.tcp_be_liberal.unwrap_or(false),
            udp: time(section.udp_timeout),
            udp_stream: time(section.udp_stream_timeout),
        }
    }

    fn features(&self) -> Features {
        let mut features = Features::default();
        for (gate, on) in self.feature_gates.iter().flatten() {
            if let Some(feature) = Feature::of_gate(gate) {
                features.set(feature, *on);
            }
        }
        features
    }

    fn refuse_what_is_not_done(&self) -> Result<(), Error> {
        for (gate, wanted) in self.feature_gates.iter().flatten() {
            let field = format!("featureGates.{gate}");
            match GATES.iter().find(|(known, _)| known == gate) {
                None if Feature::of_gate(gate).is_some() => {}
                None => return Err(problem(&field, "this gate is not known; take it out")),
                Some((_, done)) => {
                    refuse(&field, done != wanted, &format!("it is always {done} here; take it out"))?;
                }
            }
        }
        if let Some(client) = &self.client_connection {
            for (field, value) in
                [("contentType", &client.content_type), ("acceptContentTypes", &client.accept_content_types)]
            {
                // Protobuf is what kube-proxy asks for by default.
                let known =
                    |kind: &str| matches!(kind.trim(), "application/json" | "application/vnd.kubernetes.protobuf");
                let wrong = text(value.as_ref()).is_some_and(|kinds| !kinds.split(',').any(known));
                refuse(&format!("clientConnection.{field}"), wrong, "JSON is what is spoken here; leave it empty")?;
            }
            let slow = client.qps.is_some_and(|qps| qps > 0.0 && qps < REQUESTS_PER_SECOND);
            let why = "fewer than 5 requests a second cannot be promised, though there are hardly any; leave it out";
            refuse("clientConnection.qps", slow, why)?;
        }
        if let Some(logging) = &self.logging {
            refuse_logging(logging)?;
        }
        refuse("enableProfiling", self.enable_profiling == Some(true), "there is no pprof here; set it to false")?;
        let hidden = text(self.show_hidden_metrics_for_version.as_ref()).is_some();
        refuse("showHiddenMetricsForVersion", hidden, "no metric is hidden here; leave it empty")?;
        let windows = "this proxy runs on Linux only; leave it out";
        refuse("windowsRunAsService", self.windows_run_as_service == Some(true), windows)?;
        if let Some(Winkernel {
            network_name,
            source_vip,
            enable_dsr,
            root_hns_endpoint_name,
            forward_health_check_vip,
        }) = &self.winkernel
        {
            let texts = [network_name, source_vip, root_hns_endpoint_name];
            let flags = [enable_dsr, forward_health_check_vip];
            let used = texts.iter().any(|value| text(value.as_ref()).is_some()) || flags.contains(&&Some(true));
            refuse("winkernel", used, windows)?;
        }
        let from_node = self.iptables.as_ref().is_some_and(|section| section.snat_node_internal_ip == Some(true));
        let why = "packets are masqueraded with the address of the interface they leave through; set it to false";
        refuse("iptables.snatNodeInternalIP", from_node, why)
    }
}

fn refuse_logging(logging: &Logging) -> Result<(), Error> {
    let format = text(logging.format.as_ref()).unwrap_or("text");
    refuse("logging.format", format != "text", "only text is written; leave it out")?;
    let by_file = logging.vmodule.as_ref().is_some_and(|list| !list.is_empty());
    refuse(
        "logging.vmodule",
        by_file,
        "choose log lines by module with the environment's RUST_LOG=proxy=debug instead",
    )?;
    let Some(options) = &logging.options else { return Ok(()) };
    for (name, streams) in [("text", &options.text), ("json", &options.json)] {
        let Some(LoggingStreams { split_stream, info_buffer_size }) = streams else { continue };
        let buffered = match info_buffer_size {
            None | Some(NumberOrText::Number(0)) => false,
            Some(NumberOrText::Number(_)) => true,
            Some(NumberOrText::Text(size)) => !matches!(size.as_str(), "" | "0"),
        };
        let why = "log lines go to standard error at once; leave it out";
        refuse(&format!("logging.options.{name}"), *split_stream == Some(true) || buffered, why)?;
    }
    Ok(())
}

/// An address with or without a port.
fn listen(field: &str, value: Option<&String>, default: SocketAddr) -> Result<SocketAddr, Error> {
    let Some(value) = text(value) else { return Ok(default) };
    let bare = value.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(value);
    if let Ok(address) = bare.parse::<IpAddr>() {
        return Ok(SocketAddr::new(address, default.port()));
    }
    value
        .parse()
        .map_err(|_| problem(field, format!("{value:?} is no address such as {default} or [::]:{}", default.port())))
}
