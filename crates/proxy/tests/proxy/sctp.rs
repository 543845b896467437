//! SCTP over sockets that look like TCP's, where the kernel has them.
//!
//! Both ends are bound to one address: otherwise they tell each other all they have, which no translator rewrites
//! (RFC 4960 section 5.1.2), and probe them at once.

use std::io::{Read, Result, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::time::Duration;

use socket2::{Domain, Protocol, Socket, Type};

pub const PROTOCOL: u8 = 132;

fn socket(address: SocketAddr) -> Result<Socket> {
    Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::from(i32::from(PROTOCOL))))
}

pub fn is_known() -> bool {
    socket(SocketAddr::from(([127, 0, 0, 1], 0))).is_ok()
}

/// Answers each association in the caller's namespace with what `answer` makes of the client's address as it is seen here.
pub fn serve(at: SocketAddr, answer: impl Fn(IpAddr) -> String + Send + 'static) {
    let socket = socket(at).expect("this kernel has SCTP");
    socket.bind(&at.into()).expect("bind");
    socket.listen(16).expect("listen");
    let listener = TcpListener::from(socket);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            if let Ok(peer) = stream.peer_addr() {
                drop(stream.write_all(answer(peer.ip().to_canonical()).as_bytes()));
            }
        }
    });
}

/// What an association from the caller's namespace is answered.
pub fn ask(from: IpAddr, to: SocketAddr, patience: Duration) -> Result<String> {
    let socket = socket(to)?;
    socket.bind(&SocketAddr::new(from, 0).into())?;
    socket.connect_timeout(&to.into(), patience)?;
    socket.set_nonblocking(false)?;
    let mut stream = TcpStream::from(socket);
    // Data that overtakes the end of the handshake, on another CPU, is thrown away and repeated after three seconds.
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text)
}
