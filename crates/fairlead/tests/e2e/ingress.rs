//! Ingresses as people use them: paths, hosts and TLS from outside through the node ports of `fairlead-ingress`, changes and
//! rolling updates under load; and the controller alone, with its own rights.

use crate::alone::MOUNT_BINARY;
use crate::cluster::{Cluster, kubectls};
use crate::death::{expect, until};
use crate::gateway;
use crate::load::{Load, Manner};

const NODES: u8 = 2;
const SECONDS: u32 = 120;

/// Two Deployments with a Service each, and an Ingress with a host, two paths and TLS.
pub const OBJECTS: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: one}
spec:
  replicas: 4
  selector: {matchLabels: {app: one}}
  template:
    metadata: {labels: {app: one}}
    spec:
      containers:
        - name: nginx
          image: nginx:test1
          readinessProbe: {httpGet: {path: /, port: 80}, periodSeconds: 1}
---
apiVersion: apps/v1
kind: Deployment
metadata: {name: two}
spec:
  selector: {matchLabels: {app: two}}
  template:
    metadata: {labels: {app: two}}
    spec:
      containers: [{name: nginx, image: "nginx:test2"}]
---
apiVersion: v1
kind: Service
metadata: {name: one}
spec: {selector: {app: one}, ports: [{name: http, port: 80}]}
---
apiVersion: v1
kind: Service
metadata: {name: two}
spec: {selector: {app: two}, ports: [{name: http, port: 80}]}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata:
  name: shop
  annotations:
    nginx.ingress.kubernetes.io/ssl-redirect: "false"
spec:
  tls: [{hosts: [shop.example], secretName: shop}]
  rules:
    - host: shop.example
      http:
        paths:
          - {path: /one, pathType: Prefix, backend: {service: {name: one, port: {name: http}}}}
          - {path: /two, pathType: Prefix, backend: {service: {name: two, port: {number: 80}}}}
---
apiVersion: networking.k8s.io/v1
kind: Ingress
metadata: {name: load}
spec:
  rules:
    - host: web
      http: {paths: [{path: /, pathType: Prefix, backend: {service: {name: one, port: {number: 80}}}}]}
"#;

/// A Secret with a certificate for this name.
pub fn secret(name: &str, host: &str) -> String {
    let key = rcgen::KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::new(vec![host.to_owned()]).expect("a name");
    params.distinguished_name.push(rcgen::DnType::CommonName, format!("{host} number {name}"));
    let certificate = params.self_signed(&key).expect("signed");
    let indented = |text: String| text.lines().map(|line| format!("    {line}\n")).collect::<String>();
    format!(
        "apiVersion: v1\nkind: Secret\nmetadata: {{name: shop}}\ntype: kubernetes.io/tls\nstringData:\n  tls.crt: |\n{}  tls.key: |\n{}",
        indented(certificate.pem()),
        indented(key.serialize_pem())
    )
}

struct Ports {
    http: String,
    https: String,
}

fn ports(cluster: &Cluster, service: &str) -> Ports {
    let port = |name: &str| {
        let path = format!("{{.spec.ports[?(@.name==\"{name}\")].nodePort}}");
        expect(cluster, &format!("kubectl --namespace=kube-system get service {service} -o jsonpath='{path}'"))
    };
    Ports { http: port("http"), https: port("https") }
}

/// What curl prints from outside, asking node NUMBER.
fn curl(cluster: &Cluster, node: u8, flags: &str, scheme: &str, port: &str, path: &str) -> String {
    let address = format!("192.168.49.{}", node + 1);
    let line = format!(
        "fairlead node exec --data-dir $DIR outside -- curl -sSkiv --max-time 3 {flags} \
         --resolve shop.example:{port}:{address} {scheme}://shop.example:{port}{path}"
    );
    cluster.run(&line, "", SECONDS).output
}

pub fn apply(cluster: &Cluster, text: &str) {
    let seen = cluster.run("kubectl apply -f -", text, SECONDS);
    assert!(seen.success, "{}", seen.output);
}

