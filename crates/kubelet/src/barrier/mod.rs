//! The removal barrier: a pod is stopped when no node sends it new connections any more.
//!
//! Each node's proxy says in the Lease `kube-system/fairlead-proxy-NODE` which versions of slices with a terminating endpoint its
//! kernel follows. While a pod ends, and only then, the slices of its namespace and these Leases are watched; `view` (pure)
//! decides. Then the connections that Services opened have a moment to end.

mod view;

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use api::kinds::{ENDPOINT_SLICES, LEASES, NODES};
use ipnet::IpNet;
use linux::connections::{Connection, Connections};
use reconcile::{Api, Scope};
use serde_json::Value;
use tokio::sync::{OnceCell, watch};
use tokio::time::Instant;

use crate::KubeletConfig;
use crate::pod::Pod;
use view::{Report, Slice, Stage, View};

/// Leases of proxies carry this label.
const REPORTS: &str = "fairlead.io/component=proxy";
/// For the proxies, and for the connections.
const EACH: Duration = Duration::from_secs(1);
/// A proxy that is later than this is asked for: its node may not be Ready.
const LATE: Duration = Duration::from_millis(100);
const FIRST_LOOK: Duration = Duration::from_millis(10);

/// What all pods of a node share.
pub struct Barrier {
    client: kube::Client,
    node_ips: Vec<IpAddr>,
    pod_cidrs: Vec<IpNet>,
    /// Whether this identity may read what it takes. Asked once.
    allowed: OnceCell<bool>,
    followed: Mutex<HashMap<String, Weak<Follower>>>,
    /// What was said already: it is said once.
    said: Mutex<BTreeSet<&'static str>>,
}

/// Watches as long as somebody holds it.
struct Follower {
    view: watch::Receiver<View>,
}

/// One ending pod's wait, shared by its containers: it takes place once.
pub struct Gate {
    barrier: Arc<Barrier>,
    namespace: String,
    pod: String,
    uid: String,
    until: Instant,
    passed: OnceCell<()>,
}

impl Gate {
    /// Returns when the pod may be stopped.
    pub async fn pass(&self) {
        self.passed.get_or_init(|| self.barrier.hold(self)).await;
    }
}

impl Barrier {
    pub fn new(client: &kube::Client, config: &KubeletConfig) -> Arc<Barrier> {
        let cidrs = config.pod_cidrs.iter().filter_map(|cidr| cidr.parse().ok());
        Arc::new(Barrier {
            client: client.clone(),
            node_ips: config.node_ips.clone(),
            pod_cidrs: cidrs.collect(),
            allowed: OnceCell::new(),
            followed: Mutex::default(),
            said: Mutex::default(),
        })
    }

    /// For a pod that was told to end now. It is held back for two seconds at the most.
    pub fn gate(self: &Arc<Self>, pod: &Pod) -> Arc<Gate> {
        Arc::new(Gate {
            barrier: self.clone(),
            namespace: pod.metadata.namespace.clone(),
            pod: pod.key(),
            uid: pod.metadata.uid.clone(),
            until: Instant::now() + EACH * 2,
            passed: OnceCell::new(),
        })
    }

    async fn hold(&self, gate: &Gate) {
        let until = gate.until.min(Instant::now() + EACH);
        let Ok(allowed) = tokio::time::timeout_at(until, self.allowed.get_or_try_init(|| self.ask())).await else {
            return;
        };
        if !allowed.is_ok_and(|allowed| *allowed) {
            return;
        }
        let follower = self.follow(&gate.namespace);
        if self.proxies(gate, &follower, until).await {
            let targets = follower.view.borrow().targets(&gate.uid);
            let addresses: BTreeSet<IpAddr> = targets.iter().map(|target| target.ip()).collect();
            let is_waited_for =
                |connection: &Connection| targets.contains(&connection.endpoint) && self.counts(connection);
            self.connections(gate, addresses, is_waited_for).await;
        }
    }

    /// Whether the slices and the reports can be read at all: a kubelet of another cluster may not. An error says nothing.
    async fn ask(&self) -> Result<bool, reconcile::ApiError> {
        let slices = format!("{}?limit=1", ENDPOINT_SLICES.path(""));
        let leases = format!("{}?limit=1&labelSelector={}", LEASES.path("kube-system"), REPORTS.replace('=', "%3D"));
        for path in [slices, leases] {
            match reconcile::api::request::<Value>(&self.client, "GET", &path, "", None).await {
                Ok(_) => {}
                Err(error) if error.is_forbidden() => {
                    tracing::warn!(
                        "pods are stopped without waiting for the nodes' proxies: {error}; grant get, list and watch of it to this kubelet"
                    );
                    return Ok(false);
                }
                Err(error) => return Err(error),
            }
        }
        Ok(true)
    }

