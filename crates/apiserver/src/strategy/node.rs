//! Nodes: addresses of pods are given here, so that two nodes never share a pod CIDR.

use super::Strategy;
use api::{Cause, ObjectExt};
use serde_json::Value;

pub struct Node;
pub static NODE: Node = Node;

impl Strategy for Node {
    fn validate(&self, object: &Value, old: Option<&Value>) -> Vec<Cause> {
        let mut causes = Vec::new();
        if let Some(old) = old {
            for field in ["podCIDR", "podCIDRs", "providerID"] {
                let pointer = format!("/spec/{field}");
                if let (Some(before), after) = (old.pointer(&pointer), object.pointer(&pointer))
                    && Some(before) != after
                {
                    causes.push(Cause::forbidden(
                        format!("spec.{field}"),
                        "node updates may only change labels, taints, or capacity (or configSource, if the DynamicKubeletConfig feature gate is enabled)",
                    ));
                }
            }
        }
        for (i, taint) in object.pointer("/spec/taints").and_then(Value::as_array).into_iter().flatten().enumerate() {
            let effect = taint.text("/effect");
            if !matches!(effect, "NoSchedule" | "PreferNoSchedule" | "NoExecute") {
                causes.push(Cause::unsupported(
                    format!("spec.taints[{i}].effect"),
                    effect,
                    &["NoSchedule", "PreferNoSchedule", "NoExecute"],
                ));
            }
        }
        causes
    }
}
