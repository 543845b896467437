//! Service table to kernel.
