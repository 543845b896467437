//! The way to registries and upstream name servers: from where the cluster was started, not from a node's namespace.

use dns::SocketMaker;
use futures::future::BoxFuture;
use linux::netns::Netns;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

/// Sockets to upstream name servers, made where the cluster was started.
pub struct OuterSockets(pub Netns);

impl SocketMaker for OuterSockets {
    fn udp(&self, server: SocketAddr) -> std::io::Result<std::net::UdpSocket> {
        let any: IpAddr = if server.is_ipv4() { IpAddr::from([0u8; 4]) } else { IpAddr::from([0u8; 16]) };
        self.0.udp_bind(SocketAddr::new(any, 0)).map_err(std::io::Error::other)
    }

    fn tcp(&self, server: SocketAddr) -> std::io::Result<tokio::net::TcpSocket> {
        Ok(tokio::net::TcpSocket::from_std_stream(self.0.tcp_socket(server).map_err(std::io::Error::other)?))
    }
}

/// Connections to registries.
pub fn dialer(outer: Netns) -> runtime::image::Dialer {
    Arc::new(move |host, port| {
        let outer = outer.clone();
        Box::pin(async move {
            // Names are looked up with the host's resolv.conf, in the host's namespace.
            let place = outer.clone();
            let found = tokio::task::spawn_blocking(move || {
                place.run(|| {
                    std::net::ToSocketAddrs::to_socket_addrs(&(host.as_str(), port)).map(Iterator::collect::<Vec<_>>)
                })
            })
            .await
            .map_err(std::io::Error::other)?
            .map_err(std::io::Error::other)??;
            let mut last = std::io::Error::other("the registry's name has no address");
            for address in found {
                match outer.tcp_connect(address).await {
                    Ok(stream) => return Ok(stream),
                    Err(error) => last = std::io::Error::other(error),
                }
            }
            Err(last)
        }) as BoxFuture<'static, _>
    })
}
