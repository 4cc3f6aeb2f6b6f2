"""Snapshots of a mounted tree: the writable layer is frozen and an empty one put on top, with files open.

`FreezingUnion` is the core for drivers that can do that. Freezing is O(1): the new layer has nothing but a root, so
what is known of every other directory and name stays true, and a file that is written later is copied up, or has its
blocks redirected, from the frozen layer like from any lower one. Putting other layers in place (rollback) looks at
every known node again, as unionfs/core/live.py does for branches.

Threads: called from a control thread, one change at a time, behind the gate.
"""

from __future__ import annotations

import os

from unionfs.api import Operations
from unionfs.core.live import LiveUnion
from unionfs.core.nodes import Dir, Node
from unionfs.core.ops import UnionOperations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from unionfs.core.base import OpenFile
    from unionfs.core.driver import Driver
    from unionfs.core.layers import Layer


class FreezingUnion(LiveUnion):
    def control_verbs(self) -> dict[str, Any]:
        return {**UnionOperations.control_verbs(self), "snapshot": self.snapshot}

    def snapshot(self, action: str, **arguments: Any) -> Any:
        """What `Driver.snapshot` does; one at a time."""
        with self._one_change:
            return self.driver.snapshot(self, action, arguments)

    def diff(self) -> list[tuple[str, bytes]]:
        found = self.driver.diff_frozen()
        return super().diff() if found is None else found

    def flush_kernel(self) -> None:
        """Have the kernel write what it holds back of files that are being written (mapped pages)."""
        if self.notifier is None:
            return
        for nodeid, f in list(self.files.items()):
            if f.writable:
                self.notifier.invalidate_inode(nodeid)

    def freeze(self, top: Layer, commit: Callable[[], None]) -> None:
        """`commit` puts `top`, which is empty, above the driver's layers; it raises, or it has happened."""
        with self.gate:
            commit()
            self.bottom += 1
            self.root.ldirs.insert(0, top.root)
            self.root.ldir = top.root
            self._close_files()

    def switch(self, layers: list[Layer], commit: Callable[[], None]) -> None:
        """Show other layers instead. `commit` makes them the driver's; it raises, or it has happened."""
        with self.gate:
            private = self._close_files()
            lost = self._apply(layers, commit)
            self.files.update(private)
        self._tell_kernel(lost)
        if self.notifier is not None:
            for nodeid in [node.id for node in list(self.slots) if node is not None and not isinstance(node, Dir)]:
                self.notifier.invalidate_inode(nodeid)

    def _same(self, node: Node, ldir: Any, st: os.stat_result, name: bytes) -> bool:
        """A hard link that a later generation has copied shows the copy, though its own inode is there too."""
        if st.st_nlink > 1 and self.driver.index:
            found = self.driver.index_find(ldir, name, st)
            if found is not None:
                return node.more is not None and found == (node.ldir, node.more.index)
        return super()._same(node, ldir, st, name)

    def _close_files(self) -> dict[int, OpenFile]:
        """Data descriptors of what is frozen now are opened again, for reading, at the next use. What has no name is
        in no snapshot and goes on as it is."""
        kept = {}
        for nodeid, f in self.files.items():
            node = self.slots[nodeid]
            if node is not None and self._is_nameless(node):
                kept[nodeid] = f
            else:
                f.writable = False  # who holds it for reading may go on
        self.files.clear()
        self.files.update(kept)
        return kept

    @staticmethod
    def _is_nameless(node: Node) -> bool:
        return node.more is not None and node.more.unlinked and node.more.pin is not None

    def space_changed(self) -> None:
        """Layers were removed: for who counts what they take."""

    def uses(self, layers: set[Layer]) -> bool:
        """Some node that the kernel knows lies in one of these."""
        for node in list(self.slots):
            if node is None:
                continue
            if node.ldir.layer in layers:
                return True
            if node.more is not None and node.more.data is not None and node.more.data[0].layer in layers:
                return True
        return False


def freezing_union(driver: Driver) -> Operations:
    if driver.quota is not None:
        from unionfs.core.quota import LimitedFreezingUnion

        return LimitedFreezingUnion(driver).gate
    return FreezingUnion(driver).gate
