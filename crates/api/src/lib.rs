//! Words: objects, kinds, selectors, quantities, statuses, and the schema of every built-in kind.
//!
//! Nothing here does I/O or reads a clock. Every other crate speaks these words.

pub mod duration;
pub mod kinds;
pub mod names;
pub mod object;
pub mod protobuf;
pub mod quantity;
pub mod schema;
pub mod selector;
pub mod status;
pub mod time;

pub use kinds::Resource;
pub use object::ObjectExt;
pub use quantity::Quantity;
pub use selector::{FieldSelector, LabelSelector};
pub use status::{Cause, Status};