#[test]
fn an_ingress_leads_from_outside_to_pods() {
    let cluster = Cluster::up(&kubectls()[0], NODES);
    let cluster = &cluster;
    apply(cluster, OBJECTS);
    apply(cluster, &secret("1", "shop.example"));
    expect(cluster, "kubectl rollout status deployment/one --timeout=60s");
    expect(cluster, "kubectl rollout status deployment/two --timeout=60s");
    let Ports { http, https } = ports(cluster, "fairlead-ingress");
    assert_eq!(expect(cluster, "kubectl get ingress shop -o jsonpath='{.spec.ingressClassName}'"), "fairlead");

    // A class-less Ingress is given the default class. Each node answers, each path leads to its Service.
    for node in 1..=NODES {
        for (path, image) in [("/one", "nginx:test1 on "), ("/two/x", "nginx:test2 on ")] {
            for flags in ["--http1.1", "--http2"] {
                until("the paths answer", || curl(cluster, node, flags, "https", &https, path).contains(image));
            }
            until("without TLS, too", || curl(cluster, node, "", "http", &http, path).contains(image));
        }
        assert!(curl(cluster, node, "", "http", &http, "/").contains("HTTP/1.1 404"));
    }

    // The certificate is the Secret's, and changes with it.
    let shows = |number: &str| {
        curl(cluster, 1, "", "https", &https, "/one").contains(&format!("CN=shop.example number {number}"))
    };
    until("the Secret's certificate is shown", || shows("1"));
    apply(cluster, &secret("2", "shop.example"));
    until("the new certificate is shown", || shows("2"));

    // The client's own address arrives.
    let deny = "kubectl annotate ingress shop nginx.ingress.kubernetes.io/denylist-source-range=203.0.113.0/24";
    expect(cluster, deny);
    until("outside is denied", || curl(cluster, 1, "", "http", &http, "/one").contains("HTTP/1.1 403"));
    expect(cluster, "kubectl annotate ingress shop nginx.ingress.kubernetes.io/denylist-source-range-");
    until("outside may come again", || curl(cluster, 1, "", "http", &http, "/one").contains("HTTP/1.1 200"));

    // Its status has the addresses of the Service, which come from the pool of `up`.
    until("the address is written", || expect(cluster, "kubectl get ingress shop").contains("192.168.49.1"));

    // People hear what is wrong.
    expect(cluster, "kubectl create ingress broken --rule=broken.example/x=nobody:80,tls=nothing");
    expect(cluster, "kubectl annotate ingress broken nginx.ingress.kubernetes.io/server-snippet=x");
    for reason in ["ServiceNotFound", "SecretNotFound", "AnnotationNotSupported"] {
        let line = format!("kubectl get events --field-selector reason={reason},involvedObject.name=broken -o name");
        until("an event tells", || !expect(cluster, &line).trim().is_empty());
    }

    // A rolling update, and Ingresses that come and go, under load at both nodes.
    let id = lab::id_of(cluster.data_dir().as_ref()).expect("the cluster has an id");
    let lab = lab::Lab::open(&id).expect("the cluster is a lab");
    let mut load = Load::start();
    for manner in [Manner::Fresh, Manner::KeepAlive] {
        for node in lab.nodes() {
            let address = format!("{}:{http}", node.addresses()[0]).parse().expect("an address");
            load.add(lab.outside().expect("the outside is there"), address, manner, 50);
        }
    }
    for round in 1..=3 {
        expect(cluster, &format!("kubectl set env deployment/one ROUND={round}"));
        expect(cluster, "kubectl rollout status deployment/one --timeout=100s");
    }
    expect(cluster, "kubectl set env deployment/one ROUND=4");
    for number in 0..5 {
        expect(cluster, &format!("kubectl create ingress more-{number} --rule=web/more-{number}=two:80"));
    }
    apply(cluster, &secret("3", "shop.example"));
    expect(cluster, "kubectl rollout status deployment/one --timeout=100s");
    expect(cluster, "kubectl delete ingress more-0 more-1 more-2 more-3 more-4");
    let tally = load.end();
    println!("{} answers, {} repeated, the slowest took {:?}", tally.answers, tally.repeats, tally.slowest);
    assert!(tally.answers > 300, "{} answers", tally.answers);
    assert!(tally.failures.is_empty(), "{} failures\n{}", tally.failures.len(), tally.failures.join("\n"));

    // A node without the label serves no more.
    expect(cluster, "kubectl label node node-2 fairlead.io/ingress-");
    let slices = "kubectl --namespace=kube-system get endpointslices -l kubernetes.io/service-name=fairlead-ingress \
                  -o jsonpath='{.items[*].endpoints[*].nodeName}'";
    until("only node-1 serves", || !expect(cluster, slices).contains("node-2"));
    let direct =
        "fairlead node exec --data-dir $DIR outside -- curl -s -o /dev/null --max-time 3 http://192.168.49.3:10080/";
    until("node-2 has closed its port", || !cluster.run(direct, "", SECONDS).success);
    assert!(curl(cluster, 1, "", "http", &http, "/one").contains("nginx:test1 on "));
    expect(cluster, "kubectl label node node-2 fairlead.io/ingress=true");
    until("node-2 serves again", || curl(cluster, 2, "", "http", &http, "/one").contains("nginx:test1 on "));

    alone(cluster);
}

