"""Layers that others change too: what is found is compared with what is known, at each access.

`OutsideUnion` trusts nothing that it remembers of a directory that is not `_covered` (here none is, see notified.py):
names are asked of the layers each time, and the kernel is told to keep nothing. Where a layer has something else than
is known, the operation raises `Outdated` before it has changed anything; the gate closes, the node is brought up to
date while no other operation runs, and the operation is done again. A node whose file is gone or was replaced is an
unlinked file to those who have it open, as on any network filesystem: bytes of what we had open, ESTALE for the rest.

What is known of a node on disk is `seen`: device, inode and ctime as of the last answer about it.
"""

from __future__ import annotations

import errno
import os
from stat import S_IFDIR, S_ISDIR

from unionfs.api import Attr, DirEntry, DirEntryPlus, Entry
from unionfs.core.base import OpenFile, fail
from unionfs.core.layers import Layer, LDir
from unionfs.core.live import Gate, LiveUnion
from unionfs.core.nodes import Dir, Node, NodeTable
from unionfs.errors import MountError, WouldBlock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    Suspects = Iterable[tuple[Dir, bytes | None]]  # None: all names of the directory

TRIES = 50  # of one operation, while others change what it looks at
START = 2  # cookies up to it are a listing's beginning


class Outdated(Exception):
    """Before any side effect: the layers show something else under `name` than is known; None: under any name."""

    def __init__(self, parent: Dir, name: bytes | None) -> None:
        super().__init__()
        self.parent = parent
        self.name = name


