//! The data paths, with virtual packets (cases) and real ones (namespaces; these need root).

mod case;
mod cases;
mod cgroup;
mod choices;
mod configuration;
mod differences;
mod ebpf;
mod ejection;
mod end;
mod explain;
mod guard;
mod guest;
mod handover;
mod history;
mod kill;
mod live;
mod modes;
mod net;
mod objects;
mod refusals;
mod ring;
mod rows;
mod sctp;
mod selection;
mod serving;
mod userspace;
