//! A node as a process of its own, so that it can be killed and stopped: this test program once more.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::time::Duration;

use loadbalancer::Plan;
use loadbalancer::layer2::{Announcer, Config, Orders};
use loadbalancer::vrrp::instance::RouterConfig;
use loadbalancer::vrrp::machine::Settings;
use loadbalancer::vrrp::packet::Checksum;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

use super::vips;
use crate::net::{Net, address};

/// Carries the order; without it the program's node is no test of anything.
pub const ORDER: &str = "FAIRLEAD_WIRE_NODE";
pub const ROUTER: u8 = 51;
/// A stall of three of them would be taken for a death.
pub const INTERVAL: Duration = Duration::from_secs(1);

/// Who a node is.
#[derive(Serialize, Deserialize)]
struct Order {
    name: String,
    names: Vec<String>,
    /// In virtual routers of either family with this priority; otherwise by vote.
    priority: Option<u8>,
}

/// It dies when this is dropped.
pub struct Node {
    pub name: &'static str,
    child: Child,
}

impl Node {
    /// One that announces to its own network.
    pub fn start(net: &Net, names: &[&'static str], name: &'static str, priority: Option<u8>) -> Node {
        let order = Order { name: name.into(), names: names.iter().map(|one| (*one).to_owned()).collect(), priority };
        let order = serde_json::to_string(&order).expect("plain text");
        Node::run(net, name, "wire::node::announces_until_it_is_told_to_end", &order)
    }

    /// A test that finds its order in the environment, and ends with its input.
    pub fn run(net: &Net, name: &'static str, test: &str, order: &str) -> Node {
        let mut command = net.on(name);
        command.arg(std::env::current_exe().expect("this program"));
        command.args([test, "--exact", "--ignored", "--nocapture"]).env(ORDER, order);
        let child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("setpriv runs");
        Node { name, child }
    }

    /// A line of its input.
    pub fn tell(&mut self, line: &str) {
        let input = self.child.stdin.as_mut().expect("it listens");
        writeln!(input, "{line}").expect("it lives");
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(i32::try_from(self.child.id()).expect("a pid")), signal).expect("it lives");
    }

    pub fn stop(&self) {
        self.signal(Signal::SIGSTOP);
    }

    pub fn go_on(&self) {
        self.signal(Signal::SIGCONT);
    }

    /// It gives up what it has, and ends.
    pub fn leave(mut self) {
        drop(self.child.stdin.take());
        assert!(self.child.wait().expect("waited for").success(), "it ended as it was told");
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // One that has left is dead already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
#[ignore = "a node of the tests beside it, which start it as a process"]
fn announces_until_it_is_told_to_end() {
    let Ok(order) = std::env::var(ORDER) else { return };
    let order: Order = serde_json::from_str(&order).expect("an order");
    let place = |name: &String| order.names.iter().position(|one| one == name).expect("a member") + 1;
    let own = place(&order.name);
    let incarnation = u64::from(std::process::id());
    let config = Config { node: order.name.clone(), addresses: vec![address(own, true)], cluster: 1, incarnation };
    let announcer = Announcer::start(config, Default::default(), |_| ()).expect("it announces");
    let addresses = |name| [true, false].map(|v4| address(place(name), v4)).to_vec();
    let members: BTreeMap<String, _> = order.names.iter().map(|name| (name.clone(), addresses(name))).collect();
    let router = |vip, priority| RouterConfig {
        name: format!("{vip}"),
        interface: String::new(),
        id: ROUTER,
        settings: Settings { priority, interval: INTERVAL, preempts: true, preempt_delay: Duration::ZERO },
        addresses: vec![vip],
        peers: Vec::new(),
        source: None,
        checksum: Checksum::default(),
        waits: false,
    };
    let voted = vips().map(|vip| (vip, None)).into_iter().filter(|_| order.priority.is_none());
    announcer.set_orders(Orders {
        plan: Plan { members: members.keys().cloned().collect(), addresses: voted.collect() },
        members,
        routers: order.priority.map_or(Vec::new(), |priority| vips().map(|vip| router(vip, priority)).into()),
        ..Orders::default()
    });
    std::io::stdin().read_to_end(&mut Vec::new()).expect("it waits for its end");
}
