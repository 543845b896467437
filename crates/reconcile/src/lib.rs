//! What every controller would otherwise repeat: watch, queue, retry, events, leases.
