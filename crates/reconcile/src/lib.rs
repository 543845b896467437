//! What every controller would otherwise repeat: a connection to the API, watch, cache, queue, retry, events.

pub mod api;
pub mod cache;
pub mod events;
pub mod queue;
pub mod services;
pub mod watch;

pub use api::{Api, ApiError, DeleteOptions, Patch, request};
pub use cache::{Cache, Named, feed};
pub use events::{EventKind, ObjectRef, Recorder};
pub use kube::Client;
pub use queue::{Outcome, Queue, run_queue};
pub use services::ServiceFeed;
pub use watch::{Change, Scope, watch};
