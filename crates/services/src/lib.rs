//! Services and EndpointSlices become one table; who may use which endpoint is decided here, once.
//!
//! Bytes of API objects go in ([`ServiceTable::upsert_service`], [`ServiceTable::upsert_slice`]); what comes out is what
//! changed, as [`Frontend`]s: everything a data path needs to know of one port of one Service. The table also answers
//! the questions of cluster DNS. Nothing here does I/O: hold it in an `Arc<RwLock<…>>`, let one task write it.

mod endpoint;
mod frontend;
mod object;
mod table;

pub use endpoint::{Categories, Endpoint, Hints, Place, categorize_endpoints};
pub use frontend::{
    Affinity, DSR_ANNOTATION, EndPolicy, Frontend, FrontendId, PortName, Protocol, Selection, TrafficPolicy,
};
pub use object::{Service, ServiceKind, ServicePort, Slice, SliceEndpoint, SlicePort, SliceVersion, Warnings};
pub use table::{Changes, FrontendChange, Owner, Refused, Seed, ServiceKey, ServiceTable, SliceChange};

/// Why an object was kept out of the table.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("not a {kind}: {source}; compare it with `kubectl get -o yaml`")]
    Json { kind: &'static str, source: serde_json::Error },
    #[error("{kind} {namespace}/{name}: {field} is {value:?}, which is not {expected}; correct the object")]
    Field {
        kind: &'static str,
        namespace: String,
        name: String,
        field: &'static str,
        value: String,
        expected: &'static str,
    },
}