    fn follow(&self, namespace: &str) -> Arc<Follower> {
        let mut followed = self.followed.lock().expect("no holder panics");
        followed.retain(|_, follower| follower.strong_count() > 0);
        if let Some(follower) = followed.get(namespace).and_then(Weak::upgrade) {
            return follower;
        }
        let mut slices = reconcile::watch::<Slice>(&self.client, &ENDPOINT_SLICES, Scope::namespace(namespace));
        let scope = Scope { label_selector: REPORTS.to_owned(), ..Scope::namespace("kube-system") };
        let mut reports = reconcile::watch::<Report>(&self.client, &LEASES, scope);
        let (sender, view) = watch::channel(View::default());
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    Some(change) = slices.recv() => sender.send_modify(|view| view.change_slice(change)),
                    Some(change) = reports.recv() => sender.send_modify(|view| view.change_report(change)),
                    () = sender.closed() => return,
                }
            }
        });
        let follower = Arc::new(Follower { view });
        followed.insert(namespace.to_owned(), Arc::downgrade(&follower));
        follower
    }

    /// Waits for the proxies. Says whether the pod was anybody's, and so may have connections.
    async fn proxies(&self, gate: &Gate, follower: &Follower, until: Instant) -> bool {
        let mut view = follower.view.clone();
        let mut excused: BTreeSet<String> = BTreeSet::new();
        let begun = Instant::now();
        let mut ask_at = Some(begun + LATE);
        loop {
            let stage = view.borrow_and_update().stage(&gate.uid);
            let late: BTreeSet<String> = match &stage {
                Stage::Unnamed => return false,
                Stage::Unreported => {
                    self.say("no node's proxy reports what it has applied: pods are stopped without waiting for them");
                    return false;
                }
                Stage::Applied => BTreeSet::new(),
                Stage::Sent(nodes) => nodes.difference(&excused).cloned().collect(),
                Stage::Unknown | Stage::Unmarked => BTreeSet::new(),
            };
            if matches!(stage, Stage::Applied | Stage::Sent(_)) && late.is_empty() {
                tracing::debug!(pod = gate.pod, after = ?begun.elapsed(), "no proxy sends it anything new");
                return true;
            }
            let asking = ask_at.filter(|_| !late.is_empty());
            tokio::select! {
                changed = view.changed() => if changed.is_err() { return true },
                () = tokio::time::sleep_until(asking.unwrap_or(until)), if asking.is_some() => {
                    ask_at = None;
                    if let Ok(gone) = tokio::time::timeout_at(until, self.not_ready(&late)).await {
                        excused = gone;
                    }
                }
                () = tokio::time::sleep_until(until) => {
                    tracing::info!(pod = gate.pod, waiting = %describe(&stage), "stopped before every proxy has let go of it");
                    return true;
                }
            }
        }
    }

    /// Those of the nodes that are not Ready: nobody waits for their proxies.
    async fn not_ready(&self, nodes: &BTreeSet<String>) -> BTreeSet<String> {
        let api = Api::new(&self.client, &NODES);
        let asked = nodes.iter().map(|name| {
            let api = &api;
            async move {
                let ready = match api.find("", name).await {
                    Ok(Some(node)) => is_ready(&node),
                    Ok(None) => false,
                    // Unknown: better wait.
                    Err(_) => true,
                };
                (!ready).then(|| name.clone())
            }
        });
        futures::future::join_all(asked).await.into_iter().flatten().collect()
    }

    /// Gives connections a second to end. The kernel would tell of their ends too, but only along with everybody else's, which
    /// slows down every connection of the node.
    async fn connections(&self, gate: &Gate, addresses: BTreeSet<IpAddr>, is_waited_for: impl Fn(&Connection) -> bool) {
        let until = gate.until.min(Instant::now() + EACH);
        let mut pause = FIRST_LOOK;
        loop {
            let (asked, begun) = (addresses.clone(), Instant::now());
            let look = move || -> Result<Vec<Connection>, linux::conntrack::Error> {
                let mut table = Connections::open(None)?;
                let each: Result<Vec<_>, _> = asked.into_iter().map(|address| table.open_to(address)).collect();
                Ok(each?.into_iter().flatten().collect())
            };
            let open = match tokio::task::spawn_blocking(look).await {
                Ok(Ok(open)) => open.iter().filter(|connection| is_waited_for(connection)).count(),
                Ok(Err(error)) => {
                    tracing::warn!(pod = gate.pod, "its connections are not waited for: {error}");
                    return;
                }
                Err(error) => {
                    tracing::warn!(pod = gate.pod, "its connections are not waited for: {error}");
                    return;
                }
            };
            if open == 0 {
                return;
            }
            // At most a twentieth of the time goes into looking.
            pause = (pause * 2).min(EACH / 10).max(begun.elapsed() * 20);
            let next = Instant::now() + pause;
            if next >= until {
                tokio::time::sleep_until(until).await;
                tracing::debug!(pod = gate.pod, open, "stopped with open connections");
                return;
            }
            tokio::time::sleep_until(next).await;
        }
    }

    /// What another node sent to a pod through a Service looks here as if its client had called the pod. Nobody of this node
    /// is meant by that: a probe, or a neighbour that calls the pod itself.
    fn counts(&self, connection: &Connection) -> bool {
        let client = connection.client.ip();
        let is_ours = self.node_ips.contains(&client) || self.pod_cidrs.iter().any(|cidr| cidr.contains(&client));
        connection.is_translated() || !is_ours
    }

    fn say(&self, what: &'static str) {
        if self.said.lock().expect("no holder panics").insert(what) {
            tracing::warn!("{what}");
        }
    }
}

fn is_ready(node: &Value) -> bool {
    let conditions = node["status"]["conditions"].as_array();
    conditions.is_some_and(|all| all.iter().any(|c| c["type"] == "Ready" && c["status"] == "True"))
}

fn describe(stage: &Stage) -> String {
    match stage {
        Stage::Sent(nodes) => format!("for the proxies of {}", nodes.iter().cloned().collect::<Vec<_>>().join(", ")),
        Stage::Unmarked => "for its EndpointSlices to say that it ends".to_owned(),
        _ => "for the lists of EndpointSlices and Leases".to_owned(),
    }
}
