//! Cluster DNS: case files (objects in, question, answer out), and the server over real loopback sockets.

mod cases;
mod dig;
mod forward;
mod packets;
mod rows;
mod server;
mod zone;
