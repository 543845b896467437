//! Chores of this repository, the same for people and for CI: `cargo xtask NAME`.

mod bench;
mod cluster;
mod demo;
mod deps;
mod guest;
mod hosts;
mod image;
mod interrupt;
mod lint;
mod schema;
mod shell;
mod soak;
mod walls;

use std::process::ExitCode;

use anyhow::Result;

/// One chore: its name, what it is for, and what it runs on the remaining arguments.
struct Chore {
    name: &'static str,
    about: &'static str,
    run: fn(&[String]) -> Result<()>,
}

const CHORES: &[Chore] = &[
    Chore { name: "deps", about: "install what building, testing and the demo need from Debian", run: deps::run },
    Chore { name: "lint", about: "walls, format, clippy without a warning", run: lint::run },
    Chore { name: "walls", about: "fail on a dependency that points upward or sideways", run: walls::run },
    Chore { name: "image", about: "build the images of the examples and tests into target/images", run: image::run },
    Chore { name: "guest", about: "run the tests that need another kernel in an emulated machine", run: guest::run },
    Chore { name: "demo", about: "from `kubectl apply` to a packet, on three nodes", run: demo::run },
    Chore {
        name: "bench",
        about: "the figures: up, pods, memory, list, writes, proxy (release build)",
        run: bench::run,
    },
    Chore {
        name: "schema",
        about: "generate the schema table from checkouts of kubernetes/api and apimachinery",
        run: schema::run,
    },
    Chore { name: "soak", about: "all tests with many random cases (release build)", run: soak::run },
];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let Some(chore) = args.first().and_then(|name| CHORES.iter().find(|chore| chore.name == name)) else {
        eprintln!("usage: cargo xtask CHORE [ARGS]\n");
        for chore in CHORES {
            eprintln!("  {:<8}{}", chore.name, chore.about);
        }
        return ExitCode::from(2);
    };
    match (chore.run)(&args[1..]) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("xtask {}: {error:#}", chore.name);
            ExitCode::FAILURE
        }
    }
}
