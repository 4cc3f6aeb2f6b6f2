"""A store opened for its images and containers, as the verbs and the daemon use it."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from unionfs.store.containers import Containers
from unionfs.store.images import Images
from unionfs.store.layers import LayerStore


class Library:
    """`images` and `containers` of one driver under a data root; holds the store until it is closed."""

    def __init__(self, root: str, driver: str, options: Mapping[str, str]) -> None:
        self.store = LayerStore(root, driver, options)
        self.images = Images(self.store)
        self.containers = Containers(self.store, self.images)

    def __enter__(self) -> Library:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.store.close()
