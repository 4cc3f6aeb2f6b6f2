"""Nodes that a dead worker gave to the kernel, made again when they are first asked for.

A record says where a node was (parent and name); what it is there, the disk says, by the same steps as a lookup. A name
that a directory has in the records keeps its id: `Children` finds it there. Files without a name come back by their
descriptor. Threads: as in the core; making nodes again is under one lock.
"""

from __future__ import annotations

import errno
import os
import threading
from stat import S_IFMT, S_ISDIR

from unionfs.core.layers import Fd, Layer, LDir, fd_path
from unionfs.core.nodes import Dir, Node
from unionfs.guard import journal as j

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from unionfs.core.ops import UnionOperations
    from unionfs.guard.journal import Journal, Record
    from unionfs.guard.table import JournalTable


class Children(dict[bytes, Node]):
    """`Dir.children` of a directory whose predecessor had some that are not made again yet."""

    __slots__ = ("revival", "waiting")

    def __init__(self, waiting: dict[bytes, int], revival: Revival) -> None:
        self.waiting = waiting  # name -> id
        self.revival = revival

    def get(self, name: bytes, default: Any = None) -> Any:
        node = super().get(name)
        if node is None and self.waiting:
            nodeid = self.waiting.get(name)
            if nodeid is not None:
                return self.revival.child(self, name, nodeid)
        return default if node is None else node

    def pop(self, name: bytes, default: Any = None) -> Any:
        self.waiting.pop(name, None)
        return super().pop(name, default)

    def __contains__(self, name: object) -> bool:
        return super().__contains__(name) or name in self.waiting

    def __len__(self) -> int:
        return super().__len__() + len(self.waiting)


