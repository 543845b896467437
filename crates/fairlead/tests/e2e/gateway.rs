//! Gateways as people use them: an address of their own, routes to pods over HTTP, HTTPS and TCP, statuses that say how it is,
//! changes and rolling updates under load.

use crate::cluster::{Cluster, kubectls};
use crate::death::{expect, until};
use crate::ingress::{OBJECTS, apply, secret};
use crate::load::{Load, Manner};

const NODES: u8 = 2;
const SECONDS: u32 = 120;

const GATEWAY: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: edge}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: shop, namespace: edge}
spec:
  gatewayClassName: fairlead
  infrastructure: {labels: {team: shop}}
  listeners:
    - {name: web, port: 80, protocol: HTTP, allowedRoutes: {namespaces: {from: All}}}
    - {name: tls, port: 443, protocol: HTTPS, tls: {certificateRefs: [{name: shop, namespace: default}]}, allowedRoutes: {namespaces: {from: All}}}
    - {name: raw, port: 7000, protocol: TCP, allowedRoutes: {namespaces: {from: All}}}
---
apiVersion: gateway.networking.k8s.io/v1
kind: ReferenceGrant
metadata: {name: shop}
spec:
  from: [{group: gateway.networking.k8s.io, kind: Gateway, namespace: edge}]
  to: [{group: "", kind: Secret, name: shop}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: shop}
spec:
  parentRefs: [{name: shop, namespace: edge}]
  hostnames: [shop.example]
  rules:
    - matches: [{path: {value: /one}}]
      backendRefs: [{name: one, port: 80}]
    - matches: [{path: {value: /two}}]
      backendRefs: [{name: two, port: 80}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: load}
