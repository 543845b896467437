//! Where each kind that our own components use lives in the API.

/// Group, version, plural and kind of a resource: what a URL and an object's head are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Resource {
    pub group: &'static str,
    pub version: &'static str,
    pub plural: &'static str,
    pub kind: &'static str,
    pub namespaced: bool,
}

impl Resource {
    pub fn api_version(&self) -> String {
        if self.group.is_empty() { self.version.into() } else { format!("{}/{}", self.group, self.version) }
    }

    /// `/api/v1/namespaces/default/pods`; an empty namespace means all of them.
    pub fn path(&self, namespace: &str) -> String {
        let root = if self.group.is_empty() {
            format!("/api/{}", self.version)
        } else {
            format!("/apis/{}/{}", self.group, self.version)
        };
        if self.namespaced && !namespace.is_empty() {
            format!("{root}/namespaces/{namespace}/{}", self.plural)
        } else {
            format!("{root}/{}", self.plural)
        }
    }
}

const fn namespaced(group: &'static str, plural: &'static str, kind: &'static str) -> Resource {
    Resource { group, version: "v1", plural, kind, namespaced: true }
}

const fn metallb(plural: &'static str, kind: &'static str) -> Resource {
    Resource { group: "metallb.io", version: "v1beta1", plural, kind, namespaced: true }
}

const fn cluster(group: &'static str, plural: &'static str, kind: &'static str) -> Resource {
    Resource { group, version: "v1", plural, kind, namespaced: false }
}

/// Gateway API's group.
pub const GATEWAY: &str = "gateway.networking.k8s.io";

pub const NAMESPACES: Resource = cluster("", "namespaces", "Namespace");
pub const NODES: Resource = cluster("", "nodes", "Node");
pub const PODS: Resource = namespaced("", "pods", "Pod");
pub const SERVICES: Resource = namespaced("", "services", "Service");
pub const ENDPOINTS: Resource = namespaced("", "endpoints", "Endpoints");
pub const CONFIG_MAPS: Resource = namespaced("", "configmaps", "ConfigMap");
pub const SECRETS: Resource = namespaced("", "secrets", "Secret");
pub const SERVICE_ACCOUNTS: Resource = namespaced("", "serviceaccounts", "ServiceAccount");
pub const EVENTS: Resource = namespaced("", "events", "Event");
pub const SERVICE_CIDRS: Resource = cluster("networking.k8s.io", "servicecidrs", "ServiceCIDR");
pub const INGRESSES: Resource = namespaced("networking.k8s.io", "ingresses", "Ingress");
pub const INGRESS_CLASSES: Resource = cluster("networking.k8s.io", "ingressclasses", "IngressClass");
/// MetalLB's kinds, which say where addresses of LoadBalancer Services come from and who announces them.
pub const IP_ADDRESS_POOLS: Resource = metallb("ipaddresspools", "IPAddressPool");
pub const L2_ADVERTISEMENTS: Resource = metallb("l2advertisements", "L2Advertisement");
pub const BGP_ADVERTISEMENTS: Resource = metallb("bgpadvertisements", "BGPAdvertisement");
pub const BGP_PEERS: Resource = Resource { version: "v1beta2", ..metallb("bgppeers", "BGPPeer") };
pub const BFD_PROFILES: Resource = metallb("bfdprofiles", "BFDProfile");
pub const COMMUNITIES: Resource = metallb("communities", "Community");
/// Gateway API's kinds.
pub const GATEWAY_CLASSES: Resource = cluster(GATEWAY, "gatewayclasses", "GatewayClass");
pub const GATEWAYS: Resource = namespaced(GATEWAY, "gateways", "Gateway");
pub const LISTENER_SETS: Resource = namespaced(GATEWAY, "listenersets", "ListenerSet");
pub const HTTP_ROUTES: Resource = namespaced(GATEWAY, "httproutes", "HTTPRoute");
pub const GRPC_ROUTES: Resource = namespaced(GATEWAY, "grpcroutes", "GRPCRoute");
pub const TLS_ROUTES: Resource = namespaced(GATEWAY, "tlsroutes", "TLSRoute");
pub const TCP_ROUTES: Resource = namespaced(GATEWAY, "tcproutes", "TCPRoute");
pub const UDP_ROUTES: Resource = namespaced(GATEWAY, "udproutes", "UDPRoute");
pub const REFERENCE_GRANTS: Resource = namespaced(GATEWAY, "referencegrants", "ReferenceGrant");
pub const BACKEND_TLS_POLICIES: Resource = namespaced(GATEWAY, "backendtlspolicies", "BackendTLSPolicy");
pub const IP_ADDRESSES: Resource = cluster("networking.k8s.io", "ipaddresses", "IPAddress");
pub const ENDPOINT_SLICES: Resource = namespaced("discovery.k8s.io", "endpointslices", "EndpointSlice");
pub const DEPLOYMENTS: Resource = namespaced("apps", "deployments", "Deployment");
pub const REPLICA_SETS: Resource = namespaced("apps", "replicasets", "ReplicaSet");
pub const STATEFUL_SETS: Resource = namespaced("apps", "statefulsets", "StatefulSet");
pub const DAEMON_SETS: Resource = namespaced("apps", "daemonsets", "DaemonSet");
pub const LEASES: Resource = namespaced("coordination.k8s.io", "leases", "Lease");
pub const CLUSTER_ROLES: Resource = cluster("rbac.authorization.k8s.io", "clusterroles", "ClusterRole");
pub const CLUSTER_ROLE_BINDINGS: Resource =
    cluster("rbac.authorization.k8s.io", "clusterrolebindings", "ClusterRoleBinding");
pub const ROLES: Resource = namespaced("rbac.authorization.k8s.io", "roles", "Role");
pub const ROLE_BINDINGS: Resource = namespaced("rbac.authorization.k8s.io", "rolebindings", "RoleBinding");
