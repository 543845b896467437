//! Words: objects, kinds, selectors, quantities, statuses, and the schema of every built-in kind.
