//! What a change must pass before anyone reads it: the walls, the format, clippy without a warning.

use anyhow::Result;

use crate::{shell, walls};

pub fn run(_args: &[String]) -> Result<()> {
    walls::run(&[])?;
    shell::step(shell::cargo().args(["fmt", "--all", "--check"]))?;
    // The dev profile, which the tests use too: build scripts and procedural macros are compiled once for both.
    shell::step(shell::cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))
}
