//! Ingress and Gateway objects become routes and upstreams.
