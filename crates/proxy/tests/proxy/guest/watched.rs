//! Endpoints that do not answer, end policies and counts in ipvs mode: what the other modes' tests ask, of IPVS.

use proxy::Mode;

use crate::net::World;
use crate::{ejection, end};

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn a_cut_endpoint_is_out_and_returns() {
    ejection::cut_and_mended(&[Mode::Ipvs]);
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn a_crashed_endpoint_is_hidden() {
    ejection::crashed_and_started(&[Mode::Ipvs]);
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn what_one_client_misses_ejects_nobody() {
    ejection::missed_by_one_client(&[Mode::Ipvs]);
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn a_frozen_endpoint_is_out_until_it_thaws() {
    ejection::frozen_and_thawed(&[Mode::Ipvs]);
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn traffic_is_counted() {
    ejection::counted(&[Mode::Ipvs]);
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn connections_end_as_the_service_says() {
    end::connections_end_as_the_service_says(Mode::Ipvs, &end::V4);
    end::connections_end_as_the_service_says(Mode::Ipvs, &end::V6);
}

#[test]
#[ignore = "needs IPVS: cargo xtask guest"]
fn a_udp_client_is_moved() {
    end::a_udp_client_is_moved_by(&World::new(), Mode::Ipvs);
}
