//! Kernel objects as values, and the one place that commits them; a fake beside each.
#![allow(unsafe_code)]

pub mod cgroup;
pub mod fdpass;
pub mod mount;
pub mod process;
