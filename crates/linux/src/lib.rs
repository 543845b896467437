//! Kernel objects as values, and the one place that commits them; a fake beside each.

pub mod nft;
