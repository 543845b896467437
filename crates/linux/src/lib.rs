//! Kernel objects as values, and the one place that commits them; a fake beside each.
//!
//! The only crate with `unsafe` code and the only one that changes namespaces: each use says why it is sound.
#![allow(unsafe_code)]
#![allow(clippy::disallowed_methods)]

pub mod bpf;
pub mod cgroup;
pub mod cgroup_v1v2;
pub mod connections;
pub mod conntrack;
pub mod enter;
pub mod fdpass;
pub mod hops;
pub mod iptables;
pub mod ipvs;
pub mod link;
pub mod memory;
pub mod mntns;
pub mod mount;
pub mod netns;
pub mod nflog;
pub mod nft;
pub mod packet;
pub mod process;
pub mod provoke;
pub mod sigpipe;
pub mod sock_diag;
pub mod splice;
pub mod tcp_md5;
