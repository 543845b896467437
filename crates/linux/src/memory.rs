//! What this process keeps of memory that it does not use.

/// Gives free memory back to the kernel: after a burst of work the allocator keeps what it took, for a next one that may
/// never come. Takes milliseconds for each hundred megabytes. Only glibc's allocator knows how (malloc_trim(3)).
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim only looks at the allocator's own state, under its locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Keeps large allocations apart from small ones for as long as the process lives, so that what is freed of them goes back
/// to the kernel. Left to itself, glibc's allocator raises the limit with each large one that is freed, puts later ones
/// between the small ones, and the holes stay (mallopt(3), M_MMAP_THRESHOLD). To be called before the first large one.
pub fn keep_large_apart() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt sets a parameter of the allocator, under its locks.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, LARGE);
    }
}

/// In bytes: where the limit begins by default.
#[cfg(target_env = "gnu")]
const LARGE: libc::c_int = 128 << 10;
