//! The way of a component by itself to any Kubernetes API: a kubeconfig or a pod's service account, and its rights.

use std::path::Path;

use anyhow::{Context, bail};
use api::Resource;
use kube::config::{KubeConfigOptions, Kubeconfig};
use reconcile::ApiError;
use serde_json::Value;
use tracing::warn;

/// From the file, or from what a pod is given. `sources` names where a kubeconfig could have been written.
pub async fn config(kubeconfig: Option<&Path>, sources: &str) -> anyhow::Result<kube::Config> {
    let mut config = match kubeconfig {
        Some(path) => {
            let read = Kubeconfig::read_from(path).with_context(|| format!("read {}", path.display()))?;
            kube::Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
                .await
                .with_context(|| path.display().to_string())?
        }
        None => kube::Config::incluster().with_context(|| format!("there is no {sources}, and this is no pod"))?,
    };
    // Watches are silent for as long as nothing happens.
    config.read_timeout = None;
    Ok(config)
}

/// Asks once for each kind that is needed, so that missing rights are named instead of waited for. `role` is what to bind.
pub async fn check_rights(client: &kube::Client, resources: &[&Resource], role: &str) -> anyhow::Result<()> {
    for resource in resources {
        let path = format!("{}?limit=1", resource.path(""));
        match reconcile::api::request::<Value>(client, "GET", &path, "", None).await {
            Ok(_) => {}
            Err(ApiError::Status(status)) if matches!(status.code, 401 | 403) => bail!(
                "{}; bind this identity to the cluster role {role}, and see whom the kubeconfig names",
                status.message
            ),
            // It may come back, and the watches wait for it.
            Err(error) => warn!(%error, "the API server does not answer yet"),
        }
    }
    Ok(())
}
