//! A connection that has changed to another protocol, such as WebSocket: bytes in both directions until one side ends.

use bytes::Bytes;
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncWriteExt, copy_bidirectional};
use tokio_util::sync::CancellationToken;

use super::balance::Active;
use super::http1::Stream;

/// Joins both sides. It is there until one of them ends, or the proxy does.
/// With the endpoint's connection comes what it has already said.
pub async fn tunnel(
    client: OnUpgrade,
    (mut endpoint, said): (Stream, Bytes),
    active: Active,
    token: CancellationToken,
) {
    let _active = active;
    let joined = async {
        // The client may have gone before the change was complete; then there is nobody to tell.
        let Ok(client) = client.await else { return };
        let mut client = TokioIo::new(client);
        if client.write_all(&said).await.is_ok() {
            copy_bidirectional(&mut client, &mut endpoint).await.ok();
        }
    };
    tokio::select! {
        () = joined => {}
        () = token.cancelled() => {}
    }
}
