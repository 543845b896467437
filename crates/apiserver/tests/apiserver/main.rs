//! The API server over a store in memory, asked as clients ask it.
//!
//! What one request answers is a case in `cases/*.txt` (see `case.rs` for the form). What needs time, many clients or a
//! broken store is a test in Rust beside them.

mod allocation;
mod bootstrap;
mod case;
mod cluster;
mod faults;
mod pattern;
mod rows;
mod watch;

use case::run;

macro_rules! case_files {
    ($($name:ident),+ $(,)?) => {$(
        #[tokio::test]
        async fn $name() {
            run(stringify!($name), include_str!(concat!("cases/", stringify!($name), ".txt"))).await;
        }
    )+};
}

#[tokio::test]
async fn known_gaps_still_differ() {
    case::run_gaps("known_gaps", include_str!("cases/known_gaps.txt")).await;
}

case_files![
    access,
    bodies,
    discovery,
    lifecycle,
    lists,
    patches,
    reviews,
    services,
    shapes,
    subresources,
    validation,
    writes,
];
