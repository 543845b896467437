//! The view of the node that a stand-alone proxy makes of its Node object, its settings and its interfaces.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;

use proxy::configuration::{NodePortAddress, PodDetection, Settings, node_port_addresses};
use proxy::{Mode, NodeView, Pods, Taker};
use services::{Place, Selection};

use crate::node_object::Node;
use crate::service_cidrs::ServiceCidrs;

/// Addresses of the ipvs mode's own device belong to Services, not to the node.
pub fn is_node_port_link(link: &str) -> bool {
    link != "kube-ipvs0"
}

/// Everything the view of the node is made from.
pub struct Inputs {
    settings: Settings,
    pub node: Option<Node>,
    /// `None` until they have been read.
    pub service_cidrs: Option<ServiceCidrs>,
    /// The addresses of the host's interfaces.
    pub held: Vec<IpAddr>,
    pub selection: Selection,
    pub direct_return: bool,
    pub takers: BTreeMap<Arc<str>, Taker>,
}

impl Inputs {
    pub fn new(settings: Settings) -> Self {
        Inputs {
            settings,
            node: None,
            service_cidrs: None,
            held: Vec::new(),
            selection: Selection::default(),
            direct_return: false,
            takers: BTreeMap::new(),
        }
    }

    /// `None` as long as nobody knows an address of the node, or where cluster IPs are: a view without these makes other rules than
    /// those that a proxy finds when it starts again.
    pub fn view(&self) -> Option<NodeView> {
        let settings = &self.settings;
        let (node, service_cidrs) = (self.node.as_ref()?, self.service_cidrs.as_ref()?);
        let mut addresses = node.addresses();
        if let Some(bind) = settings.bind_address {
            addresses.retain(|address| *address != bind);
            addresses.insert(0, bind);
        }
        if addresses.is_empty() {
            return None;
        }
        let mut pods = match &settings.pods {
            PodDetection::ClusterCidr(nets) => Pods::Cidrs(nets.clone()),
            PodDetection::NodeCidr => Pods::Cidrs(node.pod_cidrs()),
            PodDetection::Bridge(name) => Pods::Bridge(name.as_str().into()),
            PodDetection::InterfacePrefix(name) => Pods::InterfacePrefix(name.as_str().into()),
        };
        if let Pods::Cidrs(nets) = &mut pods {
            nets.dedup();
        }
        let place = Place { node: node.name().into(), zone: node.zone() };
        let mut view = NodeView::new(place, addresses, Vec::new(), service_cidrs.ranges());
        let is_usable = |address: &&IpAddr| match address {
            IpAddr::V4(_) => true,
            // A link-local address says nothing without its interface.
            IpAddr::V6(address) => !address.is_unicast_link_local(),
        };
        let held: Vec<IpAddr> = self.held.iter().filter(is_usable).copied().collect();
        view.node_port_addresses =
            node_port_addresses(&settings.node_port_addresses, settings.mode, &view.primary_addresses(), &held);
        // The iptables mode's rules reach 127.0.0.1 themselves.
        view.relay_localhost =
            settings.mode != Mode::Iptables && settings.node_port_addresses.contains(&NodePortAddress::Localhost);
        view.pods = pods;
        view.localhost_node_ports = settings.localhost_node_ports;
        view.masquerade_all = settings.masquerade_all;
        view.masquerade_bit = settings.masquerade_bit;
        view.ipvs = settings.ipvs.clone();
        view.selection = self.selection;
        view.direct_return = self.direct_return;
        view.takers = self.takers.clone();
        Some(view)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proxy::configuration::Configuration;
    use serde_json::json;

    fn inputs(configuration: &str, node: serde_json::Value) -> Inputs {
        let head = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";
        let file = Configuration::parse(&format!("{head}{configuration}")).expect("a configuration");
        let mut inputs = Inputs::new(file.settings().expect("settings"));
        inputs.node = Some(serde_json::from_value(node).expect("a Node"));
        inputs.service_cidrs = Some(ServiceCidrs::default());
        inputs
    }

    fn node() -> serde_json::Value {
        json!({
            "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "b"}},
            "spec": {"podCIDR": "10.244.3.0/24", "podCIDRs": ["10.244.3.0/24"], "taints": [{"key": "k", "effect": "NoSchedule"}]},
            "status": {"addresses": [
                {"type": "Hostname", "address": "n1"},
                {"type": "ExternalIP", "address": "198.51.100.1"},
                {"type": "InternalIP", "address": "192.0.2.1"},
                {"type": "InternalIP", "address": "2001:db8::1"},
            ]},
        })
    }

    #[test]
    fn the_view_is_made_from_node_and_settings() {
        let view = inputs("detectLocalMode: NodeCIDR", node()).view().expect("a view");
        assert_eq!((&*view.place.node, view.place.zone.as_deref()), ("n1", Some("b")));
        assert_eq!(view.addresses, ["192.0.2.1", "2001:db8::1"].map(|ip| ip.parse::<IpAddr>().expect("ip")));
        assert_eq!(view.pods, Pods::Cidrs(vec!["10.244.3.0/24".parse().expect("net")]));
        assert_eq!(view.node_port_addresses, None);

        let text = "bindAddress: 198.51.100.1\ndetectLocalMode: BridgeInterface\ndetectLocal: {bridgeInterface: br0}\n\
                    nodePortAddresses: [198.51.100.0/24]\nnftables: {masqueradeAll: true}";
        assert!(inputs("nodePortAddresses: [primary, localhost]", node()).view().expect("a view").relay_localhost);
        let mut with = inputs(text, node());
        with.held = ["127.0.0.1", "192.0.2.1", "198.51.100.1", "fe80::1"].map(|ip| ip.parse().expect("ip")).to_vec();
        let cidr = json!({"metadata": {"name": "kubernetes"}, "spec": {"cidrs": ["10.96.0.0/12"]}});
        let ranges = with.service_cidrs.as_mut().expect("they are known");
        ranges.take(reconcile::Change::Apply(serde_json::from_value(cidr).expect("a ServiceCIDR")));
        let view = with.view().expect("a view");
        assert_eq!(view.addresses[0].to_string(), "198.51.100.1");
        assert_eq!(view.node_port_addresses, Some(vec!["198.51.100.1".parse().expect("ip")]));
        assert_eq!((view.pods, view.masquerade_all), (Pods::Bridge("br0".into()), true));
        assert_eq!(view.service_cidrs.len(), 1);
    }

    #[test]
    fn what_the_rules_depend_on_is_waited_for() {
        let mut young = inputs("", json!({"metadata": {"name": "n1"}}));
        assert_eq!(young.view(), None);
        young.node = None;
        assert_eq!(young.view(), None);
        let mut early = inputs("", node());
        early.service_cidrs = None;
        assert_eq!(early.view(), None);
        assert!(inputs("bindAddress: 192.0.2.9", json!({"metadata": {"name": "n1"}})).view().is_some());
    }
}
