//! From an address back to the Service or endpoint that has it.

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::PTR;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use ipnet::IpNet;
use services::{Owner, ServiceTable};

use crate::answer::{Answer, Question};
use crate::records::{endpoint_name, service_name, soa};

/// The names under in-addr.arpa and ip6.arpa that the table knows.
#[derive(Debug, Clone)]
pub struct ReverseZones {
    zone: Name,
    ttl: u32,
    ranges: Vec<IpNet>,
}

impl ReverseZones {
    /// Names in `zone`; in `ranges` no other server is asked about unknown addresses.
    pub fn new(zone: Name, ttl: u32, ranges: Vec<IpNet>) -> Self {
        ReverseZones { zone, ttl, ranges }
    }

    /// The answer to a question about an address of the cluster; `None` for other names.
    pub fn answer(&self, table: &ServiceTable, question: &Question) -> Option<Answer> {
        let asked = question.name.parse_arpa_name().ok()?;
        let is_ours = self.ranges.iter().any(|range| range.contains(&asked));
        if asked.prefix_len() < asked.max_prefix_len() {
            // Between the zone and an address: exists, and has nothing.
            return is_ours.then(|| self.negative(ResponseCode::NoError, question));
        }
        if !table.is_synced() {
            return is_ours.then(|| Answer::code(ResponseCode::ServFail));
        }
        let owners = table.by_address(asked.addr());
        if owners.is_empty() {
            return is_ours.then(|| self.negative(ResponseCode::NXDomain, question));
        }
        if !matches!(question.record_type, RecordType::PTR | RecordType::ANY) {
            return Some(self.negative(ResponseCode::NoError, question));
        }
        let mut names: Vec<Name> = owners.iter().filter_map(|owner| self.name(owner)).collect();
        names.sort();
        names.dedup();
        let record = |name| Record::from_rdata(question.name.clone(), self.ttl, RData::PTR(PTR(name)));
        Some(Answer {
            authoritative: true,
            answers: names.into_iter().map(record).collect(),
            ..Answer::code(ResponseCode::NoError)
        })
    }

    fn name(&self, owner: &Owner<'_>) -> Option<Name> {
        match owner {
            Owner::ClusterIp(service) => service_name(&service.namespace, &service.name, &self.zone),
            Owner::Endpoint(service, endpoint) => {
                endpoint_name(&endpoint.host(), &service.namespace, &service.name, &self.zone)
            }
        }
    }

    fn negative(&self, code: ResponseCode, question: &Question) -> Answer {
        // in-addr.arpa or ip6.arpa: an ancestor of the name, so that resolvers cache the answer.
        let owner = question.name.trim_to(2);
        Answer {
            authoritative: true,
            authorities: soa(&owner, &self.zone, self.ttl).into_iter().collect(),
            ..Answer::code(code)
        }
    }
}
