"""The FUSE kernel protocol as bytes: no I/O, no threads, no layers."""
