"""`UnionOperations`: the whole core behind the `Operations` seam. The topics are in the modules that it is made of."""

from __future__ import annotations

from unionfs.core.inspect import Inspect


class UnionOperations(Inspect):
    """One union: construct it with a driver, hand it to a session."""
