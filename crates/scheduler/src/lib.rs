//! Chooses a node for a pod.
