//! What a mode cannot do is said: a Service that asks for too much, a process that may do too little.

use std::process::Command;
use std::sync::{Arc, RwLock};

use proxy::{Config, Feed, Mode, Status};
use services::ServiceTable;

use crate::case::{Objects, node};
use crate::cgroup::Attached;
use crate::net::Namespace;
use crate::ring::Proxy;

#[test]
fn a_service_that_asks_for_what_a_mode_cannot_do_is_named() {
    let namespace = Namespace::new();
    for address in node().addresses {
        namespace.ip(&format!("addr add {address} dev lo"));
    }
    let lines = ["service s 10.96.0.10 53/SCTP", "service t 10.96.0.11 53/TCP", "endpoint t 10.244.1.5:53 node-2"];
    let attached = Attached::new();
    let in_vain = Some("default/s: SCTP");
    for (mode, expected) in
        [(Mode::Nftables, None), (Mode::Iptables, None), (Mode::Userspace, in_vain), (Mode::Ebpf, in_vain)]
    {
        let hooks = (mode == Mode::Ebpf).then(|| attached.hooks());
        let mut proxy = Proxy::start(&namespace.path, mode, &Objects::parse(&lines), hooks);
        let told: Vec<String> = proxy.status.borrow().unsupported.values().map(ToString::to_string).collect();
        assert_eq!(told.len(), usize::from(expected.is_some()), "{mode}: {told:?}");
        assert!(told.iter().zip(expected).all(|(told, expected)| told.starts_with(expected)), "{mode}: {told:?}");
        proxy.apply(&Objects::parse(&lines[1..]));
        assert!(proxy.status.borrow().unsupported.is_empty(), "{mode}");
        proxy.stop();
    }
}

/// Without CAP_NET_ADMIN the modes of the kernel do not start, and say what they need.
#[test]
fn without_rights_a_mode_does_not_start() {
    const ALONE: &str = "FAIRLEAD_TEST_WITHOUT_RIGHTS";
    if std::env::var_os(ALONE).is_none() {
        let own = std::env::current_exe().expect("this test");
        let mut command = Command::new("unshare");
        command.args(["--net", "setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"]).arg(own);
        let name = "refusals::without_rights_a_mode_does_not_start";
        let status = command.args(["--exact", name, "--nocapture"]).env(ALONE, "1").status();
        assert!(status.expect("unshare and setpriv").success());
        return;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("tokio");
    for mode in [Mode::Nftables, Mode::Iptables] {
        let mut table = ServiceTable::new();
        table.set_synced();
        let (_changes, changes) = tokio::sync::broadcast::channel(1);
        let (_node, node) = tokio::sync::watch::channel(Arc::new(node()));
        let (status, _) = tokio::sync::watch::channel(Status::default());
        let config = Config {
            mode,
            node,
            namespace: None,
            hooks: None,
            metrics: Default::default(),
            watching: proxy::Watching::default(),
        };
        let feed = Feed { table: Arc::new(RwLock::new(table)), changes };
        let token = tokio_util::sync::CancellationToken::new();
        let error = runtime.block_on(proxy::run(config, feed, status, token)).expect_err("no rights").to_string();
        assert!(error.contains("CAP_NET_ADMIN"), "{mode}: {error}");
    }
}
