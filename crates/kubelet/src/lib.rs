//! Makes the node match its pods.
