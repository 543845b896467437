//! Which nodes answer clients that came to another node, and how they say so.
//!
//! A Node has the annotation `fairlead.io/dsr` while its proxy is in the ebpf mode: `by-default` for all Services that do not
//! ask for anything else, `on-request` for those that ask for it. Others send it packets to answer only then, and it takes
//! them only from nodes that have it, too. Nothing expires: the programs work on while the proxy does not run.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use api::kinds::NODES;
use proxy::{Mode, NodeView, StatusHandle, Taker};
use reconcile::{Api, Patch};
use serde_json::json;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::node_object::Node;

const BY_DEFAULT: &str = "by-default";
const ON_REQUEST: &str = "on-request";
const RETRY: Duration = Duration::from_secs(5);

/// What this node's own Node says; the outer `None` while there is no Node.
pub type Said = Option<Option<String>>;

/// How others see a node with these addresses; `None`: as one that takes nothing.
pub fn taker_with(annotation: Option<&str>, addresses: Vec<IpAddr>) -> Option<Taker> {
    let by_default = match annotation? {
        BY_DEFAULT => true,
        ON_REQUEST => false,
        // Of a newer version of us, or by hand: it does not agree to what is not understood.
        _ => return None,
    };
    Some(Taker { addresses, by_default })
}

fn taker(node: &Node) -> Option<Taker> {
    taker_with(node.annotation(services::DSR_ANNOTATION), node.addresses())
}

/// Those of other nodes than `own`.
pub fn takers<'a>(nodes: impl IntoIterator<Item = &'a Node>, own: &str) -> BTreeMap<Arc<str>, Taker> {
    let others = nodes.into_iter().filter(|node| node.name() != own);
    others.filter_map(|node| Some((node.name().into(), taker(node)?))).collect()
}

/// Takes in what has become of another node; whether that changes anything.
pub fn notice(takers: &mut BTreeMap<Arc<str>, Taker>, name: &str, node: Option<&Node>) -> bool {
    let after = node.and_then(taker);
    if takers.get(name) == after.as_ref() {
        return false;
    }
    match after {
        Some(after) => takers.insert(name.into(), after),
        None => takers.remove(name),
    };
    true
}

/// The same for a view that others hold.
pub fn notice_in(view: &mut Arc<NodeView>, name: &str, node: Option<&Node>) -> bool {
    let mut takers = view.takers.clone();
    let differs = notice(&mut takers, name, node);
    if differs {
        *view = Arc::new(NodeView { takers, ..NodeView::clone(view) });
    }
    differs
}

