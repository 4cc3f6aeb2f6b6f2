"""A limit on what an upper may hold (`-o size=10g`): ENOSPC beyond it, whatever room the filesystem below has.

`LimitedUnion` counts the blocks of the upper's files and directories: all of them once when it is made, then what each
operation adds or gives back. It refuses before it changes anything. Space comes back when the kernel forgets a deleted
file: right after the unlink, or when its last user has closed it. Block maps and inodes are not counted; a file that
gets blocks behind our back (a filesystem's own metadata) is corrected when it is next changed. Mounts without a limit
use the plain class and pay nothing. Threads: any; one lock around the sum.
"""

from __future__ import annotations

import errno
import os
import threading
from stat import S_ISREG

from unionfs import sysio
from unionfs.api import Attr, Changes, Entry
from unionfs.core.base import OpenFile, fail
from unionfs.core.freeze import FreezingUnion
from unionfs.core.layers import LDir
from unionfs.core.nodes import Dir, Node
from unionfs.core.ops import UnionOperations
from unionfs.errors import EXIT_USAGE, MountError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from unionfs.core.driver import Driver

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
SMALLEST = 1 << 20
NODE_SPACE = 4096  # what a directory takes at least


def parse_size(text: str) -> int:
    """`10g`: bytes, or KiB, MiB, GiB, TiB with k, m, g, t."""
    word = text.lower().removesuffix("b").removesuffix("i")
    unit = word[-1:] if word[-1:] in _UNITS else ""
    number = word[: len(word) - len(unit)]
    if not number.isdigit() or (unit == "" and not word.isdigit()):
        raise MountError(f"size={text}: must be a number of bytes, or one with k, m, g or t behind it", EXIT_USAGE)
    size = int(number) * _UNITS[unit]
    if size < SMALLEST:
        raise MountError(f"size={text}: at least 1m", EXIT_USAGE)
    return size


