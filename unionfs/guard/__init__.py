"""Supervisor, worker and journal: the mount outlives its server process."""
