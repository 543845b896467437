//! Routes as text cases; and, in `proxy`, the same rules with real clients and real back ends.

mod answers;
mod clients;
mod doors;
mod external;
mod floods;
mod gateway;
mod mirrors;
mod ports;
mod proxy;
mod rollouts;
mod routes;
mod rows;
mod soak;
mod ways;
mod world;
