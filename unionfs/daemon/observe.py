"""Figures for Prometheus, and a store that counts, times and announces what is done with it.

REST, Docker's plugin and the snapshotter share one `observed` store, so `/events` and `/metrics` tell of all three.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, cast

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import generate_latest

from unionfs import __version__
from unionfs.daemon.events import Events
from unionfs.store.api import Store, StoreError

# Method of a store -> the event that its success is; "" for none.
ANNOUNCED = {
    "create": "create",
    "commit": "commit",
    "remove": "remove",
    "get": "mount",
    "put": "unmount",
    "release": "unmount",
    "apply": "apply",
    "set_labels": "label",
    "cleanup": "",
    "fsck": "",
    "changes": "",
    "usage": "",
}


class Metrics:
    """One registry; `render` takes what the gauges show from the store at that moment."""

    def __init__(self, driver: str) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # they double the lines and tell little
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        Gauge(
            "unionfs_build_info", "Version and driver, always 1", ["version", "driver"], registry=self.registry
        ).labels(__version__, driver).set(1)
        self.requests = Counter(
            "unionfs_http_requests", "Requests answered over REST", ["method", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "unionfs_store_seconds",
            "Time that calls of the layer store took",
            ["operation"],
            registry=self.registry,
            buckets=(0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
        )
        self.failures = Counter(
            "unionfs_store_failures",
            "Calls that the layer store refused",
            ["operation", "status"],
            registry=self.registry,
        )
        self._layers = Gauge("unionfs_layers", "Layers kept", ["kind"], registry=self.registry)
        self._mounts = Gauge("unionfs_mounts", "Layers mounted", registry=self.registry)
        self._references = Gauge("unionfs_mount_references", "Users of those mounts", registry=self.registry)

    def render(self, store: Store) -> bytes:
        kinds = {"committed": 0, "active": 0, "view": 0}
        for layer in store.layers():
            kinds[layer.kind] += 1
        for kind, count in kinds.items():
            self._layers.labels(kind).set(count)
        mounted = store.mounted()
        self._mounts.set(len(mounted))
        self._references.set(sum(references for _, references in mounted.values()))
        return generate_latest(self.registry)


class _Observed:
    def __init__(self, store: Store, events: Events, metrics: Metrics) -> None:
        self._store = store
        self._events = events
        self._metrics = metrics

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._store, name)
        return self._watch(name, member) if name in ANNOUNCED else member

    def _watch(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                result = method(*args, **options)
            except Exception as error:
                status = error.status if isinstance(error, StoreError) else 500
                self._metrics.failures.labels(name, str(status)).inc()
                raise
            self._metrics.seconds.labels(name).observe(time.perf_counter() - start)
            if ANNOUNCED[name]:
                attributes = {"as": str(args[1])} if name == "commit" else {}
                self._events.add(ANNOUNCED[name], str(args[0]), **attributes)
            return result

        return call


def observed(store: Store, events: Events, metrics: Metrics) -> Store:
    """The same store, watched. Ids are passed by position, as all callers here do."""
    return cast(Store, _Observed(store, events, metrics))
