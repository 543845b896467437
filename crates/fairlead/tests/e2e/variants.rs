//! The choices that the other tests do not make, all in one cluster: iptables, VXLAN, a real etcd, a published port.

use crate::cluster::{Cluster, kubectls};
use crate::daemon::{Daemon, free_ports};
use crate::death::{expect, leftovers, until};
use crate::script::Script;
use crate::{play, settle};

const NODES: u8 = 2;
const SECONDS: u32 = 30;

#[test]
fn iptables_vxlan_etcd_and_a_published_port_carry_the_road() {
    let cluster = Cluster::new(&kubectls()[0]);
    let [client, peer, published] = free_ports();
    let (client, peer) = (format!("http://127.0.0.1:{client}"), format!("http://127.0.0.1:{peer}"));
    let data = cluster.dir().join("etcd").to_string_lossy().into_owned();
    let cluster_of_one = format!("default={peer}");
    let mut words = vec!["etcd", "--data-dir", &data, "--initial-cluster", &cluster_of_one];
    words.extend(["--listen-client-urls", &client, "--advertise-client-urls", &client]);
    words.extend(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer]);
    // What survives a loss of power is the store's own suite's to show.
    words.push("--unsafe-no-fsync");
    let _etcd = Daemon::start(&words, &cluster.dir().join("etcd.log"));
    until("etcd serves", || cluster.run(&format!("curl -sf {client}/health"), "", SECONDS).success);

    let (store, publish) = (format!("etcd={client}"), format!("{published}:30007"));
    let flags =
        ["--proxy-mode", "iptables", "--overlay", "vxlan", "--store", store.as_str(), "--publish", publish.as_str()];
    cluster.start_with(NODES, &flags);
    cluster.import(&cluster.data_dir(), &["nginx-test1.tar"]);
    let script = Script::parse("road.txt", include_str!("../cases/road.txt")).expect("the script can be read");
    settle(&play::play(&script, &cluster));

    // Each choice has left its mark.
    let on_node = |line: &str| expect(&cluster, &format!("fairlead node exec --data-dir $DIR node-1 -- {line}"));
    let rules = on_node("sh -c 'iptables-nft-save -t nat; iptables-legacy-save -t nat'");
    assert!(rules.contains("-A KUBE-NODEPORTS") && rules.contains("-j KUBE-EXT-V2OKYYMBY3REGZOG"), "{rules}");
    assert!(!on_node("nft list maps").contains("frontends"), "nothing of the nftables mode");
    let links = on_node("ip -details -oneline link show type vxlan");
    assert_eq!(links.lines().count(), 1, "one VXLAN link: {links}");
    let routes = on_node("ip route show 10.244.1.0/24");
    let link = links.split(": ").nth(1).and_then(|name| name.split(['@', ':']).next()).expect("a link has a name");
    assert!(routes.contains(&format!("dev {link}")), "pods of the other node are reached through {link}: {routes}");
    assert!(!cluster.dir().join("data/store").exists(), "no log of our own beside etcd");

    // A published port leads from the machine's loopback to the Service, and to nobody else's address.
    let page = expect(&cluster, &format!("curl -sSf --max-time 5 http://127.0.0.1:{published}"));
    assert!(page.starts_with("nginx:test1 on nginx-deployment-"), "{page}");

    let id = lab::id_of(cluster.data_dir().as_ref()).expect("the data directory has an id");
    cluster.down();
    assert_eq!(leftovers(&cluster, &id), Vec::<String>::new(), "down leaves nothing");
    let refused = cluster.run(&format!("curl -sS --max-time 5 http://127.0.0.1:{published}"), "", SECONDS);
    assert!(!refused.success, "the port is closed with the cluster: {}", refused.output);

    // All objects are in etcd, so the same cluster comes back.
    cluster.start_with(NODES, &flags);
    until("the published port answers again", || {
        let page = cluster.run(&format!("curl -sSf --max-time 5 http://127.0.0.1:{published}"), "", SECONDS);
        page.output.starts_with("nginx:test1 on nginx-deployment-")
    });
}