class CarefulGate(Gate):
    union: OutsideUnion

    def __init__(self, union: OutsideUnion) -> None:
        super().__init__(union)
        self.watch = self._gated(union.watch)

    def _gated(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def passed(*args: Any) -> Any:
            for _ in range(TRIES):
                while self.changing:
                    self._wait()
                self.active += 1
                try:
                    return operation(*args)
                except Outdated as found:
                    suspect = found.parent, found.name
                finally:
                    self.active -= 1
                self.union.renew((suspect,))
            raise fail(errno.ESTALE)

        return passed

    def close_if_idle(self) -> bool:
        """Close unless an operation is running: for the thread that must not wait."""
        self._done.clear()
        self.changing = True
        if not self.active:
            return True
        self.__exit__()
        return False


class SeenTable(NodeTable):
    """What was seen of a node ends with it: the id is used again."""

    def __init__(self, root: Dir, seen: dict[int, tuple[int, int, int]]) -> None:
        super().__init__(root)
        self.seen = seen

    def released(self, nodeid: int) -> None:
        self.seen.pop(nodeid, None)


class OutsideUnion(LiveUnion):
    def __init__(self, driver: Any) -> None:
        self.seen: dict[int, tuple[int, int, int]] = {}  # by node id
        self.renewed = 0
        self._changed: list[Dir] = []  # whose layer directories a renewal has replaced
        self._other_layers = False  # the layers themselves change: nothing stands
        super().__init__(driver)
        self.table = SeenTable(self.root, self.seen)
        self.slots = self.table.slots

    def _make_gate(self) -> Gate:
        return CarefulGate(self)

    # --- what may be trusted ---

    def _covered(self, d: Dir) -> bool:
        """Changes in d are told to us."""
        return False

    def watch(self, nodeid: int) -> bool:
        return False

    def watched(self, nodeid: int) -> bool:
        return False

    def _forget_names(self, p: Dir) -> None:
        p.names = p.stacks = p.inherit = None
        p.complete = False
        p.subdirs = -1
        self.table.merged_names -= self.table.merged.pop(p, 0)

    # --- looking, each time ---

    def _dir(self, nodeid: int) -> Dir:
        d = super()._dir(nodeid)
        if not self._covered(d):
            self._check(d)
            self._forget_names(d)
        return d

    def _check(self, d: Dir) -> None:
        """Outdated unless d, and the directories above it, are what the layers show under their names now."""
        p = d.parent
        if p is None or d.removed:
            return
        if not self._covered(p):
            self._check(p)
        if not self._stands(p, d):
            raise Outdated(p, d.name)

    def _stands(self, p: Dir, d: Dir) -> bool:
        """The layers still merge into d what d is made of."""
        own = iter(d.ldirs)
        expected: LDir | None = next(own)
        for ldir in p.ldirs:
            st = self.driver.probe(ldir, d.name)
            if st is None:
                continue
            if not st or not S_ISDIR(st.st_mode):
                break
            if expected is None or expected.layer is not ldir.layer:
                return False
            here = os.fstat(expected.open().n)
            if (here.st_dev, here.st_ino) != (st.st_dev, st.st_ino):
                return False
            if ldir.layer.index != self.bottom:
                marks = self.driver.marks(expected)
                if marks.redirect is not None:
                    return self._made_of(p, d)
                if marks.opaque or self.driver.cut_off(ldir, d.name):
                    expected = next(own, None)
                    break
            expected = next(own, None)
        return expected is None

    def _made_of(self, p: Dir, d: Dir) -> bool:
        """`_stands` where a redirect leads elsewhere."""
        found = self._find(p, d.name)
        if found is None:
            return False
        fresh = self._new_dir(p, d.name, *found)
        return [_identity(ldir) for ldir in fresh.ldirs] == [_identity(ldir) for ldir in d.ldirs]

    def _still(self, p: Dir, node: Node, found: tuple[LDir, os.stat_result] | None) -> bool:
        """What was found under a name of node is node."""
        if found is None:
            return False
        ldir, st = found
        if isinstance(node, Dir):
            return S_ISDIR(st.st_mode) and self._stands(p, node)
        if node.more is not None and node.more.index is not None:
            return self._same(node, ldir, st, node.name)
        return node.ldir.layer is ldir.layer and self._is_file(node, st)

    def _is_file(self, node: Node, st: os.stat_result) -> bool:
        """It is the file that the node was made of, and not another one in its place."""
        if st.st_mode & 0o170000 != node.kind:
            return False  # the number of an inode that is gone is used again
        seen = self.seen.get(node.id)
        if seen is not None:
            return seen[:2] == (st.st_dev, st.st_ino)
        opened = self.files.get(node.id)  # after a copy-up: what we have copied, if that is open
        if opened is None or (node.more is not None and node.more.data is not None):
            return True
        own = os.fstat(opened.n)
        return (own.st_dev, own.st_ino) == (st.st_dev, st.st_ino)

    def _find(self, p: Dir, name: bytes) -> tuple[LDir, os.stat_result] | None:
        if self._covered(p):
            return super()._find(p, name)
        if p.removed or self.driver.reserved(name):
            return None
        for ldir in p.ldirs:
            st = self.driver.probe(ldir, name)
            if st is not None:
                return (ldir, st) if st else None
        return None

    def _child(self, p: Dir, name: bytes) -> Node:
        node = p.children.get(name)
        if node is not None and node.id and not self._covered(p) and not self._still(p, node, self._find(p, name)):
            raise Outdated(p, name)
        return super()._child(p, name)

    def lookup(self, parent: int, name: bytes) -> Entry | None:
        p = self._dir(parent)
        node = p.children.get(name)
        if self._covered(p):
            return self._lookup_covered(p, name, node)
        found = self._find(p, name)
        if node is not None and node.id and not self._still(p, node, found):
            raise Outdated(p, name)
        if found is None:
            return None
        if node is None or not node.id:
            node = self._adopt(p, name, *found)
        st = found[1]
        if node.more is not None:
            st = self._stat(node)
            if not isinstance(node, Dir) and not self._is_file(node, st):
                raise Outdated(p, name)
        return self._entry(node, st)

    def _lookup_covered(self, p: Dir, name: bytes, node: Node | None) -> Entry | None:
        """What was told is known; what is about to be told may show: never another file's attributes as the node's."""
        if node is None or not node.id or isinstance(node, Dir):
            return super().lookup(p.id, name)
        try:
            st = self._stat(node)
        except FileNotFoundError:
            raise Outdated(p, name) from None
        if not self._is_file(node, st):
            raise Outdated(p, name)
        return self._entry(node, st)

    def getattr(self, nodeid: int) -> Attr:
        node = self._node(nodeid)
        if isinstance(node, Dir):
            if not self._covered(node):
                self._check(node)
            return self._attr(node, self._stat(node))
        st = self._stat(node)
        if not self._is_file(node, st) and node.parent is not None:
            raise Outdated(node.parent, node.name)
        return self._attr(node, st)

    def readdirplus(self, nodeid: int, cookie: int, size: int, overhead: int) -> list[DirEntryPlus]:
        if cookie <= START:
            self._begin_listing(nodeid)
        return super().readdirplus(nodeid, cookie, size, overhead)

    def readdir(self, nodeid: int, cookie: int, size: int, overhead: int) -> list[DirEntry]:
        if cookie <= START:
            self._begin_listing(nodeid)
        return super().readdir(nodeid, cookie, size, overhead)

    def _begin_listing(self, nodeid: int) -> None:
        p = self._dir(nodeid)
        if self._covered(p):
            return
        p.order = None
        if p is self.root and len(p.ldirs) != len(self._merging_roots()):
            raise Outdated(p, b"")
        for name, node in list(p.children.items()):
            if node.id and not self._still(p, node, self._find(p, name)):
                raise Outdated(p, None)

    def _merging_roots(self) -> list[LDir]:
        """The layers' roots, down to one that is opaque."""
        roots: list[LDir] = []
        for layer in self.driver.layers:
            roots.append(layer.root)
            if layer.index != self.bottom and self.driver.marks(layer.root).opaque:
                break
        return roots

    # --- what is remembered elsewhere in the core ---

    def _list(self, p: Dir) -> None:
        if not self._covered(p):
            self._forget_names(p)
        super()._list(p)

    def _hidden(self, p: Dir, name: bytes, layer: Layer) -> bool:
        if self._covered(p):
            return super()._hidden(p, name, layer)
        return any(ldir.layer.index < layer.index and self.driver.probe(ldir, name) is not None for ldir in p.ldirs)

    def _dir_nlink(self, node: Node, nlink: int) -> int:
        """Of a merged directory that has to be listed each time: 1, as filesystems say that don't count."""
        assert isinstance(node, Dir)
        if len(node.ldirs) > 1 and not node.removed and not self._covered(node):
            return 1
        return super()._dir_nlink(node, nlink)

    def _attr(self, node: Node, st: Any) -> Attr:
        if node.kind != S_IFDIR and not self._is_file(node, st):
            raise fail(errno.ENOENT, node.name)  # since this very moment; the next access finds what took its place
        self.seen[node.id] = (st.st_dev, st.st_ino, st.st_ctime_ns)
        return super()._attr(node, st)

    def _open_data(self, node: Node, write: bool) -> OpenFile:
        known = self.files.get(node.id)
        f = super()._open_data(node, write)
        if f is known or not f.plain or node.parent is None or (node.more is not None and node.more.pin is not None):
            return f
        if node.id in self.seen and not self._is_file(node, os.fstat(f.n)):  # its size would be another file's
            self.files.pop(node.id, None)
            raise Outdated(node.parent, node.name)
        return f

    def _copy_up_to(self, layer: Layer, node: Node, st: os.stat_result, data: bool, length: int) -> None:
        p, name = node.parent, node.name
        if p is not None and not self._is_file(node, st):
            raise Outdated(p, name)
        try:
            super()._copy_up_to(layer, node, st, data, length)
        except OSError as e:
            if e.errno != errno.EIO or p is None or self._is_file(node, self._stat(node)):
                raise
            raise Outdated(p, name) from None  # it was cut while it was copied: another file
        self.seen.pop(node.id, None)

    def relocate(self, node: Node, layer: Layer) -> None:
        super().relocate(node, layer)
        self.seen.pop(node.id, None)

    # --- bringing up to date ---

    def renew(self, suspects: Suspects) -> None:
        """Look again at names, with no operation running. WouldBlock in the fast lane if that has to be waited for."""
        gate = self.gate
        assert isinstance(gate, CarefulGate)
        if getattr(self.lanes, "fast", False):
            if not self._one_change.acquire(blocking=False):
                raise WouldBlock
            try:
                if not gate.close_if_idle():
                    raise WouldBlock
                try:
                    news = self._renew_all(suspects)
                finally:
                    gate.__exit__()
            finally:
                self._one_change.release()
        else:
            try:
                with self._one_change, gate:
                    news = self._renew_all(suspects)
            except MountError:
                raise fail(errno.EBUSY) from None
        self._tell(*news)

    def _renew_all(self, suspects: Suspects) -> tuple[list[tuple[int, bytes]], list[Dir], list[Dir]]:
        """Names that the kernel must ask for again, directories that show other names, and those made of others."""
        lost: list[tuple[int, bytes]] = []
        touched: dict[Dir, None] = {}
        self._changed.clear()
        self.renewed += 1
        for d, name in suspects:
            if self.slots[d.id] is not d or d.removed:
                continue
            if name == b"":
                lost += self._apply(self.driver.layers, lambda: None)
                continue
            self._forget_names(d)
            d.order = None
            touched[d] = None
            pending: list[Dir | None] = []
            for one in list(d.children) if name is None else [name]:
                node = d.children.get(one)
                if node is None:
                    lost.append((d.id, one))  # the kernel may know that it is absent
                else:
                    pending.append(self._renew(d, one, node, lost))
            while pending:
                child = pending.pop()
                if child is not None:
                    pending += self._look_again(child, lost)
        return lost, list(touched), list(self._changed)

    def _tell(self, lost: list[tuple[int, bytes]], touched: list[Dir], changed: list[Dir]) -> None:
        """The kernel keeps nothing of what is looked at each time."""

    def _look_again(self, d: Dir, lost: list[tuple[int, bytes]]) -> list[Dir]:
        self._changed.append(d)
        return super()._look_again(d, lost)

    def _renew(self, d: Dir, name: bytes, node: Node, lost: list[tuple[int, bytes]]) -> Dir | None:
        if isinstance(node, Dir) and not self._other_layers:
            try:
                if self._stands(d, node):
                    return None
                if not self._is_part(d, node):
                    self._dir_lost(node)
                    d.children.pop(name, None)
                    lost.append((d.id, name))
                    return None
            except OSError:
                pass
        return super()._renew(d, name, node, lost)

    def _is_part(self, p: Dir, d: Dir) -> bool:
        """Something of what d is made of still is where it was: else a directory of that name is another one."""
        own = {ldir.layer: ldir for ldir in d.ldirs}
        for ldir in p.ldirs:
            if ldir.layer in own:
                st = self.driver.probe(ldir, d.name)
                if st and _identity(own[ldir.layer])[1:] == (st.st_dev, st.st_ino):
                    return True
        return d.redirect is not None

    def _apply(self, layers: list[Layer], commit: Callable[[], None]) -> list[tuple[int, bytes]]:
        self._other_layers = True
        try:
            return super()._apply(layers, commit)
        finally:
            self._other_layers = False

    def _same(self, node: Node, ldir: LDir, st: os.stat_result, name: bytes) -> bool:
        if self._is_file(node, st):
            return node.id in self.seen or super()._same(node, ldir, st, name)
        return self._same_index(node, ldir, st, name)

    def _detach(self, node: Node) -> None:
        """By its old name another file may be found by now: the node keeps the one that we have open, or none."""
        more = node.extra()
        if more.pin is None and more.index is None:
            try:
                there = self._is_file(node, self._stat(node))
            except OSError:
                there = False
            if not there:
                opened = self.files.get(node.id)
                if opened is not None and opened.plain and more.data is None:
                    more.pin = opened
                else:
                    node.ldir = LDir(node.ldir.layer, None, b"", self.driver.fds)  # ESTALE, whoever asks
        super()._detach(node)

    def statistics(self) -> dict[str, Any]:
        return {**super().statistics(), "outside": {"udba": self.driver.outside, "renewed": self.renewed}}


def _identity(ldir: LDir) -> tuple[int, int, int]:
    st = os.fstat(ldir.open().n)
    return ldir.layer.index, st.st_dev, st.st_ino
