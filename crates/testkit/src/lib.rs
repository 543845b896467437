//! An in-process cluster, fault injection and case files, for the tests of every crate.
