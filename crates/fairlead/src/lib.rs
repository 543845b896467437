//! Kubernetes in one binary, built around its Service network.
