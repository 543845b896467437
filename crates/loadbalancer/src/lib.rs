//! Gives LoadBalancer Services addresses and announces them.
