"""Transports: how requests reach the core (direct device reads, or pyfuse3)."""
