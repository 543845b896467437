//! The store that is a real etcd, over its v3 protocol.
//!
//! Every call is linearizable. Our keys lie under a prefix, so that others can live in the same etcd.

mod client;
mod messages;
mod watch;

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use tonic::{Code, Status};

use self::client::{Client, Repeat};
use self::messages::{
    CompactionRequest, CompactionResponse, CompareResult, CompareTarget, DeleteRangeRequest, PutRequest, RangeRequest,
    RangeResponse, RequestKind, RequestOp, ResponseHeader, StatusRequest, StatusResponse, TxnRequest, TxnResponse,
};
use crate::{Compare, Error, KeyValue, Listing, Op, Outcome, Revision, Store, Txn, WatchStream};

pub struct EtcdOptions {
    /// URLs of the members, `http://` or `https://`. The first is used until it does not answer.
    pub endpoints: Vec<String>,
    /// Where our keys lie.
    pub prefix: String,
    /// Needed for `https://`.
    pub tls: Option<EtcdTls>,
    /// For one answer of one endpoint.
    pub timeout: Duration,
}

impl EtcdOptions {
    pub fn new(endpoints: impl IntoIterator<Item = String>) -> Self {
        Self {
            endpoints: endpoints.into_iter().collect(),
            prefix: "/fairlead".into(),
            tls: None,
            timeout: Duration::from_secs(5),
        }
    }
}

/// All in PEM.
pub struct EtcdTls {
    /// Whom we trust to be etcd.
    pub ca: Vec<u8>,
    /// Our own certificate and its key, if etcd wants to see them.
    pub client: Option<(Vec<u8>, Vec<u8>)>,
}

#[derive(Debug)]
pub struct EtcdStore {
    client: Client,
    keys: Keys,
}

impl EtcdStore {
    /// Fails if etcd does not answer or is not of version 3.
    pub async fn connect(options: EtcdOptions) -> Result<Self, Error> {
        let store = Self { client: Client::new(&options)?, keys: Keys::under(&options.prefix) };
        let status = store.status().await?;
        if !status.version.starts_with("3.") {
            return Err(Error::Refused(format!("its version is {:?}", status.version)));
        }
        store.revision().await?;
        Ok(store)
    }

    async fn status(&self) -> Result<StatusResponse, Error> {
        let path = "/etcdserverpb.Maintenance/Status";
        self.client.call(path, StatusRequest {}, Repeat::Always).await.map_err(refused)
    }

    async fn range(&self, request: RangeRequest) -> Result<RangeResponse, Error> {
        let requested = unsigned(request.revision);
        let answer = self.client.call("/etcdserverpb.KV/Range", request, Repeat::Always).await;
        answer.map_err(|status| match status.code() {
            Code::OutOfRange if is_compacted(&status) => Error::Compacted { requested },
            Code::OutOfRange => Error::Future { requested },
            _ => refused(status),
        })
    }
}

impl Store for EtcdStore {
    fn get<'a>(&'a self, key: &'a str) -> BoxFuture<'a, Result<(Revision, Option<KeyValue>), Error>> {
        Box::pin(async move {
            let mut answer = self.range(self.keys.just(key)).await?;
            let kv = answer.kvs.pop().map(|kv| self.keys.read(kv)).transpose()?;
            Ok((revision_of(answer.header), kv))
        })
    }

    fn list<'a>(
        &'a self,
        prefix: &'a str,
        after: Option<&'a str>,
        limit: usize,
        at: Option<Revision>,
    ) -> BoxFuture<'a, Result<Listing, Error>> {
        Box::pin(async move {
            let (start, range_end) = self.keys.range(prefix);
            // The key that sorts first after `after`, which itself is not wanted.
            let key =
                after.map_or(start.clone(), |after| Bytes::from(format!("{}{after}\0", self.keys.prefix)).max(start));
            let revision = at.filter(|at| *at > 0);
            let limit = i64::try_from(limit).unwrap_or(i64::MAX);
            let request = RangeRequest { key, range_end, limit, revision: revision.map_or(0, signed) };
            let answer = self.range(request).await?;
            let remaining = unsigned(answer.count).saturating_sub(answer.kvs.len() as u64);
            let revision = revision.unwrap_or_else(|| revision_of(answer.header));
            let items: Result<Vec<_>, _> = answer.kvs.into_iter().map(|kv| self.keys.read(kv)).collect();
            Ok(Listing { revision, items: items?, more: answer.more, remaining })
        })
    }

    fn commit(&self, txn: Txn) -> BoxFuture<'_, Result<Outcome, Error>> {
        Box::pin(async move {
            txn.validate()?;
            let compares = txn.compare.clone();
            let request = self.keys.txn(txn);
            let answer: Result<TxnResponse, _> =
                self.client.call("/etcdserverpb.KV/Txn", request, Repeat::Unsent).await;
            let answer = answer.map_err(refused)?;
            if answer.succeeded {
                return Ok(Outcome::Committed(revision_of(answer.header)));
            }
            // The failure branch read every compared key, in order, at the revision that was compared.
            for (index, (compare, response)) in compares.iter().zip(answer.responses).enumerate() {
                let found = response.range.and_then(|mut range| range.kvs.pop());
                let current = found.map(|kv| self.keys.read(kv)).transpose()?;
                if !compare.holds(current.as_ref()) {
                    return Ok(Outcome::Failed { index, current });
                }
            }
            Err(Error::Refused("a transaction failed though all its compares hold".into()))
        })
    }

    fn watch<'a>(&'a self, prefix: &'a str, from: Revision) -> BoxFuture<'a, Result<WatchStream, Error>> {
        Box::pin(async move {
            // etcd tells of compaction only later, on the stream, and not for the compacted revision itself, whose
            // deletions it has forgotten.
            let probe = RangeRequest { revision: signed(from.max(1)), ..self.keys.just("") };
            match self.range(probe).await {
                Ok(_) | Err(Error::Future { .. }) => watch::open(&self.client, &self.keys, prefix, from).await,
                Err(error) => Err(error),
            }
        })
    }

    fn compact(&self, revision: Revision) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let request = CompactionRequest { revision: signed(revision) };
            let answer: Result<CompactionResponse, _> =
                self.client.call("/etcdserverpb.KV/Compact", request, Repeat::Always).await;
            match answer {
                Ok(CompactionResponse {}) => Ok(()),
                Err(status) if status.code() == Code::OutOfRange && is_compacted(&status) => Ok(()),
                Err(status) if status.code() == Code::OutOfRange => Err(Error::Future { requested: revision }),
                Err(status) => Err(refused(status)),
            }
        })
    }

    fn revision(&self) -> BoxFuture<'_, Result<Revision, Error>> {
        Box::pin(async move { Ok(revision_of(self.range(self.keys.just("")).await?.header)) })
    }

    fn health(&self) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let status = self.status().await?;
            if !status.errors.is_empty() {
                return Err(Error::Refused(status.errors.join(", ")));
            }
            // Needs a quorum, unlike the status of one member.
            self.revision().await.map(|_| ())
        })
    }
}

