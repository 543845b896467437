//! The built-in kinds: a line each.

use super::{Row, Subresource};
use crate::strategy::{
    self, ACCOUNT, BUDGET, CONFIG, CSR, CUSTOM, DAEMON_SET, DEPLOYMENT, ENDPOINTS, EVENT, INGRESS, IP_ADDRESS, JOB,
    LEASE, NAMESPACE, NODE, PLAIN, POD, RBAC, REPLICA_SET, REVIEW, SERVICE, SERVICE_CIDR, SLICE, STATEFUL_SET,
    Strategy,
};
use crate::table::{self as t, Column};
use api::schema;

const fn sub(
    name: &'static str,
    kind: (&'static str, &'static str, &'static str),
    verbs: &'static [&'static str],
) -> Subresource {
    Subresource { name, kind, verbs }
}

const SCALE: Subresource = sub("scale", ("autoscaling", "v1", "Scale"), &["get", "patch", "update"]);
const POD_SUBRESOURCES: &[Subresource] = &[
    sub("attach", ("", "v1", "PodAttachOptions"), &["create", "get"]),
    sub("binding", ("", "v1", "Binding"), &["create"]),
    sub("eviction", ("policy", "v1", "Eviction"), &["create"]),
    sub("exec", ("", "v1", "PodExecOptions"), &["create", "get"]),
    sub("log", ("", "v1", "Pod"), &["get"]),
    sub("portforward", ("", "v1", "PodPortForwardOptions"), &["create", "get"]),
];
const NAMESPACE_SUBRESOURCES: &[Subresource] = &[sub("finalize", ("", "v1", "Namespace"), &["update"])];
const ACCOUNT_SUBRESOURCES: &[Subresource] =
    &[sub("token", ("authentication.k8s.io", "v1", "TokenRequest"), &["create"])];
const CSR_SUBRESOURCES: &[Subresource] =
    &[sub("approval", ("certificates.k8s.io", "v1", "CertificateSigningRequest"), &["get", "patch", "update"])];

/// What most rows share; the builder methods name the differences.
fn row(group: &'static str, kind: &'static str, plural: &'static str, namespaced: bool) -> Row {
    Row {
        group: group.into(),
        version: "v1".into(),
        plural: plural.into(),
        singular: kind.to_lowercase().into(),
        kind: kind.into(),
        namespaced,
        short_names: &[],
        categories: &[],
        has_status: false,
        subresources: &[],
        is_virtual: false,
        strategy: &PLAIN,
        columns: t::NAME_AGE,
        fields: &[],
        schema: schema::for_kind(group, "v1", kind),
    }
}

/// A kind that is a custom resource elsewhere.
fn custom(group: &'static str, version: &'static str, kind: &'static str, plural: &'static str) -> Row {
    Row {
        version: version.into(),
        schema: schema::for_kind(group, version, kind),
        ..row(group, kind, plural, true).status().is(&CUSTOM)
    }
}

impl Row {
    fn without_status(mut self) -> Row {
        self.has_status = false;
        self
    }

    fn cluster_wide(mut self) -> Row {
        self.namespaced = false;
        self
    }

    fn category(mut self, names: &'static [&'static str]) -> Row {
        self.categories = names;
        self
    }

    fn short(mut self, names: &'static [&'static str]) -> Row {
        self.short_names = names;
        self
    }

    fn all(mut self) -> Row {
        self.categories = &["all"];
        self
    }

    fn status(mut self) -> Row {
        self.has_status = true;
        self
    }

    fn subs(mut self, subresources: &'static [Subresource]) -> Row {
        self.subresources = subresources;
        self
    }

    fn is(mut self, strategy: &'static dyn Strategy) -> Row {
        self.strategy = strategy;
        self
    }

    fn cols(mut self, columns: &'static [Column]) -> Row {
        self.columns = columns;
        self
    }

    fn selectable(mut self, fields: &'static [(&'static str, &'static str)]) -> Row {
        self.fields = fields;
        self
    }

    fn review(mut self) -> Row {
        self.is_virtual = true;
        self.strategy = &REVIEW;
        self
    }
}

