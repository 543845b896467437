//! Workloads: Deployments, ReplicaSets, StatefulSets, DaemonSets, Jobs, CronJobs. They share the pod template.

use super::pod::{default_pod_spec, validate_pod_spec};
use super::{Strategy, compact, set_default};
use crate::auth::Identity;
use crate::registry::Registry;
use api::selector::LabelSelectorSpec;
use api::{Cause, LabelSelector, ObjectExt, Status};
use serde_json::{Value, json};

pub struct Workload {
    kind: Kind,
}

#[derive(PartialEq, Eq, Clone, Copy)]
enum Kind {
    Deployment,
    ReplicaSet,
    StatefulSet,
    DaemonSet,
    Job,
    CronJob,
}

pub static DEPLOYMENT: Workload = Workload { kind: Kind::Deployment };
pub static REPLICA_SET: Workload = Workload { kind: Kind::ReplicaSet };
pub static STATEFUL_SET: Workload = Workload { kind: Kind::StatefulSet };
pub static DAEMON_SET: Workload = Workload { kind: Kind::DaemonSet };
pub static JOB: Workload = Workload { kind: Kind::Job };
pub static CRON_JOB: Workload = Workload { kind: Kind::CronJob };

impl Strategy for Workload {
    fn has_generation(&self) -> bool {
        true
    }

    fn default(&self, object: &mut Value) {
        if self.kind == Kind::CronJob {
            let Some(spec) = object.get_mut("spec") else { return };
            set_default(spec, "concurrencyPolicy", json!("Allow"));
            set_default(spec, "suspend", json!(false));
            set_default(spec, "successfulJobsHistoryLimit", json!(3));
            set_default(spec, "failedJobsHistoryLimit", json!(1));
            if let Some(template) = spec.pointer_mut("/jobTemplate/spec/template/spec") {
                default_pod_spec(template);
            }
            return;
        }
        // In apps/v1 the labels of an object without labels are its template's.
        let Some(spec) = object.get_mut("spec") else { return };
        if !matches!(self.kind, Kind::DaemonSet | Kind::Job) {
            set_default(spec, "replicas", json!(1));
        }
        match self.kind {
            Kind::Deployment => {
                set_default(spec, "strategy", json!({}));
                let strategy = &mut spec["strategy"];
                set_default(strategy, "type", json!("RollingUpdate"));
                if strategy.text("/type") == "RollingUpdate" {
                    set_default(strategy, "rollingUpdate", json!({}));
                    set_default(&mut strategy["rollingUpdate"], "maxUnavailable", json!("25%"));
                    set_default(&mut strategy["rollingUpdate"], "maxSurge", json!("25%"));
                }
                set_default(spec, "revisionHistoryLimit", json!(10));
                set_default(spec, "progressDeadlineSeconds", json!(600));
            }
            Kind::StatefulSet => {
                set_default(spec, "podManagementPolicy", json!("OrderedReady"));
                set_default(spec, "updateStrategy", json!({}));
                set_default(&mut spec["updateStrategy"], "type", json!("RollingUpdate"));
                if spec.text("/updateStrategy/type") == "RollingUpdate" {
                    set_default(&mut spec["updateStrategy"], "rollingUpdate", json!({}));
                    set_default(&mut spec["updateStrategy"]["rollingUpdate"], "partition", json!(0));
                }
                set_default(spec, "revisionHistoryLimit", json!(10));
            }
            Kind::DaemonSet => {
                set_default(spec, "updateStrategy", json!({}));
                set_default(&mut spec["updateStrategy"], "type", json!("RollingUpdate"));
                if spec.text("/updateStrategy/type") == "RollingUpdate" {
                    set_default(&mut spec["updateStrategy"], "rollingUpdate", json!({}));
                    set_default(&mut spec["updateStrategy"]["rollingUpdate"], "maxUnavailable", json!(1));
                    set_default(&mut spec["updateStrategy"]["rollingUpdate"], "maxSurge", json!(0));
                }
                set_default(spec, "revisionHistoryLimit", json!(10));
            }
            Kind::Job => {
                set_default(spec, "completionMode", json!("NonIndexed"));
                set_default(spec, "suspend", json!(false));
                set_default(spec, "backoffLimit", json!(6));
                if spec.get("completions").is_none() && spec.get("parallelism").is_none() {
                    set_default(spec, "completions", json!(1));
                }
                set_default(spec, "parallelism", json!(1));
                set_default(spec, "podReplacementPolicy", json!("TerminatingOrFailed"));
            }
            Kind::ReplicaSet | Kind::CronJob => {}
        }
        if let Some(template) = spec.pointer_mut("/template/spec") {
            default_pod_spec(template);
        }
    }

