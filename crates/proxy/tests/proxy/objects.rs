//! API objects in one line each.

use serde_json::{Value, json};

/// `default/NAME` with one TCP port 80; `spec` is merged over it.
pub fn service(name: &str, spec: Value) -> Vec<u8> {
    let mut object = json!({
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"clusterIP": "10.96.0.10", "clusterIPs": ["10.96.0.10"], "ports": [{"port": 80, "protocol": "TCP"}]},
    });
    for (key, value) in spec.as_object().expect("a map") {
        object["spec"][key] = value.clone();
    }
    object.to_string().into_bytes()
}

/// A slice of `default/SERVICE` with endpoints `(address, node)`.
pub fn slice(service: &str, port: u16, protocol: &str, endpoints: &[(&str, &str)]) -> Vec<u8> {
    let family = if endpoints.iter().any(|(address, _)| address.contains(':')) { "IPv6" } else { "IPv4" };
    let endpoints: Vec<Value> =
        endpoints.iter().map(|(address, node)| json!({"addresses": [address], "nodeName": node})).collect();
    json!({
        "metadata": {"name": format!("{service}-1"), "namespace": "default",
            "labels": {"kubernetes.io/service-name": service}},
        "addressType": family,
        "ports": [{"port": port, "protocol": protocol}],
        "endpoints": endpoints,
    })
    .to_string()
    .into_bytes()
}
