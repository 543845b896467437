//! What a pod asks for must be there; more left over is better.

use super::{Filter, Judge, Rate, Scale, Score};
use crate::objects::Pod;
use crate::snapshot::{Snapshot, weight};

pub struct Fits;

impl Filter for Fits {
    fn judge<'a>(&self, pod: &'a Pod, _: &'a Snapshot) -> Judge<'a> {
        let requests = pod.requests();
        Box::new(move |node| {
            let mut reasons = Vec::new();
            let count = i64::try_from(node.pods.len()).unwrap_or(i64::MAX);
            if count >= node.allocatable("pods") {
                reasons.push("Too many pods".to_string());
            }
            for (name, amount) in &requests {
                let used = node.used.get(name).copied().unwrap_or(0);
                if *amount > 0 && *amount > node.allocatable(name) - used {
                    reasons.push(format!("Insufficient {name}"));
                }
            }
            if reasons.is_empty() { Ok(()) } else { Err(reasons) }
        })
    }
}

/// The share of CPU and memory that is left once the pod is there.
pub struct Roomy;

impl Score for Roomy {
    fn weight(&self) -> i64 {
        1
    }

    fn scale(&self) -> Scale {
        Scale::Points
    }

    fn rate<'a>(&self, pod: &'a Pod, _: &'a Snapshot) -> Rate<'a> {
        let (cpu, memory) = weight(pod);
        Box::new(move |node| {
            let left = |resource: &str, taken: i64| {
                let all = node.allocatable(resource);
                if all <= 0 || taken >= all { 0 } else { (all - taken).saturating_mul(100) / all }
            };
            (left("cpu", node.weight.0 + cpu) + left("memory", node.weight.1 + memory)) / 2
        })
    }
}
