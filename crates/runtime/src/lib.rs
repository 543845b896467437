//! Sandboxes, containers and images, in CRI's words.