class LimitedUnion(UnionOperations):
    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        assert driver.quota is not None
        self.limit = driver.quota
        self._lock = threading.Lock()
        self._counted: dict[int, int] = {}  # node id: blocks of its upper inode when last seen
        self.space_changed()

    def take_over(self) -> None:
        super().take_over()
        self.space_changed()

    # --- the sum ---

    def space_changed(self) -> None:
        """Count anew: what snapshots hold counts too."""
        used = sum(_tree_space(path) for path in self.driver.limited_paths())
        with self._lock:
            self.used = used

    def _charge(self, size: int) -> None:
        with self._lock:
            self.used = max(0, self.used + size)

    def _blocks(self, node: Node) -> int:
        """512-byte blocks that the node has in the upper."""
        more = node.more
        if not node.ldir.layer.writable and (more is None or more.pin is None):
            return 0
        return self._stat(node).st_blocks

    def _changed(self, nodeid: int, before: int, now: int) -> None:
        with self._lock:
            self.used = max(0, self.used + (now - self._counted.get(nodeid, before)) * 512)
            self._counted[nodeid] = now

    def _room_for(self, size: int) -> None:
        if self.used + size > self.limit:
            raise fail(errno.ENOSPC)

    def _room_in(self, f: OpenFile, offset: int, length: int) -> int:
        """How much of the `length` bytes at `offset` fits; ENOSPC: none."""
        unit = f.unit
        first, end = offset // unit * unit, -(-(offset + length) // unit) * unit
        free = self.limit - self.used
        if end - first <= free:
            return length
        if end - first - sysio.allocated(f.n, first, end - first) <= free:
            return length
        if free < unit:
            raise fail(errno.ENOSPC)
        return min(length, first + free // unit * unit - offset)

    # --- data ---

    def _target(self, nodeid: int) -> tuple[OpenFile, int]:
        """The file to be changed, and its blocks before."""
        f = self.files.get(nodeid)
        if f is not None and f.writable:
            return f, os.fstat(f.n).st_blocks
        node = self._node(nodeid)
        before = self._blocks(node)
        return self._open_data(node, True), before

    def write(self, nodeid: int, offset: int, data: memoryview, kill_suidgid: bool) -> int:
        f, before = self._target(nodeid)
        fits = self._room_in(f, offset, len(data))
        try:
            return super().write(nodeid, offset, data[:fits], kill_suidgid)
        finally:
            self._changed(nodeid, before, os.fstat(f.n).st_blocks)

    def fallocate(self, nodeid: int, mode: int, offset: int, length: int) -> None:
        f, before = self._target(nodeid)
        if not mode & sysio.FALLOC_FL_PUNCH_HOLE and self._room_in(f, offset, length) < length:
            raise fail(errno.ENOSPC)
        try:
            super().fallocate(nodeid, mode, offset, length)
        finally:
            self._changed(nodeid, before, os.fstat(f.n).st_blocks)

    def copy_file_range(self, src: int, src_off: int, dst: int, dst_off: int, length: int, flags: int) -> int:
        f, before = self._target(dst)
        fits = self._room_in(f, dst_off, length)
        try:
            return super().copy_file_range(src, src_off, dst, dst_off, fits, flags)
        finally:
            self._changed(dst, before, os.fstat(f.n).st_blocks)

    def setattr(self, nodeid: int, changes: Changes) -> Attr:
        node = self._node(nodeid)
        if changes.size is None or isinstance(node, Dir):
            return super().setattr(nodeid, changes)
        before = self._blocks(node)
        try:
            return super().setattr(nodeid, changes)
        finally:
            self._changed(nodeid, before, self._blocks(node))

    def backing_fd(self, nodeid: int, write: bool) -> int | None:
        return None  # the kernel would write past us

    # --- copies ---

    def _build_copy(
        self, node: Node, st: os.stat_result, work: LDir, tmp: bytes, data: bool, length: int
    ) -> tuple[int, OpenFile | None]:
        if data and S_ISREG(st.st_mode):
            self._room_for(min(length, st.st_blocks * 512))
        copied, made = super()._build_copy(node, st, work, tmp, data, length)
        if made is not None:
            self._changed(node.id, 0, os.fstat(made.n).st_blocks)
        return copied, made

    def _copy_data_up(self, node: Node, length: int) -> None:
        before = self._blocks(node)
        self._room_for(length - before * 512)
        try:
            super()._copy_data_up(node, length)
        finally:
            self._changed(node.id, before, self._blocks(node))

    def _copy_up_dir(self, d: Dir, into: LDir) -> LDir:
        self._room_for(NODE_SPACE)
        made = super()._copy_up_dir(d, into)
        self._charge(os.fstat(made.open().n).st_blocks * 512)
        return made

    # --- names ---

    def mkdir(self, parent: int, name: bytes, mode: int, umask: int, uid: int, gid: int) -> Entry:
        self._room_for(NODE_SPACE)
        entry = super().mkdir(parent, name, mode, umask, uid, gid)
        self._charge(entry[2][2] * 512)
        return entry

    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Entry:
        self._room_for(NODE_SPACE)
        entry = super().symlink(parent, name, target, uid, gid)
        self._charge(entry[2][2] * 512)
        return entry

    def forget(self, nodeid: int, nlookup: int) -> None:
        node = self.slots[nodeid] if nodeid < len(self.slots) else None
        gone = self._blocks(node) if node is not None and _deleted(node) else 0
        super().forget(nodeid, nlookup)
        if node is not None and not node.id:  # dropped
            with self._lock:
                counted = self._counted.pop(nodeid, gone)
                if gone:
                    self.used = max(0, self.used - counted * 512)

    # --- people ---

    def statfs(self) -> tuple[int, int, int, int, int, int, int, int]:
        blocks, bfree, bavail, files, ffree, bsize, namelen, frsize = super().statfs()
        free = max(0, self.limit - self.used) // frsize
        return (
            min(blocks, self.limit // frsize), min(bfree, free), min(bavail, free), files, ffree, bsize, namelen, frsize
        )  # fmt: skip

    def statistics(self) -> dict[str, Any]:
        free = max(0, self.limit - self.used)
        return {**super().statistics(), "quota": {"size": self.limit, "used": self.used, "available": free}}


class LimitedFreezingUnion(LimitedUnion, FreezingUnion):
    """A limit on an upper with snapshots: what is frozen stays counted, copies of it count again."""

    def _close_files(self) -> dict[int, OpenFile]:
        kept = super()._close_files()
        with self._lock:
            self._counted = {nodeid: blocks for nodeid, blocks in self._counted.items() if nodeid in kept}
        return kept


def _deleted(node: Node) -> bool:
    if isinstance(node, Dir):
        return node.removed
    return node.more is not None and node.more.unlinked


def _tree_space(top: bytes) -> int:
    """Bytes that the files and directories in `top` take, each inode once; internal names left out."""
    total = 0
    linked: set[tuple[int, int]] = set()
    pending = [top]
    while pending:
        here = pending.pop()
        with os.scandir(here) as entries:
            for entry in entries:
                if here is top and entry.name.startswith(b".wh..wh."):
                    continue
                st = entry.stat(follow_symlinks=False)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                elif st.st_nlink > 1:
                    if (st.st_dev, st.st_ino) in linked:
                        continue
                    linked.add((st.st_dev, st.st_ino))
                total += st.st_blocks * 512
    return total