/// What annotations name is read with the rights of a node: ConfigMaps, Secrets, and who is asked.
#[test]
fn annotations_read_config_maps_and_secrets_with_the_rights_of_nodes() {
    let cluster = Cluster::up(&kubectls()[0], 1);
    let cluster = &cluster;
    apply(cluster, OBJECTS);
    apply(cluster, &secret("1", "shop.example"));
    expect(cluster, "kubectl rollout status deployment/two --timeout=60s");
    let Ports { http, https } = ports(cluster, "fairlead-ingress");
    let answers = |flags: &str, status: &str| {
        let seen = curl(cluster, 1, flags, "https", &https, "/two");
        let head = |line: &str| line.trim_start_matches("< ").starts_with("HTTP/") && line.contains(status);
        seen.lines().any(head)
    };
    let annotate = |text: &str| {
        expect(cluster, &format!("kubectl annotate --overwrite ingress shop nginx.ingress.kubernetes.io/{text}"));
    };
    until("the path answers", || answers("", " 200"));

    // Headers of every answer are a ConfigMap's, and change with it.
    let says = |value: &str| {
        let seen = curl(cluster, 1, "", "http", &http, "/two").to_ascii_lowercase();
        seen.contains(&format!("x-shop: {value}"))
    };
    expect(cluster, "kubectl create configmap headers --from-literal=X-Shop=open");
    annotate("custom-headers=headers");
    until("the ConfigMap's header is there", || says("open"));
    expect(cluster, "kubectl patch configmap headers --patch '{\"data\": {\"X-Shop\": \"closed\"}}'");
    until("the header is another", || says("closed"));

    // Whoever cannot be asked lets nobody in.
    annotate("auth-url=http://nobody.default.svc/");
    until("nobody is asked", || answers("", " 500"));
    annotate("auth-url=http://two.default.svc/");
    until("a Service lets everybody in", || answers("", " 200"));

    // Clients show a certificate of the Secret's authority; the Secret may come later.
    let key = rcgen::KeyPair::generate().expect("a key");
    let mut params = rcgen::CertificateParams::new(Vec::new()).expect("no names");
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.distinguished_name.push(rcgen::DnType::CommonName, "authority");
    let authority = params.self_signed(&key).expect("signed").pem();
    let issuer = rcgen::Issuer::new(params, key);
    let key = rcgen::KeyPair::generate().expect("a key");
    let signed = rcgen::CertificateParams::new(vec!["client.example".to_owned()]).expect("a name");
    let signed = signed.signed_by(&key, &issuer).expect("signed").pem();
    for (name, text) in [("ca.crt", authority), ("client.pem", signed + &key.serialize_pem())] {
        std::fs::write(cluster.dir().join(name), text).expect("written");
    }
    annotate("auth-tls-secret=default/clients");
    until("nobody knows whom to let in", || answers("--cert $TMP/client.pem", " 403"));
    expect(cluster, "kubectl create secret generic clients --from-file=ca.crt=$TMP/ca.crt");
    until("the client's certificate is known", || answers("--cert $TMP/client.pem", " 200"));
    until("who shows none stays outside", || answers("", " 400"));
}

