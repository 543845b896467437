//! Annotations of an Ingress: those of ingress-nginx with its meaning, and our own. A key that is not supported is told of.

mod answers;
mod clients;
mod copies;
mod external;
mod ours;
mod read;

use std::collections::BTreeSet;
use std::sync::Arc;

use api::object::Metadata;
use http::StatusCode;
use rustls_pki_types::ServerName;

use crate::basic::Basic;
use crate::clients::Wanted;
use crate::external::External;

use crate::pages::Pages;
use crate::policy::{AnswerHeaders, Policy};
use crate::route::{Canary, Filter, MirrorUrl};
use crate::translate::Fault;

pub use answers::Answers;
pub use external::Door;

/// What ingress-nginx's keys begin with.
pub const NGINX: &str = "nginx.ingress.kubernetes.io/";
/// What our own begin with.
pub const OURS: &str = "ingress.fairlead.io/";

/// What the annotations of one Ingress say, for all of its paths.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// Paths are regular expressions, whatever their type.
    pub use_regex: bool,
    pub filters: Vec<Filter>,
    /// Where copies of requests go.
    pub mirror: Option<MirrorUrl>,
    pub canary: Option<Canary>,
    /// More hosts for all rules that have one.
    pub aliases: Vec<String>,
    /// Where the root of each host leads.
    pub app_root: Option<Box<str>>,
    /// `www.` in front of a host, or the host without it, leads to the host.
    pub from_to_www: bool,
    /// Instead of the backend.
    pub redirect: Option<(StatusCode, Box<str>)>,
    /// The Secret of who may come, and the realm that they are told.
    pub basic: Option<(Box<str>, Box<str>)>,
    /// Who says which requests may come.
    pub door: Option<Door>,
    pub answers: Answers,
    /// Which certificates clients must show.
    pub clients: Option<Wanted>,
    /// Connections over TLS go to endpoints as they are.
    pub passes_tls: bool,
    /// Requests go to the address of the Service itself.
    pub to_cluster_ip: bool,
    /// How endpoints are spoken to, if over TLS.
    pub backend_tls: Option<EndpointTls>,
    policy: Policy,
    /// `Some`: whether plain requests are sent to HTTPS; `None`: where the host has a certificate.
    https_only: Option<bool>,
}

impl Settings {
    pub fn read(metadata: &Metadata, faults: &mut BTreeSet<Fault>) -> Self {
        read::read(metadata, faults)
    }

    /// The policy of a path of a host that has TLS, or has not.
    pub fn policy(&self, is_tls: bool, refers: Refers) -> Arc<Policy> {
        let Refers { basic, external, is_shut, pages, answer_headers } = refers;
        let https_only = self.https_only.unwrap_or(is_tls);
        let rate = self.answers.rate;
        let policy =
            Policy { https_only, basic, external, is_shut, pages, answer_headers, rate, ..self.policy.clone() };
        if policy == *Policy::shared() { Policy::shared() } else { Arc::new(policy) }
    }
}

/// How endpoints are spoken to over TLS.
#[derive(Clone, Debug)]
pub struct EndpointTls {
    /// Whose certificate they must have.
    pub name: Option<ServerName<'static>>,
    /// They are asked for it.
    pub tells_name: bool,
    /// Has the authorities, and who we are.
    pub secret: Option<Box<str>>,
    pub verifies: bool,
    /// Certificates that may stand between an endpoint's and its authority's.
    pub depth: usize,
    /// Something of it makes no sense.
    pub is_broken: bool,
}

impl Default for EndpointTls {
    fn default() -> Self {
        EndpointTls { name: None, tells_name: false, secret: None, verifies: false, depth: 1, is_broken: false }
    }
}

/// What the policy of a path refers to.
#[derive(Default)]
pub struct Refers {
    pub basic: Option<Arc<Basic>>,
    pub external: Option<Arc<External>>,
    /// Nobody is.
    pub is_shut: bool,
    pub pages: Option<Pages>,
    pub answer_headers: Option<AnswerHeaders>,
}