/// Keeps the annotation of this node true until cancelled. Returns early if the identity may not write it.
pub async fn announce(
    client: kube::Client,
    name: String,
    by_default: bool,
    mut status: StatusHandle,
    mut said: watch::Receiver<Said>,
    token: CancellationToken,
) {
    let nodes = Api::new(&client, &NODES);
    let on = if by_default { BY_DEFAULT } else { ON_REQUEST };
    loop {
        let mode = status.borrow_and_update().mode;
        let held = said.borrow_and_update().clone();
        let mut retry = false;
        // Before the first commit nobody knows better than whoever wrote it.
        if let (Some(mode), Some(held)) = (mode, held) {
            let wanted = (mode == Mode::Ebpf).then_some(on);
            if held.as_deref() != wanted {
                let body = json!({"metadata": {"annotations": {services::DSR_ANNOTATION: wanted}}});
                match nodes.patch("", &name, Patch::Merge, &body).await {
                    Ok(_) => {}
                    Err(error) if error.is_forbidden() => {
                        let value = wanted.map_or("-".to_owned(), |value| format!("={value}"));
                        tracing::info!(
                            "cannot say whether endpoints of this node answer clients of other nodes: {error}; grant patch of nodes, or run `kubectl annotate node {name} {}{value}`",
                            services::DSR_ANNOTATION
                        );
                        return;
                    }
                    Err(error) => {
                        tracing::warn!("cannot annotate this node, will try again: {error}");
                        retry = true;
                    }
                }
            }
        }
        tokio::select! {
            changed = status.changed() => if changed.is_err() { return },
            changed = said.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY), if retry => {}
            () = token.cancelled() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use kube::client::Body;
    use proxy::Status;

    use super::*;

    fn node(name: &str, annotation: Option<&str>) -> Node {
        let node = json!({
            "metadata": {"name": name, "annotations": {services::DSR_ANNOTATION: annotation.unwrap_or_default()}},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.7"}]},
        });
        serde_json::from_value(node).expect("a Node")
    }

    #[test]
    fn nodes_that_say_so_take_packets() {
        let nodes = [
            node("a", Some(BY_DEFAULT)),
            node("b", Some(ON_REQUEST)),
            node("c", None),
            node("d", Some("sometimes")),
            node("own", Some(BY_DEFAULT)),
        ];
        let mut takers = takers(&nodes, "own");
        let names = |takers: &BTreeMap<Arc<str>, Taker>| {
            takers.iter().map(|(name, taker)| (name.to_string(), taker.by_default)).collect::<Vec<_>>()
        };
        assert_eq!(names(&takers), [("a".to_owned(), true), ("b".to_owned(), false)]);
        assert_eq!(takers["a"].addresses, ["192.0.2.7".parse::<IpAddr>().expect("ip")]);
        assert!(!notice(&mut takers, "a", Some(&node("a", Some(BY_DEFAULT)))));
        assert!(notice(&mut takers, "a", Some(&node("a", Some(ON_REQUEST)))));
        assert!(notice(&mut takers, "b", None) && !notice(&mut takers, "c", None));
        assert_eq!(names(&takers), [("a".to_owned(), false)]);
    }

    #[tokio::test]
    async fn a_node_says_so_while_its_mode_can() {
        let told: Arc<Mutex<Vec<String>>> = Arc::default();
        let (said, seen) = watch::channel::<Said>(Some(None));
        let said = Arc::new(said);
        let server = {
            let (told, said) = (told.clone(), said.clone());
            // An API server whose watch tells at once what was written.
            tower::service_fn(move |request: http::Request<Body>| {
                let (told, said) = (told.clone(), said.clone());
                async move {
                    use http_body_util::BodyExt;
                    let path = format!("{} {}", request.method(), request.uri().path());
                    let body = request.into_body().collect().await?.to_bytes();
                    let body: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
                    let value = body["metadata"]["annotations"][services::DSR_ANNOTATION].as_str().map(str::to_owned);
                    told.lock().expect("no panic").push(format!("{path} {value:?}"));
                    said.send_replace(Some(value));
                    let answer = http::Response::builder().status(200).body(Body::from(b"{}".to_vec()));
                    answer.map_err(|error| kube::Error::Service(Box::new(error)))
                }
            })
        };
        let (change, status) = watch::channel(Status::default());
        let token = CancellationToken::new();
        let client = kube::Client::new(server, "default");
        let task = tokio::spawn(announce(client, "n1".into(), false, status, seen, token.clone()));
        let until = async |count: usize| {
            while told.lock().expect("no panic").len() < count {
                tokio::task::yield_now().await;
            }
        };
        let in_mode = |mode| Status { mode: Some(mode), ..Status::default() };
        change.send_replace(in_mode(Mode::Ebpf));
        until(1).await;
        // What others take away is said again.
        said.send_replace(Some(None));
        until(2).await;
        change.send_replace(in_mode(Mode::Nftables));
        until(3).await;
        token.cancel();
        task.await.expect("no panic");
        let [on, off] = [Some(ON_REQUEST), None].map(|value| format!("PATCH /api/v1/nodes/n1 {value:?}"));
        assert_eq!(*told.lock().expect("no panic"), [on.clone(), on, off]);
    }
}