/// By the manifest, as pods, with their own rights and a class of their own.
fn alone(cluster: &Cluster) {
    let deploy = format!(
        "set -e\nkubectl apply -f $EXAMPLES/ingress/ingress.yaml\nkind=deployment name=fairlead-ingress-controller\n{MOUNT_BINARY}\n\
         kubectl --namespace=kube-system rollout status deployment/fairlead-ingress-controller --timeout=60s"
    );
    expect(cluster, &deploy.replace("$BINARY", env!("CARGO_BIN_EXE_fairlead")));
    let Ports { http, https } = ports(cluster, "fairlead-ingress-controller");
    expect(
        cluster,
        "kubectl create ingress apart --class=fairlead-alone --rule=shop.example/apart=two:80,tls=shop \
         --annotation=nginx.ingress.kubernetes.io/rewrite-target=/",
    );
    until("the one alone answers", || {
        (1..=NODES).any(|node| curl(cluster, node, "", "https", &https, "/apart").contains("nginx:test2 on "))
    });
    gateway::alone(cluster);
    let both = |port: &str, path: &str| {
        (1..=NODES).map(|node| curl(cluster, node, "", "http", port, path)).collect::<Vec<_>>().concat()
    };
    assert!(!both(&http, "/one").contains("nginx:test1 on "), "Ingresses of the other class are not its own");
    let account = "system:serviceaccount:kube-system:fairlead-ingress-controller";
    for (line, allowed) in [
        ("watch ingresses -A", true),
        ("watch endpointslices -A", true),
        ("patch ingresses --subresource=status -A", true),
        ("patch ingresses -A", false),
        ("watch gateways -A", true),
        ("patch gateways --subresource=status -A", true),
        ("patch gateways -A", false),
        ("list pods -A", false),
        ("create secrets -A", false),
        ("update leases/fairlead-ingress-controller -n kube-system", true),
        ("update leases/another -n kube-system", false),
    ] {
        let seen = cluster.run(&format!("kubectl auth can-i --as={account} {line}"), "", SECONDS);
        assert_eq!(seen.success, allowed, "{line}: {}", seen.output);
    }
    // Without rights it says which, and whom to ask.
    expect(cluster, "kubectl delete clusterrolebinding fairlead-ingress-controller");
    let line = "set -e
        cp $KUBECONFIG $TMP/ingress.conf
        token=$(kubectl --namespace=kube-system create token fairlead-ingress-controller)
        export KUBECONFIG=$TMP/ingress.conf
        kubectl config unset users
        kubectl config set-credentials fairlead-user --token=$token
        fairlead ingress --kubeconfig $TMP/ingress.conf --http 127.0.0.1:0 --https 127.0.0.1:0 --status-bind-address 127.0.0.1:0";
    let seen = cluster.run(line, "", SECONDS);
    assert!(
        !seen.success && seen.output.contains("fairlead-ingress-controller of examples/ingress"),
        "{}",
        seen.output
    );
}

#[test]
fn flags_of_ingress_that_cannot_be_meant_are_refused() {
    let cluster = Cluster::new(&kubectls()[0]);
    for (flags, part) in [
        ("--http 127.0.0.1", "invalid socket address"),
        ("--kubeconfig /nowhere --status-bind-address 127.0.0.1:0", "/nowhere"),
        ("--publish-service web", "is not NAMESPACE/NAME"),
        ("--ingress-workers 0", "0 is not in 1..=1024"),
        ("--ingress-trusted-proxy nobody", "nobody"),
        ("--status-bind-address 127.0.0.1:0", "there is no --kubeconfig, and this is no pod"),
    ] {
        let seen = cluster.run(&format!("fairlead ingress {flags}"), "", SECONDS);
        assert!(!seen.success && seen.output.contains(part), "{flags}: {}", seen.output);
    }
}
