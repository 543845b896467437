//! Every row of the catalog can do what every row can do: the smallest object of each kind lives its whole life.

use crate::cluster::{Cluster, Options};
use api::ObjectExt;
use apiserver::Row;
use serde_json::{Value, json};

const POD_SPEC: &str = r#"{"containers":[{"name":"c","image":"i"}]}"#;
const JOB_SPEC: &str = r#"{"template":{"spec":{"restartPolicy":"Never","containers":[{"name":"c","image":"i"}]}}}"#;
const WORKLOAD: &str = r#"{"serviceName":"s","selector":{"matchLabels":{"app":"a"}},"template":{"metadata":{"labels":{"app":"a"}},"spec":{"containers":[{"name":"c","image":"i"}]}}}"#;

/// What the smallest good object of a kind has beside its head, as JSON text.
fn smallest(kind: &str) -> Option<String> {
    let role = r#""roleRef":{"apiGroup":"rbac.authorization.k8s.io","kind":"ClusterRole","name":"view"},"subjects":[{"kind":"User","name":"u"}]"#;
    let rules = r#""rules":[{"apiGroups":[""],"resources":["pods"],"verbs":["get"]}]"#;
    Some(match kind {
        "Namespace" | "Node" | "ServiceAccount" => "{}".into(),
        "ConfigMap" | "Secret" => r#"{"data":{"a":"MQ=="}}"#.into(),
        "Endpoints" => r#"{"subsets":[{"addresses":[{"ip":"10.244.1.5"}],"ports":[{"port":80}]}]}"#.into(),
        "Event" => {
            r#"{"involvedObject":{"kind":"Pod","name":"p","namespace":"default"},"reason":"r","type":"Normal"}"#.into()
        }
        "PersistentVolumeClaim" => {
            r#"{"spec":{"accessModes":["ReadWriteOnce"],"resources":{"requests":{"storage":"1Gi"}}}}"#.into()
        }
        "PersistentVolume" => {
            r#"{"spec":{"capacity":{"storage":"1Gi"},"accessModes":["ReadWriteOnce"],"hostPath":{"path":"/x"}}}"#.into()
        }
        "Pod" => format!(r#"{{"spec":{POD_SPEC}}}"#),
        "ResourceQuota" => r#"{"spec":{"hard":{"pods":"10"}}}"#.into(),
        "Service" => r#"{"spec":{"ports":[{"port":80}]}}"#.into(),
        "ControllerRevision" => r#"{"revision":1,"data":{"a":"b"}}"#.into(),
        "StatefulSet" => format!(r#"{{"spec":{WORKLOAD}}}"#),
        "DaemonSet" | "Deployment" | "ReplicaSet" => {
            format!(r#"{{"spec":{}}}"#, WORKLOAD.replace(r#""serviceName":"s","#, ""))
        }
        "Job" => format!(r#"{{"spec":{JOB_SPEC}}}"#),
        "CronJob" => format!(r#"{{"spec":{{"schedule":"* * * * *","jobTemplate":{{"spec":{JOB_SPEC}}}}}}}"#),
        "PodDisruptionBudget" => r#"{"spec":{"minAvailable":1,"selector":{"matchLabels":{"app":"a"}}}}"#.into(),
        "IngressClass" => r#"{"spec":{"controller":"example.com/c"}}"#.into(),
        "Ingress" => r#"{"spec":{"defaultBackend":{"service":{"name":"s","port":{"number":80}}}}}"#.into(),
        "IPAddress" => r#"{"spec":{"parentRef":{"resource":"gateways","name":"g"}}}"#.into(),
        "ServiceCIDR" => r#"{"spec":{"cidrs":["192.0.2.0/24"]}}"#.into(),
        "EndpointSlice" => {
            r#"{"addressType":"IPv4","endpoints":[{"addresses":["10.244.1.5"]}],"ports":[{"port":80}]}"#.into()
        }
        "ClusterRoleBinding" | "RoleBinding" => format!("{{{role}}}"),
        "ClusterRole" | "Role" => format!("{{{rules}}}"),
        "StorageClass" => r#"{"provisioner":"example.com/p"}"#.into(),
        "PriorityClass" => r#"{"value":1000}"#.into(),
        "Lease" => r#"{"spec":{"holderIdentity":"h","leaseDurationSeconds":40}}"#.into(),
        "CertificateSigningRequest" => {
            r#"{"spec":{"request":"Zm9v","signerName":"kubernetes.io/kube-apiserver-client","usages":["client auth"]}}"#
                .into()
        }
        "BackendTLSPolicy" => r#"{"spec":{"targetRefs":[{"group":"","kind":"Service","name":"s"}],
            "validation":{"hostname":"a.example.com","wellKnownCACertificates":"System"}}}"#
            .into(),
        "GatewayClass" => r#"{"spec":{"controllerName":"example.com/c"}}"#.into(),
        "Gateway" => {
            r#"{"spec":{"gatewayClassName":"c","listeners":[{"name":"web","port":80,"protocol":"HTTP"}]}}"#.into()
        }
        "ListenerSet" => {
            r#"{"spec":{"parentRef":{"name":"g"},"listeners":[{"name":"a","port":81,"protocol":"HTTP"}]}}"#.into()
        }
        "ReferenceGrant" => r#"{"spec":{"from":[{"group":"gateway.networking.k8s.io","kind":"HTTPRoute",
            "namespace":"a"}],"to":[{"group":"","kind":"Service"}]}}"#
            .into(),
        "HTTPRoute" | "GRPCRoute" | "TLSRoute" => {
            r#"{"spec":{"parentRefs":[{"name":"g"}],"hostnames":["a.example.com"],
            "rules":[{"backendRefs":[{"name":"s","port":80}]}]}}"#
                .into()
        }
        "TCPRoute" | "UDPRoute" => r#"{"spec":{"rules":[{"backendRefs":[{"name":"s","port":80}]}]}}"#.into(),
        "IPAddressPool" => r#"{"spec":{"addresses":["192.0.2.0/24"]}}"#.into(),
        "BGPPeer" => r#"{"spec":{"myASN":64500,"peerASN":64501,"peerAddress":"192.0.2.1"}}"#.into(),
        "BFDProfile" | "BGPAdvertisement" | "Community" | "L2Advertisement" => r#"{"spec":{}}"#.into(),
        _ => return None,
    })
}

