"""Drivers: one on-disk format each. Installed as `unionfs_drivers`, found by entry point `unionfs.drivers`."""