class Revival:
    def __init__(self, ops: UnionOperations, table: JournalTable, journal: Journal) -> None:
        self._ops = ops
        self._table = table
        self._journal = journal
        self._lock = threading.RLock()
        self._by_parent = journal.parents()
        self.revived = 0
        ops.root.children = self._children(ops.root)
        self._by_parent.pop(1, None)

    def _children(self, d: Dir) -> dict[bytes, Node]:
        ids = self._by_parent.get(d.id)
        if not ids:
            return {}
        waiting: dict[bytes, int] = {}
        for nodeid in ids:
            record = self._journal.read(nodeid)
            if record is None or record.parent != d.id or record.state & (j.UNLINKED | j.REMOVED | j.ORPHAN):
                continue
            other = waiting.get(record.name)
            if other is not None and record.pin >= 0:
                continue  # its name is another's now
            waiting[record.name] = nodeid
        return Children(waiting, self)

    def find(self, parent: int, name: bytes) -> int | None:
        """The id that the records have for a name."""
        children = self.directory(parent).children
        node = dict.get(children, name)
        if node is not None:
            return node.id
        return children.waiting.get(name) if isinstance(children, Children) else None

    def directory(self, nodeid: int) -> Dir:
        node = self._ops.slots[nodeid] or self.node(nodeid)
        if not isinstance(node, Dir):
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return node

    def child(self, children: Children, name: bytes, nodeid: int) -> Node | None:
        """A name that was waiting: None where it is not on disk any more."""
        try:
            node = self.node(nodeid)
        except OSError:
            node = None
        with self._lock:
            children.waiting.pop(name, None)
        if node is None or self._nameless(node):
            return None
        if node.parent is None or node.parent.children is not children or node.name != name:
            return None  # known by another of its names
        return dict.setdefault(children, name, node)

    def node(self, nodeid: int) -> Node:
        with self._lock:
            if nodeid < len(self._ops.slots):
                made = self._ops.slots[nodeid]
                if made is not None:
                    return made
            record = self._journal.read(nodeid)
            if record is None:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
            node = self._make(record)
            node.ino = record.ino
            self._table.place(node, nodeid)
            if node.more is not None and node.more.key is not None:
                self._table.links.setdefault(node.more.key, node)
            opens, backing = self._journal.opens(nodeid)
            if opens:
                more = node.extra()
                more.opens, more.backed = opens, backing > 0
            if isinstance(node, Dir):
                node.children = self._children(node)
            if node.parent is not None and not self._nameless(node):
                children = node.parent.children
                if isinstance(children, Children):
                    children.waiting.pop(node.name, None)
                dict.setdefault(children, node.name, node)
            self.revived += 1
            return node

    @staticmethod
    def _nameless(node: Node) -> bool:
        return (node.more is not None and node.more.unlinked) or (isinstance(node, Dir) and node.removed)

    def forget(self, nodeid: int, nlookup: int) -> None:
        """A node that was never asked for is forgotten. (One that a known child needs stays a record.)"""
        with self._lock:
            record = self._journal.read(nodeid)
            if record is None or nodeid == 1:
                return
            counts = self._journal.counts
            counts[nodeid] -= nlookup
            if counts[nodeid] > 0 or self._by_parent.get(nodeid):
                return
            parent = self._ops.slots[record.parent] if record.parent else None
            if isinstance(parent, Dir):
                if isinstance(parent.children, Children) and parent.children.waiting.get(record.name) == nodeid:
                    del parent.children.waiting[record.name]
                self._table._reap(parent)
            elif record.parent in self._by_parent:
                self._by_parent[record.parent].remove(nodeid)
            self._journal.states[nodeid] = 0
            counts[nodeid] = 0
            if record.pin >= 0:
                os.close(record.pin)
            self._table.free.append(nodeid)

    def prune(self) -> None:
        """What the kernel does not know, and no other record needs: a request of the dead worker had looked it up."""
        journal = self._journal
        counts = journal.counts[: journal.words[j.NEXT]].tolist()
        for nodeid in (nodeid for nodeid in range(2, len(counts)) if counts[nodeid] <= 0):
            node = self._ops.slots[nodeid]
            if node is not None:
                self._ops._settle(node)
            elif journal.states[nodeid]:
                self.forget(nodeid, 0)

    # --- making a node ---

    def _make(self, record: Record) -> Node:
        if record.state & j.ORPHAN or (record.state & (j.UNLINKED | j.REMOVED) and record.pin >= 0):
            return self._by_descriptor(record)
        p = self.directory(record.parent)
        found = None if p.removed else self._ops._find(p, record.name)
        if found is not None and S_IFMT(found[1].st_mode) == self._kind_on_disk(record):
            node = self.build(p, record.name, *found)
            if record.pin < 0:
                return node
            if self._same(record, node, found[0]):
                self._journal.set_pin(record.id, -1)
                os.close(record.pin)
                return node
        if record.pin >= 0:
            return self._by_descriptor(record)
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    def _kind_on_disk(self, record: Record) -> int:
        if record.kind != 0o020000:
            return record.kind
        p = self.directory(record.parent)
        found = self._ops._find(p, record.name)  # a nested whiteout is a file that users see as a device
        return S_IFMT(found[1].st_mode) if found is not None else record.kind

    def _same(self, record: Record, node: Node, ldir: LDir) -> bool:
        held = os.fstat(record.pin)
        there = os.fstat(ldir.open().n) if record.state & j.LOWER else self._ops._stat(node)
        return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)

    def build(self, p: Dir, name: bytes, ldir: LDir, st: os.stat_result) -> Node:
        """What a lookup of that name finds, in no table yet."""
        ops = self._ops
        if S_ISDIR(st.st_mode):
            return ops._new_dir(p, name, ldir, st)
        entry = ops.driver.index_find(ldir, name, st) if st.st_nlink > 1 and ops.driver.index else None
        if entry is not None and not ldir.layer.writable:
            index, its_name = entry
            upper = os.stat(its_name, dir_fd=index.open().n, follow_symlinks=False)
            node = ops._new_indexed(p, name, ldir, st, index, its_name, upper)
            st = upper
        else:
            node = Node(p, name, ldir, ops.ino_of(st), S_IFMT(st.st_mode))
            if ldir.impure is not False and ldir.layer.index < ops.bottom:
                ops._read_file_marks(node, st)
        if st.st_nlink > 1 or (node.more is not None and node.more.index is not None):
            node.extra().key = (st.st_dev, st.st_ino)
        return node

    def _by_descriptor(self, record: Record) -> Node:
        """What has no name: from the descriptor that its last worker left."""
        ops = self._ops
        layers = ops.driver.layers
        if record.state & j.LOWER:
            layers = [layer for layer in layers if not layer.writable] or layers
        layer = layers[min(record.layer, len(layers) - 1)]
        parent = ops.slots[record.parent] if record.parent else None
        if record.kind == 0o040000:
            ldir = LDir(layer, None, record.name, ops.driver.fds)
            ldir.fd = Fd(record.pin)
            d = Dir(ops.root, record.name, [ldir], record.ino)
            d.removed = True
            d.extra().pin = ldir.fd
            return d
        above = parent if isinstance(parent, Dir) else ops.root
        if record.state & j.LOWER:
            ldir = LDir(layer, None, b"", ops.driver.fds)
            ldir.fd = Fd(os.dup(record.pin))
            self._table.keep(record.id, Fd(record.pin))
            node = Node(above, record.name, ldir, record.ino, record.kind)
            more = node.extra()
            more.unlinked = True
            return node
        ldir = layer.root if layer.work is None else layer.work
        node = Node(None, b"", ldir, record.ino, record.kind)  # until another name of it is looked up
        more = node.extra()
        more.pin = Fd(record.pin)
        held = os.fstat(record.pin)
        self._find_in_index(node, layer, held)
        more.unlinked = held.st_nlink + more.nlink_delta <= 0 or bool(record.state & j.UNLINKED)
        more.orphan = bool(record.state & j.ORPHAN)
        if not more.unlinked:
            more.key = (held.st_dev, held.st_ino)
        return node

    def _find_in_index(self, node: Node, layer: Layer, held: os.stat_result) -> None:
        driver = self._ops.driver
        index = driver.index_dir(layer) if held.st_nlink else None
        if index is None:
            return
        for entry in os.listdir(fd_path(index.open())):
            st = os.stat(entry, dir_fd=index.open().n, follow_symlinks=False)
            if (st.st_dev, st.st_ino) == (held.st_dev, held.st_ino):
                more = node.extra()
                more.index, node.ldir = entry, index
                marks = driver.file_marks(index, entry)
                more.nlink_delta = marks.index_delta or 0 if marks is not None else 0
                return

    def revive_marked(self) -> None:
        """What can't wait: inodes with several names (any of them leads to the node), and those between two states."""
        for record in self._journal.marked():
            if record.state & j.LINKED or (record.pin >= 0 and not record.state & (j.UNLINKED | j.REMOVED | j.ORPHAN)):
                try:
                    self.node(record.id)
                except OSError:
                    pass  # asked for again when it is needed