fn collection(row: &Row) -> String {
    let root = if row.group.is_empty() { "/api/v1".into() } else { format!("/apis/{}/{}", row.group, row.version) };
    if row.namespaced { format!("{root}/namespaces/default/{}", row.plural) } else { format!("{root}/{}", row.plural) }
}

#[tokio::test]
async fn every_row_has_a_schema_and_a_list() {
    let cluster = Cluster::new(Options::default()).await;
    let admin = cluster.admin();
    for row in cluster.server.registry().catalog.rows() {
        assert!(row.schema.is_some(), "{} has no entry in the schema table", row.kind);
        if row.is_virtual {
            continue;
        }
        let list = admin.get(&collection(row)).await;
        assert_eq!(list.code, 200, "{}: {list:?}", row.kind);
        assert_eq!(list.text("/kind"), format!("{}List", row.kind));
        assert_eq!(list.text("/apiVersion"), row.api_version());
        assert!(list.json()["items"].is_array(), "{}: {list:?}", row.kind);
    }
}

#[tokio::test]
async fn every_row_lives_a_whole_life() {
    let cluster = Cluster::new(Options::default()).await;
    let mut failures = Vec::new();
    for row in cluster.server.registry().catalog.rows().iter().filter(|r| !r.is_virtual) {
        if let Err(problem) = life(&cluster, row).await {
            failures.push(format!("{}: {problem}", row.kind));
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

async fn life(cluster: &Cluster, row: &Row) -> Result<(), String> {
    let admin = cluster.admin();
    let text = smallest(&row.kind).ok_or("has no smallest object: add it to the list")?;
    let mut object: Value = serde_json::from_str(&text).map_err(|e| format!("{text}: {e}"))?;
    object["apiVersion"] = json!(row.api_version());
    object["kind"] = json!(row.kind);
    // The name of an IPAddress is the address.
    let name = if *row.kind == *"IPAddress" { "192.0.2.1" } else { "one" };
    object["metadata"] = json!({"name": name});
    let (all, one) = (collection(row), format!("{}/{name}", collection(row)));
    let want = |what: &str, answer: &crate::cluster::Answer, code: u16| {
        if answer.code == code {
            return Ok(());
        }
        Err(format!("{what} answers {}: {}", answer.code, String::from_utf8_lossy(&answer.body)))
    };

    let made = admin.send("POST", &format!("{all}?fieldValidation=Strict"), &object).await;
    want("create", &made, 201)?;
    want("create again", &admin.send("POST", &all, &object).await, 409)?;
    let got = admin.get(&one).await;
    want("get", &got, 200)?;
    if got.json() != made.json() {
        return Err(format!("what was made is not what is there:\n{}\n{}", made.json(), got.json()));
    }
    let listed = admin.get(&format!("{all}?fieldSelector=metadata.name%3D{name}")).await;
    want("list", &listed, 200)?;
    if listed.json()["items"] != json!([got.json()]) {
        return Err(format!("list has something else: {}", listed.json()));
    }

    // What the server answers is what it takes back, strictly and without a change.
    let same = admin.send("PUT", &format!("{one}?fieldValidation=Strict"), &got.json()).await;
    want("update with the same", &same, 200)?;
    if same.json().resource_version() != got.json().resource_version() {
        return Err(format!("an update without a change is a write:\n{}\n{}", got.json(), same.json()));
    }
    let mut labelled = got.json();
    labelled.metadata_mut().insert("annotations".into(), json!({"put": "yes"}));
    want("update", &admin.send("PUT", &one, &labelled).await, 200)?;
    let merge = json!({"metadata": {"annotations": {"merge": "yes"}}});
    want("merge patch", &admin.patch(&one, "merge-patch+json", &merge).await, 200)?;
    let strategic = json!({"metadata": {"annotations": {"strategic": "yes"}}});
    want("strategic patch", &admin.patch(&one, "strategic-merge-patch+json", &strategic).await, 200)?;
    let json_patch = json!([{"op": "add", "path": "/metadata/annotations/json", "value": "yes"}]);
    want("JSON patch", &admin.patch(&one, "json-patch+json", &json_patch).await, 200)?;
    let config = json!({"apiVersion": row.api_version(), "kind": row.kind,
        "metadata": {"name": name, "annotations": {"apply": "yes"}}});
    let applied = admin.patch(&format!("{one}?fieldManager=me"), "apply-patch+yaml", &config).await;
    want("apply", &applied, 200)?;
    let annotations = json!({"put": "yes", "merge": "yes", "strategic": "yes", "json": "yes", "apply": "yes"});
    if applied.json()["metadata"]["annotations"] != annotations {
        return Err(format!("a write was lost: {}", applied.json()["metadata"]));
    }
    if row.has_status {
        want("get status", &admin.get(&format!("{one}/status")).await, 200)?;
        let status = admin.patch(&format!("{one}/status"), "merge-patch+json", &json!({"status": {}})).await;
        want("patch status", &status, 200)?;
    }
    let accept = [("accept", "application/json;as=Table;v=v1;g=meta.k8s.io,application/json")];
    let table = admin.request("GET", &all, &accept, "").await;
    want("table", &table, 200)?;
    let (columns, rows) = (table.json()["columnDefinitions"].clone(), table.json()["rows"].clone());
    let width = columns.as_array().map_or(0, Vec::len);
    for row in rows.as_array().into_iter().flatten() {
        if row["cells"].as_array().map_or(0, Vec::len) != width {
            return Err(format!("the table is ragged: {row}"));
        }
    }

    let gone = admin.send("DELETE", &one, &json!({"propagationPolicy": "Background"})).await;
    want("delete", &gone, 200)?;
    if *row.kind == *"Namespace" {
        let empty = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "one"}, "spec": {}});
        want("finalize", &admin.send("PUT", &format!("{one}/finalize"), &empty).await, 200)?;
    }
    if *row.kind == *"ServiceCIDR" {
        // Its controller lets go of it.
        let empty = json!({"metadata": {"finalizers": []}});
        want("finalize", &admin.patch(&one, "merge-patch+json", &empty).await, 200)?;
    }
    want("get after delete", &admin.get(&one).await, 404)?;
    want("delete again", &admin.delete(&one).await, 404)
}
