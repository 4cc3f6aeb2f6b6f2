"""Listing merged directories.

A position is a function of the name (a hash), so any cookie ever handed out resumes after its name whatever was added
or removed meanwhile, without a handle, and after a restart of the server too. Names that went since the order was
made are skipped when they are looked at.
"""

from __future__ import annotations

import errno
from bisect import bisect_right, insort
from stat import S_ISDIR
from zlib import crc32

from unionfs.api import DirEntry, DirEntryPlus
from unionfs.core.base import fail
from unionfs.core.layers import LDir
from unionfs.core.lookup import Lookup
from unionfs.core.nodes import Dir

_SHIFT = 24  # names with the same hash: up to 2**24 in a row
_FIRST = 3 << _SHIFT  # cookies 1 and 2 are "." and ".."


class Listing(Lookup):
    def readdirplus(self, nodeid: int, cookie: int, size: int, overhead: int) -> list[DirEntryPlus]:
        p = self._dir(nodeid)
        out: list[DirEntryPlus] = []
        children = p.children
        generations = self.table.generations
        order = self._order(p)
        for i in range(bisect_right(order, (cookie, b"\xff" * 256)), len(order)):
            position, name = order[i]
            size -= (overhead + len(name) + 7) & ~7
            if size < 0:
                break
            node = children.get(name)
            try:
                if node is None:
                    found = self._find(p, name)
                    if found is None:
                        size += (overhead + len(name) + 7) & ~7
                        continue
                    st = found[1]
                    node = self._adopt(p, name, *found)
                    if node.more is not None:
                        st = self._stat(node)  # a hard link may have been copied up under another name
                else:
                    st = self._stat(node)
                attr = self._attr(node, st)
            except FileNotFoundError:
                continue
            node.nlookup += 1
            out.append((name, position, (node.id, generations[node.id], attr)))
        return out

    def readdir(self, nodeid: int, cookie: int, size: int, overhead: int) -> list[DirEntry]:
        p = self._dir(nodeid)
        out: list[DirEntry] = []
        order = self._order(p)
        for i in range(bisect_right(order, (cookie, b"\xff" * 256)), len(order)):
            position, name = order[i]
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

    def _order(self, p: Dir) -> list[tuple[int, bytes]]:
        if p.removed:
            return []
        order = p.order
        if order is None:
            if not p.complete:
                self._list(p)
            order = p.order = self._positions(self._visible(p))
        return order

    @staticmethod
    def _positions(names: list[bytes]) -> list[tuple[int, bytes]]:
        order: list[tuple[int, bytes]] = []
        last = -1
        for base, name in sorted((_FIRST + (crc32(name) << _SHIFT), name) for name in names):
            last = base if base > last else last + 1
            order.append((last, name))
        return order

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
            self._insert(p.order, name)
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

    @staticmethod
    def _insert(order: list[tuple[int, bytes]], name: bytes) -> None:
        base = _FIRST + (crc32(name) << _SHIFT)
        at = bisect_right(order, (base, b""))
        while at < len(order) and order[at][0] >> _SHIFT == base >> _SHIFT:
            if order[at][1] == name:
                return  # it was there before and its place is still good
            base = order[at][0] + 1
            at += 1
        insort(order, (base, name))

    def _is_dir_below(self, p: Dir, name: bytes, layer_index: int) -> bool:
        st = self._below(p, name, layer_index)
        return st is not None and S_ISDIR(st.st_mode)