    fn prepare_for_create(&self, _: &Registry, _: &Identity, object: &mut Value) -> Result<(), Status> {
        if self.kind == Kind::Job {
            generate_job_selector(object);
        }
        Ok(())
    }

    fn prepare_for_update(&self, _: &Registry, object: &mut Value, old: &Value) {
        if self.kind == Kind::Job
            && let (Some(spec), Some(selector)) =
                (object.get_mut("spec").and_then(Value::as_object_mut), old.pointer("/spec/selector"))
        {
            spec.entry("selector").or_insert_with(|| selector.clone());
        }
    }

    fn validate(&self, object: &Value, old: Option<&Value>) -> Vec<Cause> {
        let mut causes = Vec::new();
        let template_path = if self.kind == Kind::CronJob { "spec.jobTemplate.spec.template" } else { "spec.template" };
        let template_pointer = format!("/{}", template_path.replace('.', "/"));
        if self.kind == Kind::CronJob && object.text("/spec/schedule").is_empty() {
            causes.push(Cause::required("spec.schedule", ""));
        }
        for field in
            ["replicas", "minReadySeconds", "revisionHistoryLimit", "parallelism", "completions", "backoffLimit"]
        {
            if let Some(number) = object.pointer(&format!("/spec/{field}")).and_then(Value::as_i64).filter(|n| *n < 0) {
                causes.push(Cause::invalid(format!("spec.{field}"), number, "must be greater than or equal to 0"));
            }
        }
        let labels = object.pointer(&format!("{template_pointer}/metadata/labels")).cloned().unwrap_or(json!({}));
        if matches!(self.kind, Kind::Deployment | Kind::ReplicaSet | Kind::StatefulSet | Kind::DaemonSet) {
            match object.pointer("/spec/selector") {
                None => causes.push(Cause::required("spec.selector", "")),
                Some(selector) => {
                    let spec: Result<LabelSelectorSpec, _> = serde_json::from_value(selector.clone());
                    let parsed = spec.ok().and_then(|s| LabelSelector::from_spec(&s).ok());
                    match parsed {
                        None => {
                            causes.push(Cause::invalid("spec.selector", compact(selector), "invalid label selector"))
                        }
                        Some(parsed) if parsed.is_empty() => causes.push(Cause::invalid(
                            "spec.selector",
                            compact(selector),
                            format!("empty selector is invalid for {}", self.kind_word()),
                        )),
                        Some(parsed) => {
                            if !parsed.matches(|key| labels.get(key).and_then(Value::as_str)) {
                                causes.push(Cause::invalid(
                                    "spec.template.metadata.labels",
                                    compact(&labels),
                                    "`selector` does not match template `labels`",
                                ));
                            }
                        }
                    }
                }
            }
        }
        causes.extend(super::meta::labels(&format!("{template_path}.metadata.labels"), Some(&labels)));
        match object.pointer(&format!("{template_pointer}/spec")) {
            Some(spec) => causes.extend(validate_pod_spec(&format!("{template_path}.spec"), spec)),
            None => causes.push(Cause::required(format!("{template_path}.spec.containers"), "")),
        }
        let restart = object.text(&format!("{template_pointer}/spec/restartPolicy"));
        let allowed: &[&str] = match self.kind {
            Kind::Job | Kind::CronJob => &["Never", "OnFailure"],
            _ => &["Always"],
        };
        if !restart.is_empty() && !allowed.contains(&restart) && matches!(restart, "Always" | "OnFailure" | "Never") {
            let path = format!("{template_path}.spec.restartPolicy");
            causes.push(if matches!(self.kind, Kind::Job | Kind::CronJob) {
                Cause::required(path, "valid values: \"OnFailure\", \"Never\"")
            } else {
                Cause::unsupported(path, restart, allowed)
            });
        }
        if self.kind == Kind::Deployment {
            rolling_causes(object, &mut causes);
        }
        if let Some(old) = old {
            let immutable: &[&str] = match self.kind {
                Kind::Job => &["selector", "template", "completionMode"],
                Kind::CronJob => &[],
                Kind::StatefulSet => &["selector", "serviceName", "podManagementPolicy", "volumeClaimTemplates"],
                _ => &["selector"],
            };
            for field in immutable {
                let (before, after) =
                    (old.pointer(&format!("/spec/{field}")), object.pointer(&format!("/spec/{field}")));
                if before != after {
                    let shown = after.map_or("null".into(), compact);
                    causes.push(Cause::invalid(format!("spec.{field}"), shown, "field is immutable"));
                }
            }
        }
        causes
    }
}