spec:
  parentRefs: [{name: shop, namespace: edge, sectionName: web}]
  hostnames: [web]
  rules: [{backendRefs: [{name: one, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: TCPRoute
metadata: {name: raw}
spec:
  parentRefs: [{name: shop, namespace: edge}]
  rules: [{backendRefs: [{name: two, port: 80}]}]
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: broken}
spec:
  parentRefs: [{name: shop, namespace: edge}]
  hostnames: [broken.example]
  rules: [{backendRefs: [{name: nobody, port: 80}]}]
"#;

/// A condition of an object, as `STATUS REASON`.
fn condition(cluster: &Cluster, object: &str, place: &str, kind: &str) -> String {
    let path = format!(
        "{{{place}.conditions[?(@.type==\"{kind}\")].status}} {{{place}.conditions[?(@.type==\"{kind}\")].reason}}"
    );
    cluster.run(&format!("kubectl get {object} -o jsonpath='{path}'"), "", SECONDS).output
}

/// What curl prints from outside.
fn curl(cluster: &Cluster, address: &str, flags: &str, url: &str) -> String {
    let line = format!(
        "fairlead node exec --data-dir $DIR outside -- curl -sSki --max-time 3 {flags} --connect-to ::{address}: {url}"
    );
    cluster.run(&line, "", SECONDS).output
}

fn address(cluster: &Cluster, namespace: &str, gateway: &str) -> String {
    let line =
        format!("kubectl --namespace={namespace} get gateway {gateway} -o jsonpath='{{.status.addresses[0].value}}'");
    until("the Gateway has an address", || expect(cluster, &line).contains('.'));
    expect(cluster, &line)
}

#[test]
fn a_gateway_leads_from_its_own_address_to_pods() {
    let cluster = Cluster::up(&kubectls()[0], NODES);
    let cluster = &cluster;
    apply(cluster, OBJECTS);
    apply(cluster, &secret("1", "shop.example"));
    apply(cluster, GATEWAY);
    expect(cluster, "kubectl rollout status deployment/one --timeout=60s");
    expect(cluster, "kubectl rollout status deployment/two --timeout=60s");
    expect(cluster, "kubectl wait gatewayclass/fairlead --for=condition=Accepted --timeout=30s");
    expect(cluster, "kubectl --namespace=edge wait gateway/shop --for=condition=Programmed --timeout=30s");
    let address = address(cluster, "edge", "shop");
    for flags in ["--http1.1", "--http2"] {
        for (path, image) in [("/one", "nginx:test1 on "), ("/two/x", "nginx:test2 on ")] {
            let url = format!("https://shop.example{path}");
            until("the paths answer over TLS", || curl(cluster, &address, flags, &url).contains(image));
        }
    }
    until("without TLS, too", || curl(cluster, &address, "", "http://shop.example/one").contains("nginx:test1 on "));
    assert!(curl(cluster, &address, "", "http://shop.example/").contains("HTTP/1.1 404"));
    until("a connection is carried as it is", || {
        curl(cluster, &address, "", "http://any.example:7000/").contains("nginx:test2 on ")
    });

    // What is said of each.
    for (object, place, kind, wanted) in [
        ("--namespace=edge gateway/shop", ".status", "Accepted", "True Accepted"),
        ("--namespace=edge gateway/shop", ".status.listeners[1]", "ResolvedRefs", "True ResolvedRefs"),
        ("httproute/shop", ".status.parents[0]", "Accepted", "True Accepted"),
        ("httproute/broken", ".status.parents[0]", "ResolvedRefs", "False BackendNotFound"),
        ("tcproute/raw", ".status.parents[0]", "Accepted", "True Accepted"),
    ] {
        until("the status is written", || condition(cluster, object, place, kind) == wanted);
    }
    assert!(curl(cluster, &address, "", "http://broken.example/").contains("HTTP/1.1 500"));
    let service =
        "kubectl --namespace=edge get service shop-fairlead -o jsonpath='{.metadata.labels.team} {.spec.type}'";
    assert_eq!(expect(cluster, service), "shop LoadBalancer");

    // A rolling update, and routes that come and go, under load.
    let id = lab::id_of(cluster.data_dir().as_ref()).expect("the cluster has an id");
    let lab = lab::Lab::open(&id).expect("the cluster is a lab");
    let mut load = Load::start();
    for manner in [Manner::Fresh, Manner::KeepAlive] {
        let at = format!("{address}:80").parse().expect("an address");
        load.add(lab.outside().expect("the outside is there"), at, manner, 50);
    }
    for round in 1..=2 {
        expect(cluster, &format!("kubectl set env deployment/one ROUND={round}"));
        apply(
            cluster,
            &GATEWAY
                .replace("sectionName: web}", &format!("sectionName: web, port: {}}}", 80 * (round % 2)))
                .replace(", port: 0}", "}"),
        );
        apply(cluster, &secret(&round.to_string(), "shop.example"));
        expect(cluster, "kubectl rollout status deployment/one --timeout=100s");
    }
    let tally = load.end();
    println!("{} answers, {} repeated, the slowest took {:?}", tally.answers, tally.repeats, tally.slowest);
    assert!(tally.answers > 100, "{} answers", tally.answers);
    assert!(tally.failures.is_empty(), "{} failures\n{}", tally.failures.len(), tally.failures.join("\n"));

    // Without the grant the certificate is nobody's to show, and with the Gateway its Service goes.
    expect(cluster, "kubectl delete referencegrant shop");
    until("the listener says why", || {
        condition(cluster, "--namespace=edge gateway/shop", ".status.listeners[1]", "ResolvedRefs")
            == "False RefNotPermitted"
    });
    until("nothing is shown", || curl(cluster, &address, "", "https://shop.example/one").contains("curl: ("));
    expect(cluster, "kubectl --namespace=edge delete gateway shop");
    let left = "kubectl --namespace=edge get services,endpointslices -o name";
    until("the Service is gone", || expect(cluster, left).trim().is_empty());
}

/// Beside the Ingress controller alone: Gateways of a class of its own.
pub fn alone(cluster: &Cluster) {
    expect(cluster, "kubectl apply -f $EXAMPLES/ingress/gatewayclass.yaml");
    let gateway = r#"
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: apart}
spec: {gatewayClassName: fairlead-alone, listeners: [{name: web, port: 80, protocol: HTTP}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: apart}
spec: {parentRefs: [{name: apart}], rules: [{backendRefs: [{name: two, port: 80}]}]}
"#;
    apply(cluster, gateway);
    let address = address(cluster, "default", "apart");
    until("the Gateway of the one alone answers", || {
        curl(cluster, &address, "", "http://any.example/").contains("nginx:test2 on ")
    });
    expect(cluster, "kubectl delete gateway apart");
}
