//! The walls between the floors: a crate may use lower floors, never its own or a higher one.
//!
//! Cargo builds whatever the manifests say, so this reads them and names every arrow that points upward or sideways.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::shell;

/// The building, from the ground up. A crate that is not here does not pass.
const FLOORS: &[&[&str]] = &[
    &["api"],
    &["patch", "services"],
    &["store", "linux"],
    &["runtime", "reconcile", "lab"],
    &["apiserver", "scheduler", "controllers", "kubelet", "podnet", "proxy", "dns", "loadbalancer", "ingress"],
    &["fairlead"],
];

/// Beside the building: they may use all of it, and nothing of it may use them, but for tests.
const BESIDE: &[&str] = &["testkit", "xtask"];

/// Pure floors: no I/O and no clock, so no crate that offers them.
const PURE: &[&str] = &["api", "patch", "services"];
const EFFECTS: &[&str] = &["tokio", "tokio-util", "hyper", "hyper-util", "nix", "libc", "rtnetlink", "kube", "rustix"];

/// No component opens the store: only the API server does, on what the binary hands it.
const STORE_USERS: &[&str] = &["apiserver", "fairlead", "testkit"];

pub fn run(_args: &[String]) -> Result<()> {
    let arrows = arrows(&shell::cargo_metadata()?)?;
    let faults: Vec<String> = faults(&arrows);
    if !faults.is_empty() {
        bail!("the walls do not hold:\n  {}", faults.join("\n  "));
    }
    println!("walls: {} crates, every dependency points downward", arrows.len());
    Ok(())
}

/// A declared dependency: on what, and whether only tests see it.
#[derive(Clone)]
struct Arrow {
    to: String,
    tests_only: bool,
}

type Arrows = BTreeMap<String, Vec<Arrow>>;

fn arrows(metadata: &Value) -> Result<Arrows> {
    let packages = metadata["packages"].as_array().context("cargo metadata has no packages")?;
    let mut arrows = Arrows::new();
    for package in packages {
        let name = package["name"].as_str().context("a package has no name")?;
        let dependencies = package["dependencies"].as_array().context("a package has no dependencies")?;
        let mut to: Vec<Arrow> = Vec::new();
        for dependency in dependencies {
            let target = dependency["name"].as_str().context("a dependency has no name")?;
            to.push(Arrow { to: target.to_owned(), tests_only: dependency["kind"] == "dev" });
        }
        arrows.insert(name.to_owned(), to);
    }
    Ok(arrows)
}

fn faults(arrows: &Arrows) -> Vec<String> {
    let mut faults = Vec::new();
    for (from, to) in arrows {
        if floor(from).is_none() && !BESIDE.contains(&from.as_str()) {
            faults.push(format!("crate {from} is on no floor: give it one in xtask/src/walls.rs"));
            continue;
        }
        for arrow in to {
            faults.extend(fault(from, arrow, arrows.contains_key(&arrow.to)));
        }
    }
    faults
}

fn fault(from: &str, arrow: &Arrow, ours: bool) -> Option<String> {
    let to = arrow.to.as_str();
    if PURE.contains(&from) && EFFECTS.contains(&to) && !arrow.tests_only {
        return Some(format!("{from} is pure and may not use {to}: let a higher floor act on what it decides"));
    }
    if !ours || BESIDE.contains(&from) {
        return None;
    }
    if BESIDE.contains(&to) {
        let allowed = to == "testkit" && arrow.tests_only;
        return (!allowed).then(|| format!("{from} -> {to}: only as a dev-dependency on testkit, used from tests/"));
    }
    if to == "store" && !STORE_USERS.contains(&from) && !arrow.tests_only {
        return Some(format!("{from} -> store: only the API server opens the store; use a kube::Client"));
    }
    let (below, above) = (floor(to)?, floor(from)?);
    if below < above {
        return None;
    }
    let direction = if below == above { "sideways" } else { "upward" };
    Some(format!(
        "{from} (floor {above}) -> {to} (floor {below}) points {direction}: move what both need to a lower floor"
    ))
}

fn floor(name: &str) -> Option<usize> {
    FLOORS.iter().position(|floor| floor.contains(&name))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each arrow should come to; `~>` is a dev-dependency.
    const CASES: &str = "
        proxy -> services     ok
        proxy -> dns          sideways
        services -> proxy     upward
        linux ~> lab          upward
        kubelet ~> testkit    ok
        kubelet -> testkit    dev-dependency
        kubelet -> store      only the API server
        apiserver -> store    ok
        services -> tokio     pure
        services ~> tokio     ok
        testkit -> fairlead   ok
        mystery -> api        on no floor
    ";

    #[test]
    fn every_kind_of_arrow_is_judged() {
        for case in CASES.lines().map(str::trim).filter(|line| !line.is_empty()) {
            let words: Vec<&str> = case.split_whitespace().collect();
            let mut building: Arrows = FLOORS.concat().iter().map(|name| (name.to_string(), Vec::new())).collect();
            building.extend(BESIDE.iter().map(|name| (name.to_string(), Vec::new())));
            let arrow = Arrow { to: words[2].to_owned(), tests_only: words[1] == "~>" };
            building.insert(words[0].to_owned(), vec![arrow]);
            let got = faults(&building).join("; ");
            let want = words[3..].join(" ");
            let as_wanted = if want == "ok" { got.is_empty() } else { got.contains(&want) };
            assert!(as_wanted, "{case}: got {got:?}");
        }
    }

    #[test]
    fn the_walls_of_this_workspace_hold() {
        run(&[]).expect("the walls hold");
    }
}
