//! kube-proxy's configuration file, as data: what a fragment comes to, or which field an error names.

use std::net::SocketAddr;

use proxy::Mode;
use proxy::configuration::{Configuration, PodDetection, Settings};

fn settings(fragment: &str) -> Result<Settings, String> {
    let text = format!("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n{fragment}\n");
    let read = Configuration::parse(&text).map_err(|error| error.to_string())?;
    read.settings().map_err(|error| error.to_string())
}

fn at(text: &str) -> Option<SocketAddr> {
    Some(text.parse().expect("an address"))
}

/// A fragment of a file, and what has to be true of the settings.
type Case = (&'static str, fn(&Settings) -> bool);

#[test]
fn fields_come_to_what_they_come_to_in_kube_proxy() {
    let cases: &[Case] = &[
        ("", |s| s.mode == Mode::Nftables && s.healthz == at("0.0.0.0:10256") && s.metrics == at("127.0.0.1:10249")),
        ("", |s| s.pods == PodDetection::ClusterCidr(vec![]) && s.node_port_addresses.is_empty() && s.verbosity == 0),
        ("", |s| s.sync_period.as_secs() == 30 && s.localhost_node_ports && s.masquerade_bit == 14),
        ("", |s| s.conntrack.sysctls(64).is_empty() && s.oom_score_adj.is_none() && !s.bind_hard_fail),
        ("mode: \"\"", |s| s.mode == Mode::Nftables),
        ("mode: iptables", |s| s.mode == Mode::Iptables),
        ("bindAddress: 192.0.2.1", |s| s.bind_address.is_some() && s.healthz == at("0.0.0.0:10256")),
        ("bindAddress: 0.0.0.0", |s| s.bind_address.is_none()),
        ("bindAddress: '::'", |s| s.healthz == at("[::]:10256") && s.metrics == at("[::1]:10249")),
        ("metricsBindAddress: 0.0.0.0", |s| s.metrics == at("0.0.0.0:10249")),
        ("metricsBindAddress: '[::]'", |s| s.metrics == at("[::]:10249")),
        ("metricsBindAddress: 0.0.0.0:9", |s| s.metrics == at("0.0.0.0:9")),
        ("healthzBindAddress: '[2001:db8::1]:80'", |s| s.healthz == at("[2001:db8::1]:80")),
        ("bindAddressHardFail: true", |s| s.bind_hard_fail),
        ("hostnameOverride: Node-1", |s| s.node_name.as_deref() == Some("node-1")),
        ("clientConnection: {kubeconfig: /var/lib/kube-proxy/kubeconfig.conf, qps: 0, burst: 0}", |s| {
            s.kubeconfig.as_deref() == Some("/var/lib/kube-proxy/kubeconfig.conf".as_ref())
        }),
        ("clientConnection: {contentType: application/vnd.kubernetes.protobuf, qps: 10}", |s| s.kubeconfig.is_none()),
        (
            "clusterCIDR: 10.244.0.0/16,fd00:10:244::/56",
            |s| matches!(&s.pods, PodDetection::ClusterCidr(nets) if nets.len() == 2),
        ),
        ("detectLocalMode: NodeCIDR\nclusterCIDR: 10.0.0.0/8", |s| s.pods == PodDetection::NodeCidr),
        ("detectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: cbr0}", |s| {
            s.pods == PodDetection::Bridge("cbr0".into())
        }),
        ("detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: veth}", |s| {
            s.pods == PodDetection::InterfacePrefix("veth".into())
        }),
        ("nodePortAddresses: [192.0.2.0/24, localhost]", |s| s.node_port_addresses.len() == 2),
        ("nodePortAddresses: null", |s| s.node_port_addresses.is_empty()),
        ("nftables: {masqueradeAll: true, syncPeriod: 1m}", |s| s.masquerade_all && s.sync_period.as_secs() == 60),
        ("mode: iptables\nnftables: {masqueradeAll: true}", |s| !s.masquerade_all),
        ("mode: iptables\niptables: {masqueradeAll: true, masqueradeBit: 13, localhostNodePorts: false}", |s| {
            s.masquerade_all && s.masquerade_bit == 13 && !s.localhost_node_ports
        }),
        ("iptables: {minSyncPeriod: 1h}", |s| s.mode == Mode::Nftables),
        ("nftables: {minSyncPeriod: 1s}", |s| s.sync_period.as_secs() == 30),
        ("conntrack: {maxPerCore: 0, min: 131072}", |s| s.conntrack.sysctls(64).is_empty()),
        ("conntrack: {maxPerCore: 32768, tcpEstablishedTimeout: 24h0m0s}", |s| s.conntrack.sysctls(2).len() == 2),
        ("oomScoreAdj: -998", |s| s.oom_score_adj == Some(-998)),
        ("logging: {format: text, verbosity: 4, flushFrequency: 5000000000}", |s| s.verbosity == 4),
        ("featureGates: {NFTablesProxyMode: true, KubeProxyNFTablesLocalhostNodePorts: true}", |s| s.verbosity == 0),
        ("ipvs: {scheduler: lc, strictARP: true, excludeCIDRs: [192.0.2.0/24], tcpTimeout: 0s}", |s| s.verbosity == 0),
    ];
    for (fragment, holds) in cases {
        let found = settings(fragment).unwrap_or_else(|error| panic!("{fragment}: {error}"));
        assert!(holds(&found), "{fragment}: {found:?}");
    }
}

#[test]
fn what_is_unknown_wrong_or_not_done_is_named_with_what_to_do() {
    let cases = [
        ("nodePortAddress: []", &["nodePortAddress", "unknown field"][..]),
        ("iptables: {masquerade: true}", &["masquerade", "unknown field"]),
        ("udpIdleTimeout: 250ms", &["udpIdleTimeout"]),
        ("mode: kernelspace", &["mode", "kernelspace"]),
        ("mode: 5", &["mode"]),
        ("bindAddress: here", &["bindAddress", "\"here\""]),
        ("healthzBindAddress: 0.0.0.0:70000", &["healthzBindAddress", "0.0.0.0:10256"]),
        ("clusterCIDR: 10.244.0.0", &["clusterCIDR", "10.244.0.0"]),
        ("detectLocalMode: Guess", &["detectLocalMode", "NodeCIDR"]),
        ("detectLocalMode: BridgeInterface", &["detectLocal.bridgeInterface", "needs it"]),
        ("detectLocalMode: InterfaceNamePrefix\ndetectLocal: {interfaceNamePrefix: 'a b'}", &["interfaceNamePrefix"]),
        ("nodePortAddresses: [nearby]", &["nodePortAddresses", "primary, localhost or all"]),
        ("nftables: {syncPeriod: soon}", &["soon", "30s"]),
        ("nftables: {minSyncPeriod: 10s}", &["nftables.minSyncPeriod", "leave it out"]),
        ("mode: iptables\niptables: {masqueradeBit: 32}", &["iptables.masqueradeBit", "31"]),
        ("iptables: {snatNodeInternalIP: true}", &["snatNodeInternalIP", "false"]),
        ("enableProfiling: true", &["enableProfiling", "false"]),
        ("showHiddenMetricsForVersion: '1.30'", &["showHiddenMetricsForVersion"]),
        ("windowsRunAsService: true", &["windowsRunAsService"]),
        ("winkernel: {enableDSR: true}", &["winkernel", "Linux"]),
        ("featureGates: {NoSuchGate: true}", &["featureGates.NoSuchGate", "take it out"]),
        ("featureGates: {NFTablesProxyMode: false}", &["featureGates.NFTablesProxyMode", "always true"]),
        ("logging: {format: json}", &["logging.format", "text"]),
        ("logging: {vmodule: [{filePattern: a, verbosity: 2}]}", &["logging.vmodule", "RUST_LOG"]),
        ("logging: {options: {json: {infoBufferSize: 1k}}}", &["logging.options.json"]),
        ("clientConnection: {contentType: text/plain}", &["clientConnection.contentType", "JSON"]),
        ("clientConnection: {qps: 0.5}", &["clientConnection.qps"]),
        ("oomScoreAdj: 2000", &["oomScoreAdj", "1000"]),
    ];
    for (fragment, parts) in cases {
        let error = settings(fragment).expect_err(fragment);
        for part in parts {
            assert!(error.contains(part), "{fragment}: {part:?} is not in {error:?}");
        }
    }
    for (text, named) in [
        ("kind: KubeProxyConfiguration", "apiVersion"),
        ("apiVersion: kubeproxy.config.k8s.io/v1alpha2\nkind: KubeProxyConfiguration", "v1alpha2"),
        ("apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeletConfiguration", "KubeletConfiguration"),
        ("[1, 2]", "configuration"),
    ] {
        let error = Configuration::parse(text).expect_err(text).to_string();
        assert!(error.contains(named), "{text}: {error}");
    }
}

/// What kubeadm writes: every field, most of them empty.
#[test]
fn the_file_that_kubeadm_writes_is_read() {
    let found = settings(
        "bindAddress: 0.0.0.0\nbindAddressHardFail: false\nclientConnection:\n  acceptContentTypes: \"\"\n  burst: 0\n  \
         contentType: \"\"\n  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf\n  qps: 0\nclusterCIDR: 10.244.0.0/16\n\
         configSyncPeriod: 0s\nconntrack:\n  maxPerCore: null\n  min: null\n  tcpBeLiberal: false\n  tcpCloseWaitTimeout: null\n  \
         tcpEstablishedTimeout: null\n  udpStreamTimeout: 0s\n  udpTimeout: 0s\ndetectLocal:\n  bridgeInterface: \"\"\n  \
         interfaceNamePrefix: \"\"\ndetectLocalMode: \"\"\nenableProfiling: false\nhealthzBindAddress: \"\"\nhostnameOverride: \"\"\n\
         iptables:\n  localhostNodePorts: null\n  masqueradeAll: false\n  masqueradeBit: null\n  minSyncPeriod: 0s\n  syncPeriod: 0s\n\
         ipvs:\n  excludeCIDRs: null\n  minSyncPeriod: 0s\n  scheduler: \"\"\n  strictARP: false\n  syncPeriod: 0s\n  \
         tcpFinTimeout: 0s\n  tcpTimeout: 0s\n  udpTimeout: 0s\nlogging:\n  flushFrequency: 0\n  options:\n    json:\n      \
         infoBufferSize: \"0\"\n    text:\n      infoBufferSize: \"0\"\n  verbosity: 0\nmetricsBindAddress: \"\"\nmode: \"\"\n\
         nftables:\n  masqueradeAll: false\n  masqueradeBit: null\n  minSyncPeriod: 0s\n  syncPeriod: 0s\nnodePortAddresses: null\n\
         oomScoreAdj: null\nportRange: \"\"\nshowHiddenMetricsForVersion: \"\"\nwinkernel:\n  enableDSR: false\n  \
         forwardHealthCheckVip: false\n  networkName: \"\"\n  rootHnsEndpointName: \"\"\n  sourceVip: \"\"",
    )
    .expect("kubeadm's file");
    assert_eq!((found.mode, found.sync_period.as_secs(), found.masquerade_bit), (Mode::Nftables, 30, 14));
    assert!(matches!(&found.pods, PodDetection::ClusterCidr(nets) if nets.len() == 1));
}
