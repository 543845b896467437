//! One value that many read and one replaces as a whole.

use std::sync::{Arc, PoisonError, RwLock};

/// Readers keep what they have loaded for as long as they need it; whoever loads later gets the newer value.
#[derive(Debug, Default)]
pub struct Swap<T>(RwLock<Arc<T>>);

impl<T> From<Arc<T>> for Swap<T> {
    fn from(value: Arc<T>) -> Self {
        Swap(RwLock::new(value))
    }
}

impl<T> Swap<T> {
    pub fn new(value: T) -> Self {
        Swap(RwLock::new(Arc::new(value)))
    }

    /// The lock is held for as long as it takes to count one more reader.
    pub fn load(&self) -> Arc<T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn store(&self, value: Arc<T>) {
        let old = std::mem::replace(&mut *self.0.write().unwrap_or_else(PoisonError::into_inner), value);
        // A large value is taken apart after readers can go on.
        drop(old);
    }
}
