"""What a snapshot showed, without a mount: two of them are compared here, for `unionfs snapshot diff` and `send`.

A view is the core over the layers of one snapshot, read-only, in this process; frozen layers need no lock. Whatever two
views have from the same directories or inodes is the same and is not looked at.
"""

from __future__ import annotations

import fcntl
import os

from unionfs.api import MountConfig
from unionfs.core.base import OpenFile
from unionfs.core.layers import Fd, fd_path
from unionfs.core.nodes import Dir, Node
from unionfs.core.ops import UnionOperations

from . import chain as chains
from .driver import RowDriver
from .flat import read_range, segments

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

CHUNK = 1 << 20
BLOCK = 4096  # the unit in which contents are compared


class View:
    """`snapshot`: a name, or None for the present. Without an upper: the lowers alone."""

    def __init__(self, upper: bytes | None, lowers: list[bytes], snapshot: str | None) -> None:
        config = MountConfig(b"/", driver="row")
        config.lowers, config.upper, config.read_only = list(lowers), upper, True
        if snapshot is not None:
            config.options["snapshot"] = snapshot
        self.driver = RowDriver(config)
        self.core = UnionOperations(self.driver)
        self._lock = None if upper is None else _hold(upper)  # layers are not removed meanwhile

    def child(self, d: Dir | None, name: bytes) -> Node | None:
        if d is None:
            return None
        try:
            node = self.core._child(d, name)
        except FileNotFoundError:
            return None
        self.core.table.counts[node.id] += 1
        return node

    def done(self, node: Node | None) -> None:
        if node is not None:
            self.core.forget(node.id, 1)

    def names(self, d: Dir | None) -> set[bytes]:
        if d is None:
            return set()
        self.core._list(d)
        return set(self.core._visible(d))

    def stat(self, node: Node) -> os.stat_result:
        return self.core._stat(node)

    def identity(self, node: Node) -> tuple[tuple[int, int], ...]:
        """Where it comes from: equal ones are equal all the way down."""
        found = [os.fstat(ldir.open().n) for ldir in node.ldirs] if isinstance(node, Dir) else [self.stat(node)]
        return tuple((st.st_dev, st.st_ino) for st in found)

    def open(self, node: Node) -> OpenFile:
        return self.core._open_data(node, False)

    def generations(self, node: Node) -> Iterator[tuple[tuple[int, int], list[tuple[int, int]]]]:
        """The inodes that the file's bytes are of, from the top: each with the ranges that hide those below."""
        st = self.stat(node)
        below = node.more.data if node.more is not None else None
        ldir, name = node.ldir, node.disk_name()
        while True:
            path = fd_path(ldir.open(), name)
            ident = self.driver.ident_of(path) if below is not None else None
            yield (st.st_dev, st.st_ino), self._ranges(ident, ldir.layer, st.st_size) if ident is not None else []
            if below is None:
                return
            ldir, name = below
            st = os.stat(name, dir_fd=ldir.open().n, follow_symlinks=False)
            below = self.driver.next_below(self.core, ldir, name)

    def _ranges(self, ident: str, layer: object, size: int) -> list[tuple[int, int]]:
        from unionfs.core.layers import Layer

        assert isinstance(layer, Layer)
        found = self.driver.load_map(ident, layer)
        bs = found.blocksize
        ranges = [(first * bs, min(end * bs, size)) for first, end, _ in found.extents.redirected()]
        if found.limit < size:
            ranges.append((found.limit, size))
        found.close()
        return ranges


def _hold(upper: bytes) -> Fd | None:
    try:
        fd = Fd(os.open(os.path.join(upper, chains.STORE), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
    except OSError:
        return None
    fcntl.flock(fd.n, fcntl.LOCK_SH)
    return fd


class Change:
    """`kind`: A, C or D; a file that another kind of thing takes the place of is D, then A. `leaving`: a directory,
    after what is in it."""

    __slots__ = ("kind", "leaving", "new", "old", "path")

    def __init__(self, kind: str, path: bytes, old: Node | None, new: Node | None, leaving: bool = False) -> None:
        self.kind = kind
        self.path = path
        self.old = old
        self.new = new
        self.leaving = leaving


def compare(old: View, new: View) -> Iterator[Change]:
    """Nodes are good until the next change is asked for."""
    yield from _compare(old, new, old.core.root, new.core.root, b"")


def _compare(old: View, new: View, was: Dir | None, now: Dir, path: bytes) -> Iterator[Change]:
    if was is not None and old.identity(was) == new.identity(now):
        return
    changed = False
    for name in sorted(old.names(was) | new.names(now)):
        o, n = old.child(was, name), new.child(now, name)
        try:
            for change in _compare_entry(old, new, o, n, path + b"/" + name):
                changed = True
                yield change
        finally:
            old.done(o)
            new.done(n)
    if changed or was is None or _looks(old.stat(was)) != _looks(new.stat(now)):
        yield Change("A" if was is None else "C", path or b"/", was, now, leaving=True)


def _compare_entry(old: View, new: View, o: Node | None, n: Node | None, path: bytes) -> Iterator[Change]:
    if n is None:
        if o is not None:
            yield Change("D", path, o, None)
        return
    if o is not None and o.kind != n.kind:
        yield Change("D", path, o, None)
        o = None
    if isinstance(n, Dir):
        if o is None:
            yield Change("A", path, None, n)
        assert o is None or isinstance(o, Dir)
        yield from _compare(old, new, o, n, path)
    elif o is None:
        yield Change("A", path, None, n)
    elif old.identity(o) != new.identity(n):
        yield Change("C", path, o, n)


def _looks(st: os.stat_result) -> tuple[int, int, int]:
    return st.st_mode, st.st_uid, st.st_gid


def rows(old: View, new: View) -> list[tuple[str, bytes]]:
    """As `unionfs diff` lists them: each path once."""
    found: dict[bytes, str] = {}
    for change in compare(old, new):
        if change.path != b"/":
            replaced = found.get(change.path) == "D" and change.kind == "A"
            found[change.path] = "C" if replaced else found.get(change.path, change.kind)
    return sorted(((kind, path) for path, kind in found.items()), key=lambda row: row[1])


def changed_ranges(old: View | None, new: View, was: Node | None, now: Node) -> Iterator[tuple[int, int]]:
    """Where a regular file shows other bytes than it did; a file that was not there has its data."""
    size = new.stat(now).st_size
    f = new.open(now)
    if old is None or was is None:
        yield from segments(f, size)
        return
    before = old.stat(was)
    hidden: list[tuple[int, int]] = []
    for inode, ranges in new.generations(now):
        if inode == (before.st_dev, before.st_ino):
            yield from _joined(hidden, size)
            return
        hidden += ranges
    g = old.open(was)
    yield from _differing(f, g, _joined([*segments(f, size), *segments(g, min(before.st_size, size))], size))


def _joined(ranges: list[tuple[int, int]], size: int) -> Iterator[tuple[int, int]]:
    start = end = 0
    for first, last in sorted(ranges):
        if first > end:
            if end > start:
                yield start, end
            start = first
        end = min(max(end, last), size)
    if end > start:
        yield start, end


def _differing(f: OpenFile, g: OpenFile, ranges: Iterator[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    for start, end in ranges:
        for at in range(start, end, CHUNK):
            length = min(CHUNK, end - at)
            one, other = read_range(f, at, length), read_range(g, at, length).ljust(length, b"\0")
            if one == other:
                continue
            for block in range(0, len(one), BLOCK):
                if one[block : block + BLOCK] != other[block : block + BLOCK]:
                    yield at + block, at + min(block + BLOCK, len(one))