impl Workload {
    fn kind_word(&self) -> &'static str {
        match self.kind {
            Kind::Deployment => "deployment",
            Kind::ReplicaSet => "replicaset",
            Kind::StatefulSet => "statefulset",
            Kind::DaemonSet => "daemonset",
            Kind::Job | Kind::CronJob => "job",
        }
    }
}

fn rolling_causes(object: &Value, causes: &mut Vec<Cause>) {
    let kind = object.text("/spec/strategy/type");
    if !matches!(kind, "RollingUpdate" | "Recreate") {
        causes.push(Cause::unsupported("spec.strategy.type", kind, &["Recreate", "RollingUpdate"]));
    }
    if kind == "Recreate" && object.pointer("/spec/strategy/rollingUpdate").is_some() {
        causes.push(Cause::forbidden(
            "spec.strategy.rollingUpdate",
            "may not be specified when strategy `type` is 'Recreate'",
        ));
    }
    let mut zeros = 0;
    for field in ["maxUnavailable", "maxSurge"] {
        let path = format!("spec.strategy.rollingUpdate.{field}");
        match object.pointer(&format!("/spec/strategy/rollingUpdate/{field}")) {
            Some(Value::String(text)) => {
                let number = text.strip_suffix('%').and_then(|n| n.parse::<u32>().ok());
                match number {
                    None => causes.push(Cause::invalid(
                        path,
                        format!("{text:?}"),
                        "a valid percent string must be a numeric string followed by an ending '%' (e.g. '1%',  or '93%', regex used for validation is '[0-9]+%')",
                    )),
                    Some(0) => zeros += 1,
                    Some(n) if n > 100 && field == "maxUnavailable" => {
                        causes.push(Cause::invalid(path, format!("{text:?}"), "must not be greater than 100%"));
                    }
                    Some(_) => {}
                }
            }
            Some(Value::Number(n)) => match n.as_i64() {
                Some(0) => zeros += 1,
                Some(n) if n < 0 => causes.push(Cause::invalid(path, n, "must be greater than or equal to 0")),
                _ => {}
            },
            _ => {}
        }
    }
    if zeros == 2 {
        causes.push(Cause::invalid(
            "spec.strategy.rollingUpdate.maxUnavailable",
            "0",
            "may not be 0 when `maxSurge` is 0",
        ));
    }
}

/// A Job selects its pods by its own uid unless the client manages the selector.
fn generate_job_selector(object: &mut Value) {
    if object.pointer("/spec/manualSelector") == Some(&json!(true)) {
        return;
    }
    let (uid, name) = (object.uid().to_string(), object.name().to_string());
    let Some(spec) = object.get_mut("spec") else { return };
    spec["selector"] = json!({"matchLabels": {"batch.kubernetes.io/controller-uid": uid}});
    set_default(spec, "template", json!({}));
    let metadata = spec["template"].metadata_mut();
    let labels = metadata.entry("labels").or_insert_with(|| json!({}));
    for (key, value) in [
        ("batch.kubernetes.io/controller-uid", &uid),
        ("controller-uid", &uid),
        ("batch.kubernetes.io/job-name", &name),
        ("job-name", &name),
    ] {
        labels[key] = json!(value);
    }
}
