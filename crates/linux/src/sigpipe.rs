//! What a closed pipe does to this process.

use nix::sys::signal::{SigHandler, Signal, signal};

/// A command whose reader went away ends quietly, as other commands do. Rust ignores the signal unless told otherwise.
pub fn end_on_closed_pipe() {
    // SAFETY: the default action is no handler of ours; nothing runs in signal context.
    let restored = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
    debug_assert!(restored.is_ok(), "SIGPIPE can have its default action");
}
