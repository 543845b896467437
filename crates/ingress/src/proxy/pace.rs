//! A body that is sent no faster than its route allows (`limit-rate`), in parts that are small beside a second's worth.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, Sleep, sleep_until};

use crate::policy::Rate;

/// Parts of a second that are sent at once.
const PARTS: u64 = 10;
const SMALLEST: u64 = 512;

pub struct Pace {
    /// Bytes a second.
    rate: u64,
    /// Bytes that may go at any speed.
    free: u64,
    /// When the next part may go.
    next: Instant,
    sleep: Option<Pin<Box<Sleep>>>,
    /// What came and may not go yet.
    held: Bytes,
}

impl Pace {
    pub fn new(rate: Rate) -> Box<Self> {
        let Rate { bytes, after } = rate;
        Box::new(Pace { rate: bytes.get(), free: after, next: Instant::now(), sleep: None, held: Bytes::new() })
    }

    /// Bytes that have come and have not gone.
    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Takes what has come; all that was held has gone before.
    pub fn put(&mut self, data: Bytes) {
        self.held = data;
    }

    /// The next part, once its time has come; `None`: nothing is held.
    pub fn poll_part(&mut self, cx: &mut Context<'_>) -> Poll<Option<Bytes>> {
        if self.held.is_empty() {
            return Poll::Ready(None);
        }
        let now = Instant::now();
        if now < self.next {
            let next = self.next;
            let sleep = self.sleep.get_or_insert_with(|| Box::pin(sleep_until(next)));
            if sleep.as_mut().poll(cx).is_pending() {
                return Poll::Pending;
            }
        }
        self.sleep = None;
        let part = if self.free > 0 { self.free } else { (self.rate / PARTS).max(SMALLEST) };
        let length = usize::try_from(part).map_or(self.held.len(), |part| part.min(self.held.len()));
        let data = self.held.split_to(length);
        let length = length as u64;
        let paced = length.saturating_sub(self.free);
        self.free = self.free.saturating_sub(length);
        let nanoseconds = u128::from(paced) * 1_000_000_000 / u128::from(self.rate);
        // Who was slower than allowed does not make up for it.
        self.next = self.next.max(now) + Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX));
        Poll::Ready(Some(data))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::num::NonZeroU64;

    use super::*;

    #[tokio::test]
    async fn a_body_takes_as_long_as_it_must_and_stays_whole() {
        let rate = Rate { bytes: NonZeroU64::new(20_000).expect("not 0"), after: 5_000 };
        let mut pace = Pace::new(rate);
        let sent = Bytes::from((0..9_000_u32).map(|n| n as u8).collect::<Vec<u8>>());
        let (mut got, started) = (Vec::new(), Instant::now());
        for chunk in [sent.slice(..3_000), sent.slice(3_000..)] {
            pace.put(chunk);
            while let Some(part) = poll_fn(|cx| pace.poll_part(cx)).await {
                got.extend_from_slice(&part);
            }
        }
        assert_eq!(got, sent);
        // 4,000 bytes at 20,000 a second; the last part goes before its time has passed.
        assert!(started.elapsed() >= Duration::from_millis(100), "{:?}", started.elapsed());
    }
}
