//! The four ways to change an object over the API, as pure functions of JSON values.
//!
//! JSON patch, merge patch, strategic merge patch and server-side apply. Nothing here reads a clock or knows a
//! store: time and the live object arrive as arguments, the changed object is the result.

mod apply;
mod compare;
mod error;
mod go;
mod json_patch;
mod managers;
mod merge_patch;
mod sets;
mod shape;
mod strategic;
mod typed;

pub use self::json_patch::json_patch;
pub use apply::{apply, update_managers};
pub use error::{ApplyError, Conflict, PatchError};
pub use managers::ManagedFields;
pub use merge_patch::merge_patch;
pub use sets::{Element, FieldSet};
pub use strategic::strategic_merge_patch;
