"""Listing merged directories, and keeping true what is remembered of them.

Names that went since the order was made are skipped when they are looked at.

A listing is answered in pieces. While the client works through one, `read_ahead` makes ready the next: the nodes of
files in read-only layers, and their attributes, which can't change before they are asked for. What may change is
looked at when it is asked for.
"""


from __future__ import annotations

import errno
from stat import S_ISDIR

from unionfs.api import DirEntry, DirEntryPlus
from unionfs.core.base import fail
from unionfs.core.layers import LDir
from unionfs.core.lookup import Lookup
from unionfs.core.nodes import Dir, Node
from unionfs.core.order import Order

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from unionfs.api import Attr


NAMES_KEPT = 1000


class Listing(Lookup):
    # where a listing was cut off for want of room: directory, cookie, size, overhead
    _cut: tuple[Dir, int, int, int] | None = None
    _ready: dict[bytes, tuple[Node, LDir, Attr]] | None = None  # what read_ahead made ready, by name

    def readdirplus(self, nodeid: int, cookie: int, size: int, overhead: int) -> list[DirEntryPlus]:
        p = self._dir(nodeid)
        out: list[DirEntryPlus] = []
        children = p.children
        generations, counts = self.table.generations, self.table.counts
        stat, attr_of = self._stat, self._attr
        ready = None
        if getattr(self.lanes, "fast", False):
            ready, self._ready = self._ready, None
            self._cut = None
        room = size
        for position, name in self._after(p, cookie, size, overhead):
            room -= (overhead + len(name) + 7) & ~7
            if room < 0:
                self._cut = p, out[-1][1] if out else cookie, size, overhead
                break
            node = children.get(name)
            try:
                if node is None or not node.id:
                    found = self._find(p, name)
                    if found is None:
                        room += (overhead + len(name) + 7) & ~7
                        continue
                    ldir, st = found
                    node = self._adopt(p, name, ldir, st)
                    if node.more is not None:
                        st = stat(node)  # a hard link may have been copied up under another name
                    attr = attr_of(node, st)
                else:
                    made = ready.get(name) if ready is not None else None
                    if made is not None and made[0] is node and made[1] is node.ldir and node.more is None:
                        attr = made[2]
                    else:
                        attr = attr_of(node, stat(node))
            except FileNotFoundError:
                continue
            nodeid = node.id
            counts[nodeid] += 1  # 0: dropped meanwhile; the kernel gets the name alone
            out.append((name, position, (nodeid, generations[nodeid], attr)))
        if ready is not None:
            for node, _, _ in ready.values():
                self._settle(node)
        order = p.order
        if not out and order is not None and len(order.names) > NAMES_KEPT:
            p.order = None  # the end was seen
        return out

    def read_ahead(self) -> None:
        """Make ready what a listing that was cut off will be asked for next. For the thread of the fast lane."""
        if self._cut is None or self.driver.live:  # layers that may change: nothing is known for long
            return
        p, cookie, size, overhead = self._cut
        self._cut = None
        ready: dict[bytes, tuple[Node, LDir, Attr]] = {}
        try:
            for _, name in self._after(p, cookie, size, overhead):
                size -= (overhead + len(name) + 7) & ~7
                if size < 0:
                    break
                if name in p.children:
                    continue
                found = self._find(p, name)
                if found is None or found[0].layer.writable or S_ISDIR(found[1].st_mode):
                    continue
                ldir, st = found
                node = self._adopt(p, name, ldir, st)
                ready[name] = node, ldir, self._attr(node, st)
        except OSError:
            pass  # who asks for it will see it
        self._ready = ready

    def readdir(self, nodeid: int, cookie: int, size: int, overhead: int) -> list[DirEntry]:
        p = self._dir(nodeid)
        out: list[DirEntry] = []
        for position, name in self._after(p, cookie, size, overhead):
            try:
                node = p.children.get(name)
                if node is None:
                    found = self._find(p, name)
                    if found is None:
                        continue
                    node = self._adopt(p, name, *found)
            except FileNotFoundError:
                continue
            size -= (overhead + len(name) + 7) & ~7
            if size < 0:
                self._settle(node)
                break
            out.append((name, position, node.ino, node.kind))
            self._settle(node)
        return out

    def _after(self, p: Dir, cookie: int, size: int, overhead: int) -> Iterator[tuple[int, bytes]]:
        """At least as many of p's names behind the cookie as a reply of that size can hold, if there are any."""
        if p.removed:
            return iter(())
        order = p.order
        if order is None:
            if not p.complete:
                self._list(p)
            order = p.order = Order(self._visible(p))
            if len(p.ldirs) == 1 and len(order.names) > NAMES_KEPT:
                self._forget_names(p)
        return order.after(cookie, size // (overhead + 1) + 1)

    def _list(self, p: Dir) -> None:
        """Complete p.names with the bottom layer, and count the subdirectories."""
        if p.complete:
            return
        if p.names is None:
            self._merge(p)
        names, stacks = p.names, p.stacks
        assert names is not None and stacks is not None
        bottom: dict[bytes, LDir | None] = {}
        entries, whiteouts = self.driver.scan(p.ldirs[-1])
        ldir = p.ldirs[-1]
        subdirs = len(stacks)
        for name, is_dir in entries:
            if name not in names:
                bottom[name] = ldir
                if is_dir:
                    subdirs += 1
        for name in whiteouts:
            if name not in names and name not in bottom:
                bottom[name] = None
        names.update(bottom)
        p.subdirs = subdirs
        p.complete = True
        self._remember(p, len(names))

    def _forget_names(self, p: Dir) -> None:
        """p has one layer, which can be asked: in a big directory a dictionary of its names is not worth its memory."""
        p.names = p.stacks = None
        p.complete = False
        self.table.merged_names -= self.table.merged.pop(p, 0)

    @staticmethod
    def _visible(p: Dir) -> list[bytes]:
        assert p.names is not None
        return [name for name, ldir in p.names.items() if ldir is not None]

    def _require_empty(self, d: Dir) -> None:
        self._list(d)
        for name in self._visible(d):
            if name in d.children or self._find(d, name) is not None:
                raise fail(errno.ENOTEMPTY, d.name)

    # --- keeping what is remembered true ---

    def _name_added(self, p: Dir, name: bytes, ldir: LDir, is_dir: bool, new: bool = True) -> None:
        """name now shows from ldir; `new`: it did not show before."""
        if p.names is not None and (p.complete or ldir is not p.ldirs[-1] or name in p.names):
            p.names[name] = ldir
        if p.stacks is not None:
            p.stacks.pop(name, None)
            if is_dir and ldir is not p.ldirs[-1]:
                p.stacks[name] = [ldir, None]  # a new directory merges with nothing
        if is_dir and new and p.subdirs >= 0:
            p.subdirs += 1
        if p.order is not None and new:
            p.order.insert(name)
        if p.complete and p.names is not None and not len(p.names) & 1023:
            self._remember(p, len(p.names))

    def _name_removed(self, p: Dir, name: bytes, whiteout: bool, is_dir: bool) -> None:
        p.children.pop(name, None)
        if p.names is not None:
            if whiteout:
                p.names[name] = None
            elif p.complete or len(p.ldirs) > 1:
                p.names.pop(name, None)
        if p.stacks is not None:
            p.stacks.pop(name, None)
        if is_dir and p.subdirs >= 0:
            p.subdirs -= 1

    def _is_dir_below(self, p: Dir, name: bytes, layer_index: int) -> bool:
        st = self._below(p, name, layer_index)
        return st is not None and S_ISDIR(st.st_mode)
