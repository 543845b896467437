//! Names that the operator has written down, as in /etc/hosts.

use std::collections::HashMap;
use std::net::IpAddr;

use hickory_proto::op::ResponseCode;
use hickory_proto::rr::rdata::PTR;
use hickory_proto::rr::{Name, RData, Record, RecordType};

use crate::answer::{Answer, Question};
use crate::compile;
use crate::error::DnsError;
use crate::wire::WireName;

/// Entries by name and by address. A name that is here exists with these addresses and nothing else.
#[derive(Default, Debug)]
pub struct Hosts {
    names: HashMap<Box<[u8]>, Vec<IpAddr>>,
    addresses: HashMap<IpAddr, Vec<Name>>,
}

impl Hosts {
    /// Reads lines of an address and names. `#` begins a comment.
    pub fn parse(text: &str) -> Result<Self, DnsError> {
        let mut hosts = Hosts::default();
        for (index, line) in text.lines().enumerate() {
            let wrong = |reason: String| DnsError::Hosts { line: index + 1, reason };
            let line = line.split('#').next().unwrap_or_default();
            let mut words = line.split_whitespace();
            let Some(first) = words.next() else { continue };
            let ip: IpAddr = first.parse().map_err(|_| wrong(format!("{first:?} is no IP address")))?;
            let names: Vec<&str> = words.collect();
            if names.is_empty() {
                return Err(wrong(format!("{ip} has no name")));
            }
            for text in names {
                let wire = compile::name(text).and_then(|wire| WireName::read(&wire, 0));
                let wire = wire.ok_or_else(|| wrong(format!("{text:?} is no DNS name")))?;
                let mut name = Name::from_ascii(text).map_err(|error| wrong(format!("{text:?}: {error}")))?;
                name.set_fqdn(true);
                let held = hosts.names.entry(wire.bytes().into()).or_default();
                if !held.contains(&ip) {
                    held.push(ip);
                }
                hosts.addresses.entry(ip).or_default().push(name);
            }
        }
        Ok(hosts)
    }

    pub fn len(&self) -> usize {
        self.names.len()
    }

    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// Whether anything is written down about this name, or about the address that it stands for.
    pub fn holds(&self, wire: &WireName) -> bool {
        !self.is_empty()
            && (self.names.contains_key(wire.bytes())
                || wire.reversed().is_some_and(|(address, _)| self.addresses.contains_key(&address)))
    }

    /// `None`: the operator said nothing about it.
    pub fn find(&self, wire: &WireName, question: &Question, ttl: u32) -> Option<Answer> {
        let wanted = question.record_type;
        let data: Vec<RData> = match self.names.get(wire.bytes()) {
            Some(addresses) => addresses.iter().map(|ip| RData::from(*ip)).collect(),
            None => {
                let (address, parts) = wire.reversed()?;
                let names = self.addresses.get(&address).filter(|_| parts == if address.is_ipv4() { 4 } else { 32 })?;
                names.iter().map(|name| RData::PTR(PTR(name.clone()))).collect()
            }
        };
        let data = data.into_iter().filter(|data| wanted == RecordType::ANY || data.record_type() == wanted);
        let answers = data.map(|data| Record::from_rdata(question.name.clone(), ttl, data)).collect();
        Some(Answer { authoritative: true, answers, ..Answer::code(ResponseCode::NoError) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(hosts: &Hosts, name: &str, record_type: RecordType) -> Option<Vec<String>> {
        let wire = WireName::read(&compile::name(name).expect("a name"), 0).expect("a name");
        let question = Question::new(Name::from_ascii(name).expect("a name"), record_type);
        let answer = hosts.find(&wire, &question, 5)?;
        Some(answer.answers.iter().map(|record| record.data.to_string()).collect())
    }

    #[test]
    fn names_and_addresses_both_ways() {
        let text = "192.0.2.1 a.example A2.example # the first\n\n2001:db8::1 a.example\n";
        let hosts = Hosts::parse(text).expect("entries");
        assert_eq!(find(&hosts, "A.example.", RecordType::A), Some(vec!["192.0.2.1".to_owned()]));
        assert_eq!(find(&hosts, "a.example.", RecordType::AAAA), Some(vec!["2001:db8::1".to_owned()]));
        assert_eq!(find(&hosts, "a2.example.", RecordType::AAAA), Some(Vec::new()));
        let reverse = find(&hosts, "1.2.0.192.in-addr.arpa.", RecordType::PTR);
        assert_eq!(reverse, Some(vec!["a.example.".to_owned(), "A2.example.".to_owned()]));
        assert_eq!(find(&hosts, "b.example.", RecordType::A), None);
    }

    #[test]
    fn what_cannot_be_an_entry_is_named_with_its_line() {
        for (text, part) in
            [("\nnope a", "line 2"), ("192.0.2.1", "has no name"), ("192.0.2.1 a..b", "\"a..b\" is no DNS name")]
        {
            let error = Hosts::parse(text).expect_err(text).to_string();
            assert!(error.contains(part), "{error}");
        }
    }
}
