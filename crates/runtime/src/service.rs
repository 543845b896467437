//! The two traits that a kubelet works with. Whoever implements them may be in this process or behind a socket.

use std::net::IpAddr;
use std::time::Duration;

use futures::future::BoxFuture;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::broadcast;

use crate::image::ImageError;
use crate::types::{
    ContainerConfig, ContainerStatus, ExecOutput, ImageStatus, PullAuth, RuntimeError, RuntimeEvent, SandboxConfig,
    SandboxStatus,
};

pub type Result<T, E = RuntimeError> = std::result::Result<T, E>;

pub type Reader = Box<dyn AsyncRead + Send + Unpin>;
pub type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// A process started in a container, or a container's own streams.
pub struct Session {
    /// Dropping it closes the process's stdin.
    pub stdin: Option<Writer>,
    /// With a terminal, both outputs come here.
    pub stdout: Option<Reader>,
    pub stderr: Option<Reader>,
    pub terminal: Option<Box<dyn Terminal>>,
    /// Resolves when the process has ended; for `attach`, when the container has.
    pub exit: BoxFuture<'static, Result<i32>>,
}

pub trait Terminal: Send + Sync {
    fn resize(&self, columns: u16, rows: u16) -> std::io::Result<()>;
}

#[derive(Debug, Clone, Default)]
pub struct ExecRequest {
    pub command: Vec<String>,
    pub stdin: bool,
    pub tty: bool,
}

/// Sandboxes and containers. All removals are idempotent.
pub trait RuntimeService: Send + Sync {
    fn version(&self) -> String;

    fn run_pod_sandbox(&self, config: SandboxConfig) -> BoxFuture<'_, Result<SandboxStatus>>;
    /// Kills what runs in it and gives back its network. The sandbox stays listed as not ready.
    fn stop_pod_sandbox<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>>;
    /// Stops it and forgets it and its containers. Log files stay.
    fn remove_pod_sandbox<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>>;
    fn list_pod_sandboxes(&self) -> BoxFuture<'_, Result<Vec<SandboxStatus>>>;

    fn create_container<'a>(&'a self, sandbox: &'a str, config: ContainerConfig) -> BoxFuture<'a, Result<String>>;
    fn start_container<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>>;
    /// Sends the image's stop signal, and SIGKILL after `grace`. Returns when the container has ended.
    fn stop_container<'a>(&'a self, id: &'a str, grace: Duration) -> BoxFuture<'a, Result<()>>;
    fn remove_container<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<()>>;
    fn list_containers(&self) -> BoxFuture<'_, Result<Vec<ContainerStatus>>>;
    fn container_status<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<ContainerStatus>>;

    fn exec_sync<'a>(
        &'a self,
        id: &'a str,
        command: Vec<String>,
        timeout: Duration,
    ) -> BoxFuture<'a, Result<ExecOutput>>;
    fn exec<'a>(&'a self, id: &'a str, request: ExecRequest) -> BoxFuture<'a, Result<Session>>;
    fn attach<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<Session>>;
    /// Connects inside the pod's network namespace.
    fn dial<'a>(&'a self, sandbox: &'a str, address: IpAddr, port: u16)
    -> BoxFuture<'a, Result<tokio::net::TcpStream>>;

    /// Bytes of memory and nanoseconds of processor time used by a container so far.
    fn container_usage<'a>(&'a self, id: &'a str) -> BoxFuture<'a, Result<(Option<u64>, Option<u64>)>>;

    fn events(&self) -> broadcast::Receiver<RuntimeEvent>;
}

/// Images on this node.
pub trait ImageService: Send + Sync {
    /// `None` when no such image is here.
    fn image_status<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, Result<Option<ImageStatus>, ImageError>>;
    fn list_images(&self) -> BoxFuture<'_, Result<Vec<ImageStatus>, ImageError>>;
    /// Returns the image's id.
    fn pull_image<'a>(
        &'a self,
        reference: &'a str,
        auth: Option<PullAuth>,
    ) -> BoxFuture<'a, Result<String, ImageError>>;
    fn remove_image<'a>(&'a self, reference: &'a str) -> BoxFuture<'a, Result<(), ImageError>>;
}
