//! A pod's address, and the way to other nodes' pods.
