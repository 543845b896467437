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