/// Our keys as etcd's, and back.
#[derive(Debug, Clone)]
struct Keys {
    /// Ends in a slash, so that it is not the prefix of another's prefix.
    prefix: Arc<str>,
}

impl Keys {
    fn under(prefix: &str) -> Self {
        Self { prefix: format!("{}/", prefix.trim_end_matches('/')).into() }
    }

    fn write(&self, key: &str) -> Bytes {
        Bytes::from(format!("{}{key}", self.prefix))
    }

    fn just(&self, key: &str) -> RangeRequest {
        RangeRequest { key: self.write(key), ..RangeRequest::default() }
    }

    /// The first key under `prefix`, and the first one behind all of them.
    fn range(&self, prefix: &str) -> (Bytes, Bytes) {
        let start = self.write(prefix);
        let mut end = start.to_vec();
        // No byte of UTF-8 is 255, and our own prefix is not empty.
        if let Some(last) = end.last_mut() {
            *last += 1;
        }
        (start, end.into())
    }

    fn read(&self, kv: messages::KeyValue) -> Result<KeyValue, Error> {
        let key = std::str::from_utf8(&kv.key).ok().and_then(|key| key.strip_prefix(&*self.prefix));
        let Some(key) = key else {
            return Err(Error::Foreign { key: String::from_utf8_lossy(&kv.key).into_owned() });
        };
        Ok(KeyValue {
            key: key.into(),
            value: kv.value,
            create_revision: unsigned(kv.create_revision),
            mod_revision: unsigned(kv.mod_revision),
        })
    }

    fn txn(&self, txn: Txn) -> TxnRequest {
        let failure = txn.compare.iter().map(|compare| op(RequestKind::Range(self.just(compare.key())))).collect();
        let compare = txn.compare.iter().map(|compare| {
            let (result, revision) = match compare {
                // The revision of an absent key is 0.
                Compare::Absent(_) => (CompareResult::Equal, 0),
                Compare::Unchanged(_, revision) => (CompareResult::Equal, signed(*revision)),
                Compare::Present(_) => (CompareResult::Greater, 0),
            };
            messages::Compare {
                result: result.into(),
                target: CompareTarget::Mod.into(),
                key: self.write(compare.key()),
                mod_revision: Some(revision),
            }
        });
        let compare = compare.collect();
        let success = txn.ops.into_iter().map(|wanted| {
            op(match wanted {
                Op::Put { key, value } => RequestKind::Put(PutRequest { key: self.write(&key), value }),
                Op::Delete { key } => RequestKind::DeleteRange(DeleteRangeRequest { key: self.write(&key) }),
            })
        });
        TxnRequest { compare, success: success.collect(), failure }
    }
}

fn op(request: RequestKind) -> RequestOp {
    RequestOp { request: Some(request) }
}

fn revision_of(header: Option<ResponseHeader>) -> Revision {
    header.map_or(0, |header| unsigned(header.revision))
}

/// etcd's numbers are signed but never negative.
fn unsigned(number: i64) -> u64 {
    number.unsigned_abs()
}

/// No revision will ever be so large that this matters; such a one is in the future for etcd too.
fn signed(revision: Revision) -> i64 {
    i64::try_from(revision).unwrap_or(i64::MAX)
}

/// etcd tells the two reasons of `OutOfRange`, a past and a future revision, apart by the text alone.
fn is_compacted(status: &Status) -> bool {
    status.message().contains("compacted")
}

fn refused(status: Status) -> Error {
    match status.code() {
        Code::InvalidArgument => Error::Invalid(status.message().to_owned()),
        _ if client::is_transient(&status) => Error::Unavailable(status.message().to_owned()),
        _ => Error::Refused(status.message().to_owned()),
    }
}
