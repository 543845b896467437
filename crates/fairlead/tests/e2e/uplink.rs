//! `up --uplink` on a machine that is a namespace itself, with a world beyond it: pods get out, and `down` takes the way out away.

use crate::cluster::{Cluster, kubectls};
use crate::daemon::Daemon;
use crate::death::{expect, until};

#[test]
fn pods_reach_the_world_through_the_uplink_and_only_then() {
    let cluster = Cluster::new(&kubectls()[0]);
    let place = Place::make(&cluster);
    cluster.move_into(place.machine.as_ref(), "fairlead");
    cluster.move_into(place.machine.as_ref(), "kubectl");
    let before = place.seen(&cluster);
    cluster.start_with(1, &["--uplink"]);
    cluster.import(&cluster.data_dir(), &["busybox-test1.tar"]);
    expect(&cluster, "kubectl run traveller --image=busybox:test1 -- sleep 3600");
    expect(&cluster, "kubectl wait --for=condition=Ready pod/traveller --timeout=60s");
    let asks = "kubectl exec traveller -- timeout 5 wget -q -O - http://198.51.100.7:8000/page";
    until("the world answers", || cluster.run(asks, "", 20).output == "the world\n");

    cluster.down();
    assert_eq!(place.seen(&cluster), before, "down takes link, routes and rules of the machine away");

    cluster.start(1);
    expect(&cluster, "kubectl wait --for=condition=Ready pod/traveller --timeout=60s");
    let seen = cluster.run(asks, "", 20);
    assert!(!seen.success, "without an uplink there is no way out: {}", seen.output);
}

/// A machine and a world, each a network namespace.
struct Place {
    machine: String,
    world: String,
    _page: Daemon,
}

impl Place {
    fn make(cluster: &Cluster) -> Place {
        let id = cluster.dir().file_name().expect("the directory has a name").to_string_lossy().into_owned();
        let (machine, world) = (format!("{id}-machine"), format!("{id}-world"));
        let at = |name: &str| format!("/run/netns/{name}");
        let script = format!(
            "set -e; mkdir $TMP/pages; echo the world > $TMP/pages/page
            for name in {machine} {world}; do ip netns add $name; ip -netns $name link set lo up; done
            ip -netns {machine} link add eth0 up type veth peer name eth0 netns {world}
            ip -netns {world} link set eth0 up
            ip -netns {machine} address add 198.51.100.1/24 dev eth0
            ip -netns {world} address add 198.51.100.7/24 dev eth0
            ip -netns {machine} route add default via 198.51.100.7
            nsenter --net={} sh -c 'echo 1 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv6/conf/all/forwarding'",
            at(&machine)
        );
        let pages = cluster.dir().join("pages").to_string_lossy().into_owned();
        expect(cluster, &script);
        let net = format!("--net={}", at(&world));
        let serve = ["nsenter", &net, "busybox", "httpd", "-f", "-p", "198.51.100.7:8000", "-h", &pages];
        let page = Daemon::start(&serve, &cluster.dir().join("httpd.log"));
        Place { machine: at(&machine), world: at(&world), _page: page }
    }

    /// All that the machine's network is made of.
    fn seen(&self, cluster: &Cluster) -> String {
        let all = "ip -oneline link; ip route; ip -6 route; ip rule; nft list ruleset";
        expect(cluster, &format!("nsenter --net={} sh -c '{all}'", self.machine))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for pin in [&self.machine, &self.world] {
            let name = pin.rsplit('/').next().unwrap_or(pin);
            let _ = std::process::Command::new("ip").args(["netns", "delete", name]).status();
        }
    }
}
