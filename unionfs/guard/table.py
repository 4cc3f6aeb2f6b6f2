"""The node table of a worker that can be replaced: every change of it is in the journal when the kernel hears of it.

A name that is about to go is written down before it goes: the record then has the file's descriptor (the descriptor
table is the supervisor's too, so it outlives the worker), or another name, or, for a file of a layer that is not ours
to hold, its directory's descriptor. See docs/recovery.md.

Threads as in the core; `changed` and `leaving` take a lock of their own.
"""

from __future__ import annotations

import errno
import os
import threading
from array import array

from unionfs.core.layers import Fd
from unionfs.core.nodes import Dir, Node, NodeTable
from unionfs.guard import journal as j

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from unionfs.guard.journal import Journal
    from unionfs.guard.revive import Revival


class JournalTable(NodeTable):
    def __init__(self, root: Dir, journal: Journal, lanes: Any) -> None:
        """`lanes`: the core's; `lanes.journal` is the lane of the journal that the thread answers by."""
        super().__init__(root)
        self._journal = journal
        self.lanes = lanes
        self._states = journal.states
        self.counts = journal.counts
        self._lock = threading.RLock()
        self._kept: dict[int, Fd] = {}  # lower files without a name: the directory that has them
        self.revival: Revival | None = None  # where there was a predecessor
        journal.write(1, 0, root.ino, 0, -1, 0o040000, 0, b"")

    def add(self, node: Node) -> None:
        if self.free:
            slot = self.free.pop()
            self.slots[slot] = node
            self.generations[slot] += 1
        else:
            with self._growing:
                slot = len(self.slots)
                if slot >= j.MAX_NODES:
                    raise OSError(errno.ENFILE, os.strerror(errno.ENFILE))
                self.slots.append(node)
                self.generations.append(0)
                self._journal.words[j.NEXT] = slot + 1
        node.id = slot
        self.count += 1
        parent, more = node.parent, node.more
        self._journal.write(
            slot, parent.id if parent is not None else 0, node.ino, self.generations[slot],
            -1 if more is None or more.pin is None else more.pin.n, node.kind, node.ldir.layer.index, node.name,
        )  # fmt: skip
        self._states[slot] = j.LIVE if more is None else self._state(node)

    def released(self, nodeid: int) -> None:
        self._states[nodeid] = 0
        if self._journal.opens(nodeid)[0]:
            self._journal.set_opens(nodeid, 0, 0)
        self._kept.pop(nodeid, None)

    @staticmethod
    def _state(node: Node) -> int:
        more = node.more
        state = j.LIVE
        if isinstance(node, Dir):
            return state | j.REMOVED if node.removed else state
        if more is not None:
            if more.unlinked:
                state |= j.UNLINKED
            if more.orphan:
                state |= j.ORPHAN
            if more.key is not None:
                state |= j.LINKED
        return state

    def changed(self, node: Node) -> None:
        if not node.id:
            return
        more = node.more
        kept = self._kept.get(node.id)
        if more is not None and more.unlinked and more.pin is not None and kept is None:
            self._journal.set_pin(node.id, more.pin.n)
            self._states[node.id] = self._state(node)
            return
        with self._lock:
            over = kept is not None and more is not None and (more.pin is not None or not more.unlinked)
            parent = node.parent
            self._rewrite(node, parent.id if parent is not None else 0, node.name, None if over else kept)
            if over:
                del self._kept[node.id]  # copied up, or it has a name again

    def leaving(self, node: Node, parent: Dir, name: bytes) -> None:
        if not node.id:
            return
        more = node.more
        if more is not None and more.pin is not None:
            self._journal.set_pin(node.id, more.pin.n)
            return
        with self._lock:
            if more is not None and more.aliases:
                others = [alias for alias in [*more.aliases, (node.parent, node.name)] if alias != (parent, name)]
                own_goes = node.parent is parent and node.name == name
                other, its_name = others[-1] if own_goes else (node.parent, node.name)
                assert other is not None
                self._rewrite(node, other.id, its_name, None)
                return
            if self.counts[node.id] <= 0:
                return
            # a lower file: nothing of it goes but its name in the union
            kept = self._kept[node.id] = Fd(os.dup(node.ldir.open().n))
            own = node.parent
            self._rewrite(node, own.id if own is not None else 0, node.name, kept)

    def correcting(self, node: Node, before: int, after: int) -> None:
        lane = getattr(self.lanes, "journal", None)
        if lane is not None:
            lane.correcting(node.id, before, after)

    def _rewrite(self, node: Node, parent: int, name: bytes, kept: Fd | None) -> None:
        more = node.more
        pin = -1 if more is None or more.pin is None else more.pin.n
        state = self._state(node)
        if kept is not None and pin < 0:
            pin = kept.n
            state |= j.LOWER
        self._journal.rewrite(
            node.id, state, parent, node.ino, self.generations[node.id], pin, node.kind, node.ldir.layer.index, name
        )

    # --- after a predecessor ---

    def revive(self, nodeid: int) -> Node:
        if self.revival is None:
            return super().revive(nodeid)
        return self.revival.node(nodeid)

    def forgotten(self, nodeid: int, nlookup: int) -> None:
        if self.revival is not None:
            self.revival.forget(nodeid, nlookup)

    def place(self, node: Node, nodeid: int) -> None:
        """A revived node under the id that the kernel has."""
        node.id = nodeid
        self.slots[nodeid] = node
        self.count += 1

    def keep(self, nodeid: int, fd: Fd) -> None:
        self._kept[nodeid] = fd

    def reserve(self) -> None:
        """Make place for all ids that the predecessor gave out; those that are not in use are free."""
        journal = self._journal
        size = journal.words[j.NEXT]
        states = bytes(journal.states[:size])
        self.slots += [None] * (size - len(self.slots))
        self.generations = array("I", journal.generations(size))
        self.free = [nodeid for nodeid in range(2, size) if not states[nodeid]]
