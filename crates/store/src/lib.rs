//! Revisioned keys, compare-and-set transactions, watch from a revision, compaction.
