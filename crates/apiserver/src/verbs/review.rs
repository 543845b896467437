//! Reviews: questions to the API server that are answered and not stored.

use super::Call;
use crate::auth::rbac::Attributes;
use crate::auth::token::TokenKey;
use crate::auth::{Identity, authenticate};
use crate::body;
use crate::decode::{self, FieldValidation};
use api::{ObjectExt, Status};
use http::{Response, StatusCode};
use serde_json::{Value, json};

pub async fn review(call: &Call, key: &TokenKey) -> Result<Response<body::Body>, Status> {
    let (mut object, repeated) = decode::object_with_repeats(&call.headers, &call.body)?;
    let validation = FieldValidation::parse(call.info.query.get("fieldValidation"))?;
    decode::conform(&call.row, &mut object, &repeated, validation)?;
    let status = match &*call.row.kind {
        "SelfSubjectReview" => json!({"userInfo": user_info(&call.who)}),
        "TokenReview" => {
            let named = object.pointer("/spec/audiences").and_then(Value::as_array).filter(|a| !a.is_empty());
            let audiences: Vec<&str> = match named {
                Some(list) => list.iter().filter_map(Value::as_str).collect(),
                None => vec![&key.issuer],
            };
            match authenticate::from_token(&call.registry, key, object.text("/spec/token"), &audiences) {
                Some((identity, good_for)) => {
                    json!({"authenticated": true, "user": user_info(&identity), "audiences": good_for})
                }
                None => json!({"authenticated": false, "user": {}, "error": "invalid bearer token"}),
            }
        }
        "SelfSubjectRulesReview" => rules(call, object.text("/spec/namespace")),
        kind => {
            let who = if kind == "SelfSubjectAccessReview" { call.who.clone() } else { named(&object) };
            let asked = attributes(&object);
            let allowed = call.registry.rbac.allows(&call.registry, &who, &asked);
            json!({"allowed": allowed, "reason": if allowed { "RBAC: allowed" } else { "" }})
        }
    };
    object["status"] = status;
    if let Some(spec) = object.get_mut("spec").and_then(Value::as_object_mut) {
        spec.remove("token");
    }
    Ok(body::value(StatusCode::CREATED, &object))
}

fn user_info(who: &Identity) -> Value {
    let mut info = json!({"username": who.user, "groups": who.groups});
    if !who.uid.is_empty() {
        info["uid"] = json!(who.uid);
    }
    if !who.extra.is_empty() {
        let extra: serde_json::Map<_, _> = who.extra.iter().map(|(k, v)| (k.clone(), json!([v]))).collect();
        info["extra"] = Value::Object(extra);
    }
    info
}

fn named(object: &Value) -> Identity {
    let groups = object.pointer("/spec/groups").and_then(Value::as_array);
    Identity {
        user: object.text("/spec/user").into(),
        groups: groups.map(|g| g.iter().filter_map(Value::as_str).map(str::to_string).collect()).unwrap_or_default(),
        ..Identity::default()
    }
}

fn attributes(object: &Value) -> Attributes {
    if let Some(path) = object.pointer("/spec/nonResourceAttributes") {
        return Attributes {
            verb: path.text("/verb").into(),
            path: Some(path.text("/path").into()),
            ..Attributes::default()
        };
    }
    let text = |field: &str| object.text(&format!("/spec/resourceAttributes/{field}")).to_string();
    Attributes {
        verb: text("verb"),
        group: text("group"),
        plural: text("resource"),
        subresource: text("subresource"),
        namespace: text("namespace"),
        name: text("name"),
        path: None,
    }
}

fn rules(call: &Call, namespace: &str) -> Value {
    let mut resources = Vec::new();
    let mut paths = Vec::new();
    let mut all = call.registry.rbac.rules(&call.registry, &call.who, namespace);
    if call.who.is_master() {
        let any = || vec!["*".to_string()];
        all.push(crate::auth::rbac::Rule { verbs: any(), groups: any(), resources: any(), ..Default::default() });
        all.push(crate::auth::rbac::Rule { verbs: any(), paths: any(), ..Default::default() });
    }
    for rule in all {
        if !rule.paths.is_empty() {
            paths.push(json!({"verbs": rule.verbs, "nonResourceURLs": rule.paths}));
        }
        if !rule.resources.is_empty() {
            let mut shown = json!({"verbs": rule.verbs, "apiGroups": rule.groups, "resources": rule.resources});
            if !rule.names.is_empty() {
                shown["resourceNames"] = json!(rule.names);
            }
            resources.push(shown);
        }
    }
    json!({"resourceRules": resources, "nonResourceRules": paths, "incomplete": false})
}
