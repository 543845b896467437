//! One file per controller, all listed in one slice.
