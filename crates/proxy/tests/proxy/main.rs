//! The data paths, with virtual packets (cases) and real ones (namespaces; these need root).

mod net;
mod objects;
