//! Every test with many random cases, compiled as it ships: what a short run in CI is too short to meet.

use anyhow::Result;

use crate::{guest, shell};

const CASES: &str = "20000";

pub fn run(args: &[String]) -> Result<()> {
    let cases = std::env::var("FAIRLEAD_CASES").unwrap_or_else(|_| CASES.to_owned());
    println!("soak: FAIRLEAD_CASES={cases}");
    shell::step(shell::cargo().args(["test", "--release", "--workspace"]).args(args).env("FAIRLEAD_CASES", &cases))?;
    // Who asks for certain tests does not mean these.
    if args.is_empty() { guest::run_with(&["--release".to_owned()], Some(cases)) } else { Ok(()) }
}
