"""unionfs: a FUSE union filesystem in Python."""

__version__ = "0.1.0"
