//! The binary: flags, certificates, wiring, drain.
fn main() {}