const POD_FIELDS: &[(&str, &str)] = &[
    ("spec.nodeName", "/spec/nodeName"),
    ("spec.restartPolicy", "/spec/restartPolicy"),
    ("spec.schedulerName", "/spec/schedulerName"),
    ("spec.serviceAccountName", "/spec/serviceAccountName"),
    ("status.phase", "/status/phase"),
    ("status.podIP", "/status/podIP"),
    ("status.nominatedNodeName", "/status/nominatedNodeName"),
];
const EVENT_FIELDS: &[(&str, &str)] = &[
    ("involvedObject.kind", "/involvedObject/kind"),
    ("involvedObject.namespace", "/involvedObject/namespace"),
    ("involvedObject.name", "/involvedObject/name"),
    ("involvedObject.uid", "/involvedObject/uid"),
    ("involvedObject.apiVersion", "/involvedObject/apiVersion"),
    ("involvedObject.fieldPath", "/involvedObject/fieldPath"),
    ("reason", "/reason"),
    ("reportingComponent", "/reportingComponent"),
    ("source", "/source/component"),
    ("type", "/type"),
];
const SERVICE_FIELDS: &[(&str, &str)] = &[("spec.clusterIP", "/spec/clusterIP"), ("spec.type", "/spec/type")];

#[rustfmt::skip]
pub fn rows() -> Vec<Row> {
    const RBAC_GROUP: &str = "rbac.authorization.k8s.io";
    const AUTHZ: &str = "authorization.k8s.io";
    const GATEWAY: &str = "gateway.networking.k8s.io";
    const GATEWAY_API: &[&str] = &["gateway-api"];
    vec![
        row("", "ConfigMap", "configmaps", true).short(&["cm"]).is(&CONFIG).cols(t::CONFIG_MAP),
        row("", "Endpoints", "endpoints", true).short(&["ep"]).is(&ENDPOINTS).cols(t::ENDPOINTS),
        row("", "Event", "events", true).short(&["ev"]).is(&EVENT).cols(t::EVENT).selectable(EVENT_FIELDS),
        row("", "Namespace", "namespaces", false).short(&["ns"]).status().is(&NAMESPACE).subs(NAMESPACE_SUBRESOURCES).cols(t::NAMESPACE).selectable(&[("status.phase", "/status/phase")]),
        row("", "Node", "nodes", false).short(&["no"]).status().is(&NODE).cols(t::NODE).selectable(&[("spec.unschedulable", "/spec/unschedulable")]),
        row("", "PersistentVolumeClaim", "persistentvolumeclaims", true).short(&["pvc"]).status(),
        row("", "PersistentVolume", "persistentvolumes", false).short(&["pv"]).status(),
        row("", "Pod", "pods", true).short(&["po"]).all().status().is(&POD).subs(POD_SUBRESOURCES).cols(t::POD).selectable(POD_FIELDS),
        row("", "ResourceQuota", "resourcequotas", true).short(&["quota"]).status(),
        row("", "Secret", "secrets", true).is(&CONFIG).cols(t::SECRET).selectable(&[("type", "/type")]),
        row("", "ServiceAccount", "serviceaccounts", true).short(&["sa"]).is(&ACCOUNT).subs(ACCOUNT_SUBRESOURCES).cols(t::SERVICE_ACCOUNT),
        row("", "Service", "services", true).short(&["svc"]).all().status().is(&SERVICE).cols(t::SERVICE).selectable(SERVICE_FIELDS),
        row("apps", "ControllerRevision", "controllerrevisions", true),
        row("apps", "DaemonSet", "daemonsets", true).short(&["ds"]).all().status().is(&DAEMON_SET).cols(t::DAEMON_SET),
        row("apps", "Deployment", "deployments", true).short(&["deploy"]).all().status().is(&DEPLOYMENT).subs(&[SCALE]).cols(t::DEPLOYMENT),
        row("apps", "ReplicaSet", "replicasets", true).short(&["rs"]).all().status().is(&REPLICA_SET).subs(&[SCALE]).cols(t::REPLICA_SET),
        row("apps", "StatefulSet", "statefulsets", true).short(&["sts"]).all().status().is(&STATEFUL_SET).subs(&[SCALE]).cols(t::STATEFUL_SET),
        row("batch", "CronJob", "cronjobs", true).short(&["cj"]).all().status().is(&strategy::CRON_JOB).cols(t::CRON_JOB),
        row("batch", "Job", "jobs", true).all().status().is(&JOB).cols(t::JOB).selectable(&[("status.successful", "/status/succeeded")]),
        row("policy", "PodDisruptionBudget", "poddisruptionbudgets", true).short(&["pdb"]).status().cols(t::DISRUPTION_BUDGET).is(&BUDGET),
        row("networking.k8s.io", "IngressClass", "ingressclasses", false),
        row("networking.k8s.io", "IPAddress", "ipaddresses", false).short(&["ip"]).is(&IP_ADDRESS).cols(t::IP_ADDRESS),
        row("networking.k8s.io", "ServiceCIDR", "servicecidrs", false).status().is(&SERVICE_CIDR).cols(t::SERVICE_CIDR),
        row("networking.k8s.io", "Ingress", "ingresses", true).short(&["ing"]).status().is(&INGRESS).cols(t::INGRESS),
        row("discovery.k8s.io", "EndpointSlice", "endpointslices", true).is(&SLICE).cols(t::SLICE),
        row(RBAC_GROUP, "ClusterRoleBinding", "clusterrolebindings", false).is(&RBAC).cols(t::BINDING),
        row(RBAC_GROUP, "ClusterRole", "clusterroles", false).is(&RBAC).cols(t::NAME_CREATED),
        row(RBAC_GROUP, "RoleBinding", "rolebindings", true).is(&RBAC).cols(t::BINDING),
        row(RBAC_GROUP, "Role", "roles", true).is(&RBAC).cols(t::NAME_CREATED),
        row("storage.k8s.io", "StorageClass", "storageclasses", false).short(&["sc"]),
        row("scheduling.k8s.io", "PriorityClass", "priorityclasses", false).short(&["pc"]).cols(t::PRIORITY_CLASS),
        row("coordination.k8s.io", "Lease", "leases", true).is(&LEASE).cols(t::LEASE),
        row("certificates.k8s.io", "CertificateSigningRequest", "certificatesigningrequests", false).short(&["csr"]).status().is(&CSR).subs(CSR_SUBRESOURCES).cols(t::CSR).selectable(&[("spec.signerName", "/spec/signerName")]),
        custom(GATEWAY, "v1", "BackendTLSPolicy", "backendtlspolicies").category(GATEWAY_API).short(&["btlspolicy"]),
        custom(GATEWAY, "v1", "GatewayClass", "gatewayclasses").cluster_wide().category(GATEWAY_API).short(&["gc"]).cols(t::GATEWAY_CLASS),
        custom(GATEWAY, "v1", "Gateway", "gateways").category(GATEWAY_API).short(&["gtw"]).cols(t::GATEWAY),
        custom(GATEWAY, "v1", "GRPCRoute", "grpcroutes").category(GATEWAY_API).cols(t::HOSTNAMES),
        custom(GATEWAY, "v1", "HTTPRoute", "httproutes").category(GATEWAY_API).cols(t::HOSTNAMES),
        custom(GATEWAY, "v1", "ListenerSet", "listenersets").category(GATEWAY_API).short(&["lset"]),
        custom(GATEWAY, "v1", "ReferenceGrant", "referencegrants").without_status().category(GATEWAY_API).short(&["refgrant"]),
        custom(GATEWAY, "v1", "TCPRoute", "tcproutes").category(GATEWAY_API),
        custom(GATEWAY, "v1", "TLSRoute", "tlsroutes").category(GATEWAY_API).cols(t::HOSTNAMES),
        custom(GATEWAY, "v1", "UDPRoute", "udproutes").category(GATEWAY_API),
        custom("metallb.io", "v1beta1", "BFDProfile", "bfdprofiles"),
        custom("metallb.io", "v1beta1", "BGPAdvertisement", "bgpadvertisements").cols(t::ADVERTISEMENT),
        custom("metallb.io", "v1beta2", "BGPPeer", "bgppeers").cols(t::BGP_PEER),
        custom("metallb.io", "v1beta1", "Community", "communities"),
        custom("metallb.io", "v1beta1", "IPAddressPool", "ipaddresspools").cols(t::ADDRESS_POOL),
        custom("metallb.io", "v1beta1", "L2Advertisement", "l2advertisements").cols(t::ADVERTISEMENT),
        row("authentication.k8s.io", "SelfSubjectReview", "selfsubjectreviews", false).review(),
        row("authentication.k8s.io", "TokenReview", "tokenreviews", false).review(),
        row(AUTHZ, "LocalSubjectAccessReview", "localsubjectaccessreviews", true).review(),
        row(AUTHZ, "SelfSubjectAccessReview", "selfsubjectaccessreviews", false).review(),
        row(AUTHZ, "SelfSubjectRulesReview", "selfsubjectrulesreviews", false).review(),
        row(AUTHZ, "SubjectAccessReview", "subjectaccessreviews", false).review(),
    ]
}
