//! Numbers for random cases, the same in each run, and how many cases there are.

pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Random {
        Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn below(&mut self, bound: usize) -> usize {
        (self.next() >> 11) as usize % bound.max(1)
    }

    pub fn byte(&mut self) -> u8 {
        (self.next() >> 24) as u8
    }
}

/// FAIRLEAD_CASES, or else so many.
pub fn cases(usual: u64) -> u64 {
    match std::env::var("FAIRLEAD_CASES") {
        Ok(cases) => cases.parse().expect("FAIRLEAD_CASES is a number"),
        Err(_) => usual,
    }
}
