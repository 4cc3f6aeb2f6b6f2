"""POSIX and union semantics. Synchronous, thread-safe, testable without FUSE."""
