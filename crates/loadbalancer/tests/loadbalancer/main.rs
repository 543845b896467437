//! Addresses as objects ask for them, and the vote over who announces them.

mod allocate;
mod elect;
