//! Request, decision, store, watch: the generic API engine.
