//! A connection that has changed to another protocol, such as WebSocket: bytes in both directions until one side ends.

use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::copy_bidirectional;
use tokio_util::sync::CancellationToken;

use super::balance::Active;

/// Joins both sides. It is there until one of them ends, or the proxy does.
pub async fn tunnel(client: OnUpgrade, endpoint: OnUpgrade, active: Active, token: CancellationToken) {
    let _active = active;
    let joined = async {
        // Either side may have gone before the change was complete; then there is nobody to tell.
        let (Ok(client), Ok(endpoint)) = (client.await, endpoint.await) else { return };
        copy_bidirectional(&mut TokioIo::new(client), &mut TokioIo::new(endpoint)).await.ok();
    };
    tokio::select! {
        () = joined => {}
        () = token.cancelled() => {}
    }
}
