"""The layer store: see api."""

from __future__ import annotations

from collections.abc import Mapping

from unionfs.store.api import Store, Unsupported


def open_layer_store(root: str, driver: str, options: Mapping[str, str]) -> Store:
    raise Unsupported(f"driver {driver}: no store yet")
