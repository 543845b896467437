//! Clients that mean harm: floods over HTTP/2 and HTTP/1.1, and handshakes that never end. Each is cut off early, and others are
//! served meanwhile.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::net::tcp::OwnedReadHalf;
use tokio::task::JoinHandle;
use tokio::time::timeout;

use crate::world::{Backend, PATIENCE, World, ingress};

const MEGABYTE: usize = 1 << 20;
/// What a flood would send if nobody stopped it.
const FLOOD: usize = 100 * MEGABYTE;
/// What may be on the way, in buffers of both kernels, when it is stopped.
const BUFFERS: usize = 24 * MEGABYTE;

async fn served() -> (World, Backend) {
    let backend = Backend::named("hello").await;
    let mut world = World::start(&[&ingress("")], |_| {}).await;
    world.serve("web", &[backend.address]);
    (world, backend)
}

async fn assert_served(world: &World) {
    let seen = world.curl("http://shop.example/").await;
    assert!(seen.ends_with("hello"), "others are served: {seen}");
}

/// RFC 9113 4.1.
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a short frame").to_be_bytes();
    let mut out = length[1..].to_vec();
    out.extend([kind, flags]);
    out.extend(stream.to_be_bytes());
    out.extend(payload);
    out
}

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// GET http://shop.example/ by the static table (RFC 7541).
fn request() -> Vec<u8> {
    let mut block = vec![0x82, 0x86, 0x84, 0x41, 12];
    block.extend(b"shop.example");
    block
}

/// Reads to the end, and says whether the server said goodbye.
fn listen(mut from: OwnedReadHalf) -> JoinHandle<bool> {
    tokio::spawn(async move {
        let mut bytes = Vec::new();
        // What is reset has ended, too.
        from.read_to_end(&mut bytes).await.ok();
        let (mut at, mut goodbye) = (0, false);
        while let Some(head) = bytes.get(at..at + 9) {
            goodbye |= head[3] == GOAWAY;
            at += 9 + usize::from(head[0]) * 65_536 + usize::from(head[1]) * 256 + usize::from(head[2]);
        }
        goodbye
    })
}

async fn http2(world: &World) -> (tokio::net::tcp::OwnedWriteHalf, JoinHandle<bool>) {
    let (read, mut write) = TcpStream::connect(world.http).await.expect("loopback").into_split();
    write.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.expect("sent");
    write.write_all(&frame(SETTINGS, 0, 0, &[])).await.expect("sent");
    (write, listen(read))
}

/// CVE-2023-44487: streams that are opened and taken back at once.
#[tokio::test]
async fn a_flood_of_resets_ends_the_connection() {
    let (world, backend) = served().await;
    let (mut write, listening) = http2(&world).await;
    let flood = async {
        for number in 0..50_000u32 {
            let stream = 2 * number + 1;
            let mut both = frame(HEADERS, END_HEADERS | END_STREAM, stream, &request());
            both.extend(frame(RST_STREAM, 0, stream, &8u32.to_be_bytes()));
            if write.write_all(&both).await.is_err() {
                return Some(number);
            }
        }
        None
    };
    let (cut_at, ()) = timeout(PATIENCE, async { tokio::join!(flood, assert_served(&world)) }).await.expect("in time");
    drop(write);
    let goodbye = timeout(PATIENCE, listening).await.expect("in time").expect("no panic");
    assert!(goodbye || cut_at.is_some(), "the server ends it");
    assert!(backend.count() < 10_000, "{} requests reached the endpoint", backend.count());
    assert_served(&world).await;
    world.end().await;
}

/// CVE-2024-27316 and its like: a head that never ends.
#[tokio::test]
async fn a_flood_of_continuations_ends_the_connection() {
    let (world, backend) = served().await;
    let (mut write, listening) = http2(&world).await;
    write.write_all(&frame(HEADERS, END_STREAM, 1, &request())).await.expect("sent");
    // A header of its own in each, never indexed.
    let mut header = vec![0x10, 1, b'x', 0x7f, 0x81, 0x7e];
    header.extend(vec![b'y'; 16_256]);
    let part = frame(CONTINUATION, 0, 1, &header);
    let mut sent = 0;
    let flood = async {
        while sent < FLOOD && write.write_all(&part).await.is_ok() {
            sent += part.len();
        }
    };
    timeout(PATIENCE, async { tokio::join!(flood, assert_served(&world)) }).await.expect("in time");
    assert!(sent < BUFFERS, "{sent} bytes were taken");
    drop(write);
    timeout(PATIENCE, listening).await.expect("in time").expect("no panic");
    assert!(!backend.seen.lock().expect("unpoisoned").iter().any(|head| head.contains("\"x\"")), "it reached nobody");
    world.end().await;
}

#[tokio::test]
async fn a_hundred_megabytes_of_headers_are_not_read() {
    let (world, backend) = served().await;
    for start in ["GET / HTTP/1.1\r\nHost: shop.example\r\n", "GET / HTTP/1.1\r\nHost: shop.example\r\nX: "] {
        let mut stream = TcpStream::connect(world.http).await.expect("loopback");
        stream.write_all(start.as_bytes()).await.expect("sent");
        let part = if start.ends_with(' ') { vec![b'x'; 65_536] } else { b"X: y\r\n".repeat(10_000) };
        let mut sent = 0;
        let flood = async {
            while sent < FLOOD && stream.write_all(&part).await.is_ok() {
                sent += part.len();
            }
        };
        timeout(PATIENCE, async { tokio::join!(flood, assert_served(&world)) }).await.expect("in time");
        assert!(sent < BUFFERS, "{sent} bytes were taken");
    }
    assert_eq!(backend.count(), 2, "only those of others");
    world.end().await;
}

/// Handshakes that begin and do not go on hold no more than their places, and those only for a while.
#[tokio::test]
async fn handshakes_that_never_end_make_room() {
    let backend = Backend::named("hello").await;
    let mut world = World::start(&[&ingress("")], |config| {
        config.limits.handshake_timeout = Duration::from_millis(700);
        config.limits.connections = 64;
    })
    .await;
    world.serve("web", &[backend.address]);
    // The beginning of a record of 512 bytes with a ClientHello in it.
    let beginning = [22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3];
    let mut held = Vec::new();
    for _ in 0..300 {
        let mut stream = TcpStream::connect(world.https).await.expect("loopback");
        stream.write_all(&beginning).await.expect("sent");
        held.push(stream);
    }
    let seen = timeout(PATIENCE, world.curl("https://shop.example/")).await.expect("in time");
    assert!(seen.ends_with("hello"), "{seen}");
    drop(held);
    world.end().await;
}
