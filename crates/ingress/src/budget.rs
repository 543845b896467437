//! How much may be asked a second time: a share of what is asked at all, so that endpoints that fail are not asked still more.

use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

/// In thousandths of a repetition.
const ONE: i64 = 1000;
/// What is saved up at most, and there at the start.
const SAVED: i64 = 100 * ONE;
/// Earned in each millisecond, however little is asked: ten repetitions a second.
const FLOOR: i64 = 10;

/// What is left for repetitions of a route's requests.
#[derive(Debug)]
pub struct Budget {
    left: AtomicI64,
    /// The millisecond up to which time has earned.
    at: AtomicU64,
    pub refused: AtomicU64,
}

impl Default for Budget {
    fn default() -> Self {
        Budget { left: AtomicI64::new(SAVED), at: AtomicU64::new(0), refused: AtomicU64::new(0) }
    }
}

impl Budget {
    /// A request earns this many hundredths of a repetition.
    pub fn earn(&self, percent: u8) {
        // Read first: written to, the line would go from processor to processor with each request.
        if self.left.load(Ordering::Relaxed) < SAVED {
            self.left.fetch_add(i64::from(percent) * ONE / 100, Ordering::Relaxed);
        }
    }

    /// Whether there is one more. `now` is in milliseconds.
    pub fn take(&self, now: u64) -> bool {
        let before = self.at.fetch_max(now, Ordering::Relaxed);
        let time = i64::try_from(now.saturating_sub(before)).unwrap_or(i64::MAX);
        let left = self.left.load(Ordering::Relaxed);
        let earned = time.saturating_mul(FLOOR).min((SAVED - left).max(0));
        if earned > 0 {
            self.left.fetch_add(earned, Ordering::Relaxed);
        }
        if self.left.fetch_sub(ONE, Ordering::Relaxed) >= ONE {
            return true;
        }
        self.left.fetch_add(ONE, Ordering::Relaxed);
        self.refused.fetch_add(1, Ordering::Relaxed);
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetitions_are_a_share_of_what_is_asked_and_a_few_a_second() {
        let budget = Budget::default();
        let taken = |budget: &Budget, now: u64| (0..1000).take_while(|_| budget.take(now)).count();
        assert_eq!(taken(&budget, 5), 100, "what is there at the start");
        assert_eq!(budget.refused.load(Ordering::Relaxed), 1);
        assert_eq!(taken(&budget, 1005), 10, "a second's");
        (0..100).for_each(|_| budget.earn(20));
        assert_eq!(taken(&budget, 1005), 20, "a fifth of what was asked");
        (0..100).for_each(|_| budget.earn(0));
        assert_eq!(taken(&budget, 1005), 0);
        assert_eq!(taken(&budget, 1_000_000), 100, "no more than that is saved up");
        assert_eq!(taken(&budget, 0), 0, "a clock that is behind earns nothing");
    }
}
