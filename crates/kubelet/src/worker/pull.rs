//! Images for a pod's containers: the policy's decision, the pull in the background, and its back-off.

use std::time::Duration;

use jiff::{SignedDuration, Timestamp};
use reconcile::EventKind;
use runtime::PullAuth;
use runtime::image::Reference;

use super::{Worker, WorkerError};
use crate::plan::ImageState;
use crate::pod::{Container, Pod};

impl Worker {
    /// Decides by imagePullPolicy, and pulls in the background.
    pub(super) async fn pull(&self, pod: &Pod, container: &Container) -> Result<(), WorkerError> {
        let (name, image) = (container.name.clone(), container.image.clone());
        let fail = |reason: &str, message: String| {
            self.event(&name, EventKind::Warning, "Failed", format!("Error: {reason}"));
            let until = Timestamp::now() + SignedDuration::from_secs(60);
            let state = ImageState::Failed { reason: reason.to_owned(), message, until };
            self.memory().images.insert(name.clone(), state);
        };
        let parsed = match Reference::parse(&image) {
            Ok(parsed) => parsed,
            Err(e) => {
                self.event(&name, EventKind::Warning, "InspectFailed", e.to_string());
                fail("InvalidImageName", e.to_string());
                return Ok(());
            }
        };
        let present = self.shared.images.image_status(&image).await.map_err(runtime::RuntimeError::from)?.is_some();
        let policy = match container.image_pull_policy.as_str() {
            "" if parsed.is_latest() => "Always",
            "" => "IfNotPresent",
            other => other,
        };
        match (policy, present) {
            ("Never" | "IfNotPresent", true) => {
                let message = format!("Container image {image:?} already present on machine");
                self.event(&name, EventKind::Normal, "Pulled", message);
                self.memory().images.insert(name, ImageState::Present);
                return Ok(());
            }
            ("Never", false) => {
                let message = format!("Container image {image:?} is not present with pull policy of Never");
                self.event(&name, EventKind::Warning, "ErrImageNeverPull", message.clone());
                fail("ErrImageNeverPull", message);
                return Ok(());
            }
            _ => {}
        }
        self.memory().images.insert(name.clone(), ImageState::Pulling);
        self.event(&name, EventKind::Normal, "Pulling", format!("Pulling image {image:?}"));
        let auth = self.pull_auth(pod, &parsed).await;
        let (shared, memory, wake, report) =
            (self.shared.clone(), self.memory.clone(), self.wake.clone(), self.reporter(&name));
        let (token, began) = (self.token.clone(), std::time::Instant::now());
        tokio::spawn(async move {
            let lock = || memory.lock().expect("no holder panics");
            let result = tokio::select! {
                result = shared.images.pull_image(&image, auth) => result,
                () = token.cancelled() => return,
            };
            let error = match result {
                Ok(_) => {
                    let seconds = began.elapsed().as_secs_f64();
                    report(
                        EventKind::Normal,
                        "Pulled",
                        format!("Successfully pulled image {image:?} in {seconds:.3}s"),
                    );
                    let mut memory = lock();
                    memory.images.insert(name.clone(), ImageState::Present);
                    memory.pull_failures.remove(&name);
                    wake.notify_one();
                    return;
                }
                Err(e) => e,
            };
            report(EventKind::Warning, "Failed", format!("Failed to pull image {image:?}: {error}"));
            report(EventKind::Warning, "Failed", "Error: ErrImagePull".to_owned());
            let delay = {
                let mut memory = lock();
                let failures = memory.pull_failures.entry(name.clone()).or_default();
                *failures += 1;
                (10_i64 << (*failures - 1).min(5)).min(300)
            };
            let until = Timestamp::now() + SignedDuration::from_secs(delay);
            let set = |reason: &str, message: String| {
                let state = ImageState::Failed { reason: reason.to_owned(), message, until };
                lock().images.insert(name.clone(), state);
                wake.notify_one();
            };
            set("ErrImagePull", error.to_string());
            // Long enough to be seen, as the kubelet's next sync would be.
            tokio::time::sleep(Duration::from_secs(2)).await;
            report(EventKind::Normal, "BackOff", format!("Back-off pulling image {image:?}"));
            report(EventKind::Warning, "Failed", "Error: ImagePullBackOff".to_owned());
            set("ImagePullBackOff", format!("Back-off pulling image {image:?}: ErrImagePull: {error}"));
        });
        Ok(())
    }

    /// The first of the pod's pull secrets that knows the registry.
    pub(super) async fn pull_auth(&self, pod: &Pod, reference: &Reference) -> Option<PullAuth> {
        for secret in &pod.spec.image_pull_secrets {
            let data = match self.shared.volumes.secret(&pod.metadata.namespace, &secret.name).await {
                Ok(Some(data)) => data,
                Ok(None) => continue,
                Err(e) => {
                    tracing::warn!(secret = secret.name, "cannot read an image pull secret: {e}");
                    continue;
                }
            };
            let Some(auth) = data.get(".dockerconfigjson").and_then(|d| crate::docker::find(d, &reference.registry))
            else {
                continue;
            };
            return Some(auth);
        }
        None
    }
}
