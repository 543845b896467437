//! What programs tell by themselves: messages in a ring that is shared with the kernel.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::path::Path;

use aya::maps::{Map, MapData, RingBuf};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The reading end of a ring. There is one at a time: who reads takes.
pub struct Ring(RingBuf<MapData>);

impl Ring {
    /// Opens a pinned ring. What was told while nobody read is there, as far as it had room.
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        let data = MapData::from_pin(path).map_err(io::Error::other)?;
        RingBuf::try_from(Map::RingBuf(data)).map(Ring).map_err(io::Error::other)
    }

    /// The ring as something to wait for. To be called inside a tokio runtime.
    pub fn register(self) -> io::Result<AsyncFd<Self>> {
        // SAFETY: the descriptor is owned by the map, which never replaces it and closes it only when it is dropped, after
        // the registration.
        Ok(unsafe { AsyncFd::register_with_interest(self, Interest::READABLE) }?)
    }

    /// Takes all messages there are.
    pub fn drain(&mut self, mut visit: impl FnMut(&[u8])) {
        while let Some(message) = self.0.next() {
            visit(&message);
        }
    }
}

impl AsRawFd for Ring {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}
