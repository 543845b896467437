//! The data paths, with virtual packets (cases) and real ones (namespaces; these need root).

mod cases;
mod choices;
mod configuration;
mod history;
mod live;
mod net;
mod objects;
mod serving;
