//! How requests of a route are treated, apart from where they go.

use std::net::IpAddr;
use std::num::NonZeroU64;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use ipnet::IpNet;

use crate::basic::Basic;
use crate::clients::ClientAuth;
use crate::external::External;
use crate::headers::SetHeaders;
use crate::limits::RateLimits;
use crate::pages::Pages;
use crate::registry::Slot;
use crate::sticky::Affinity;
use crate::variables::Template;

/// How an endpoint is chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Balance {
    /// Of two drawn at random the one with fewer requests under way.
    #[default]
    LeastLoad,
    RoundRobin,
}

/// What is spoken to endpoints.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum BackendProtocol {
    #[default]
    Http1,
    /// HTTP/2 without TLS, from the first byte.
    H2c,
}

/// When a request is tried once more elsewhere.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Retry {
    /// Attempts in all; 0: as many as there are endpoints.
    pub tries: u32,
    /// No new attempt after so long.
    pub within: Option<Duration>,
    pub on_error: bool,
    pub on_timeout: bool,
    /// Answers that count as failures.
    pub on_status: StatusSet,
    /// Also requests that may have had an effect already.
    pub non_idempotent: bool,
    /// Of a hundred requests so many may be sent a second time, beside a few a second; `None`: all.
    pub budget: Option<u8>,
}

/// Statuses from 400 to 599.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StatusSet([u64; 4]);

impl StatusSet {
    pub fn insert(&mut self, status: u16) {
        if let Some(at) = status.checked_sub(400).filter(|at| *at < 200) {
            self.0[usize::from(at / 64)] |= 1 << (at % 64);
        }
    }

    pub fn contains(&self, status: u16) -> bool {
        status.checked_sub(400).is_some_and(|at| at < 200 && self.0[usize::from(at / 64)] >> (at % 64) & 1 == 1)
    }

    pub fn is_empty(&self) -> bool {
        self.0 == [0; 4]
    }
}

/// Versions of the PROXY protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProxyProtocol {
    V1,
    V2,
}

/// How fast an answer's body goes to its client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// A second.
    pub bytes: NonZeroU64,
    /// So many go at any speed.
    pub after: u64,
}

/// Whom clients must be by their certificates.
#[derive(Clone, Debug)]
pub struct Clients(pub Arc<ClientAuth>);

impl PartialEq for Clients {
    /// Each translation makes another.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

/// Headers of a ConfigMap for every answer.
#[derive(Clone, Debug)]
pub struct AnswerHeaders(pub Slot<SetHeaders>);

impl PartialEq for AnswerHeaders {
    /// What they are now is no part of what is wanted.
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}

#[derive(Clone, Debug, PartialEq)]
pub struct Policy {
    pub connect_timeout: Duration,
    /// Between two reads of an answer, and until its first byte.
    pub read_timeout: Duration,
    /// Between two writes of a request.
    pub send_timeout: Duration,
    /// From the request's head to the end of the answer, all tries together.
    pub request_timeout: Option<Duration>,
    /// Bytes; 0: any.
    pub body_limit: u64,
    pub retry: Retry,
    pub balance: Balance,
    pub protocol: BackendProtocol,
    /// Who may come at all; empty: everybody.
    pub allow: Vec<IpNet>,
    pub deny: Vec<IpNet>,
    /// Requests over plain HTTP are sent to HTTPS.
    pub https_only: bool,
    pub affinity: Option<Arc<Affinity>>,
    /// What decides about the endpoint, filled in for each request.
    pub hash_by: Option<Template>,
    pub limits: Option<Arc<RateLimits>>,
    /// Whom clients must be.
    pub basic: Option<Arc<Basic>>,
    /// Who else is asked which requests may come.
    pub external: Option<Arc<External>>,
    /// Nobody is let in, as what was written about it makes no sense.
    pub is_shut: bool,
    /// An address that may come needs no password, and so on: who gets past one of them is in.
    pub one_is_enough: bool,
    /// Which certificates clients must show, on all routes of their host.
    pub clients: Option<Clients>,
    /// Who answers in place of an endpoint.
    pub pages: Option<Pages>,
    pub answer_headers: Option<AnswerHeaders>,
    pub rate: Option<Rate>,
    /// For so long an endpoint that is new gets less than its share.
    pub slow_start: Option<Duration>,
    /// Endpoints hear who asks before the first byte.
    pub announces: Option<ProxyProtocol>,
    /// Requests without a trace get one; `None`: as the whole proxy does.
    pub traces: Option<bool>,
    /// A trace that a request brings is its own.
    pub trusts_trace: bool,
}

impl Policy {
    /// Whether an address may come; `None`: nothing is said of it.
    pub fn allows(&self, ip: IpAddr) -> Option<bool> {
        let is_among = |ranges: &[IpNet]| ranges.iter().any(|range| range.contains(&ip));
        if is_among(&self.deny) {
            return Some(false);
        }
        (!self.allow.is_empty()).then(|| is_among(&self.allow))
    }

    /// Somebody is asked who may come, whatever the address.
    pub fn has_doors(&self) -> bool {
        self.basic.is_some() || self.external.is_some() || self.is_shut
    }
}

impl Default for Policy {
    fn default() -> Self {
        Policy {
            connect_timeout: Duration::from_secs(5),
            read_timeout: Duration::from_secs(60),
            send_timeout: Duration::from_secs(60),
            request_timeout: None,
            body_limit: 0,
            retry: Retry {
                tries: 3,
                within: None,
                on_error: true,
                on_timeout: true,
                on_status: StatusSet::default(),
                non_idempotent: false,
                budget: Some(20),
            },
            balance: Balance::default(),
            protocol: BackendProtocol::default(),
            allow: Vec::new(),
            deny: Vec::new(),
            https_only: false,
            affinity: None,
            hash_by: None,
            limits: None,
            basic: None,
            external: None,
            is_shut: false,
            one_is_enough: false,
            clients: None,
            pages: None,
            answer_headers: None,
            rate: None,
            slow_start: None,
            announces: None,
            traces: None,
            trusts_trace: true,
        }
    }
}

impl Policy {
    /// The defaults, which most routes share.
    pub fn shared() -> Arc<Policy> {
        static DEFAULT: LazyLock<Arc<Policy>> = LazyLock::new(Arc::default);
        DEFAULT.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_set_of_statuses_holds_what_was_put_in() {
        let mut set = StatusSet::default();
        [399, 400, 463, 464, 599, 600].into_iter().for_each(|status| set.insert(status));
        let held: Vec<u16> = (0..1000).filter(|status| set.contains(*status)).collect();
        assert_eq!(held, [400, 463, 464, 599]);
    }
}
