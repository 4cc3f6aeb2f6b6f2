"""State shared by all of the core's topics, and the steps that every operation starts with.

`UnionOperations` is one class in several files, a topic each, in a line of inheritance (base, lookup, listing,
copyup, create, removal, rename, data, attributes, inspect). Threads: the kernel serialises namespace operations per
directory and attribute changes per inode; what it does not know of is ours: copy-up of a node (`_claim`) and of its
parent directories (`tree_lock`).
"""

from __future__ import annotations

import errno
import os
import threading

from unionfs.api import Attr, Entry, Notifier
from unionfs.core.driver import Driver
from unionfs.core.idmap import IdMap
from unionfs.core.layers import Fd, LDir, fd_path
from unionfs.core.nodes import Dir, Node, NodeTable
from unionfs.core.settle import Settler
from unionfs.errors import WouldBlock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_NS = 1_000_000_000
# A layer that does not answer: its server died, or its network went away.
LAYER_GONE = frozenset((errno.ENOTCONN, errno.ECONNABORTED, errno.ESTALE, errno.EHOSTDOWN, errno.ETIMEDOUT))
# One int for all nodes of a kind: masking the mode makes a new one, 32 bytes, for each.
KINDS = {kind << 12: kind << 12 for kind in (1, 2, 4, 6, 8, 10, 12)}


def fail(code: int, what: bytes | None = None) -> OSError:
    return OSError(code, os.strerror(code), what)


class OpenFile(Fd):
    """An open data descriptor of a node."""

    __slots__ = ("writable",)

    plain = True  # False: the bytes are not in this one file alone; a driver's subclass knows them
    unit = 4096  # bytes that are allocated together, at least

    def __init__(self, n: int, writable: bool) -> None:
        self.n = n
        self.writable = writable

    # what a subclass that is not plain does in place of the system calls; `fast`: WouldBlock instead of waiting
    def read_at(self, offset: int, buffer: memoryview, fast: bool = False) -> int:
        raise NotImplementedError

    def write_at(self, offset: int, data: memoryview | bytes, fast: bool = False) -> int:
        raise NotImplementedError

    def truncate(self, size: int) -> None:
        raise NotImplementedError

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        raise NotImplementedError

    def seek(self, offset: int, whence: int) -> int:
        raise NotImplementedError

    def copy_to(self, target: int, length: int) -> None:
        """Write the first `length` bytes into another file, which is empty; holes stay holes."""
        raise NotImplementedError

    def absorb(self) -> None:
        raise NotImplementedError

    def sync(self, datasync: bool) -> None:
        raise NotImplementedError


class Base:
    watch: Callable[[int], bool] | None = None

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.lanes: Any = threading.local()
        self.notifier: Notifier | None = None
        self.idmap = IdMap(driver.config)
        # Files whose filesystem differs from the bottom layer's get a number in the top byte of st_ino.
        self.ino_base: dict[int, int] = {}
        for layer in reversed(driver.layers):
            self.ino_base.setdefault(layer.st_dev, len(self.ino_base) << 56)
        top = driver.layers[0].root
        root = Dir(None, b"", [layer.root for layer in driver.layers], 1)
        bottom = os.fstat(root.ldirs[-1].open().n)
        root.ino = self.ino_of(bottom)
        self.root = root
        self.table = NodeTable(root)
        self.slots = self.table.slots
        self.files: dict[int, OpenFile] = {}
        self.file_limit = min(512, driver.fds.limit)  # kept open; more costs memory and saves little
        self.tree_lock = threading.RLock()
        self.bottom = len(driver.layers) - 1
        self.copying: dict[Node, threading.Lock] = {}  # held while the copy-up runs
        self.nowait = True  # reads may ask for cached bytes only
        self.settler = Settler()
        self.copied_up = 0  # bytes
        self.copied_files = 0
        self.fsuid = os.geteuid()
        self.fsgid = os.getegid()
        self.static_nlink = "static_nlink" in driver.config.options
        self._tmp = 0
        self._apply_marks(root, top)

    def _apply_marks(self, root: Dir, top: LDir) -> None:
        """The root may be opaque too (an upper that hides all lowers)."""
        for i, ldir in enumerate(root.ldirs[:-1]):
            if self.driver.marks(ldir).opaque:
                del root.ldirs[i + 1 :]
                return

    # --- life ---

    def start(self, notifier: Notifier) -> None:
        self.notifier = notifier
        self.driver.start()

    def take_over(self) -> None:
        """In place of a process that served these layers and died: see `Driver.take_over`."""
        self.driver.take_over()

    def stop(self) -> None:
        self.settler.stop()
        self.files.clear()
        self.driver.stop()

    # --- nodes ---

    def _node(self, nodeid: int) -> Node:
        try:
            node = self.slots[nodeid]
        except IndexError:
            node = None
        return node if node is not None else self.table.revive(nodeid)

    def _dir(self, nodeid: int) -> Dir:
        node = self.slots[nodeid]
        if not isinstance(node, Dir):
            node = node or self.table.revive(nodeid)
            if not isinstance(node, Dir):
                raise fail(errno.ENOTDIR)
        return node

    def forget(self, nodeid: int, nlookup: int) -> None:
        node = self.slots[nodeid]
        if node is None:
            self.table.forgotten(nodeid, nlookup)
            return
        counts = self.table.counts
        counts[nodeid] -= nlookup
        if counts[nodeid] <= 0 and nodeid != 1:
            if isinstance(node, Dir):
                if node.children:
                    return
            elif node in self.copying:
                return  # the copier drops it
            self.files.pop(nodeid, None)
            self.table.drop(node)

    def ino_of(self, st: os.stat_result) -> int:
        """The st_ino to show for a file that was never copied up."""
        base = self.ino_base.get(st.st_dev)
        if base is None:  # another filesystem mounted inside a layer
            base = self.ino_base[st.st_dev] = len(self.ino_base) << 56
        ino = st.st_ino
        if base and ino >> 56:
            ino = (ino ^ ino >> 56 << 24) & ((1 << 56) - 1)
        return base + ino

    # --- open files ---

    def _keep_file(self, node: Node, f: OpenFile) -> None:
        """Remember the node's descriptor. To make room the first opened go (a thread that is using one holds it)."""
        files = self.files
        if len(files) >= self.file_limit:
            for nodeid in list(files)[: self.file_limit // 8]:
                files.pop(nodeid, None)
        files[node.id] = f

    # --- where a node is on disk ---

    def _stat(self, node: Node) -> os.stat_result:
        more = node.more
        if more is not None and more.pin is not None:
            return os.fstat(more.pin.n)
        if isinstance(node, Dir):
            return os.fstat(node.ldirs[0].open().n)
        if more is not None and more.index is not None:
            return os.stat(more.index, dir_fd=node.ldir.open().n, follow_symlinks=False)
        return os.stat(node.name, dir_fd=node.ldir.open().n, follow_symlinks=False)

    def _at(self, node: Node) -> tuple[Fd, bytes, bool]:
        """(descriptor to hold, absolute path, follow symlinks) for calls that take a path."""
        more = node.more
        if more is not None:
            if more.pin is not None:
                return more.pin, fd_path(more.pin), True
            if more.index is not None:
                fd = node.ldir.open()
                return fd, fd_path(fd, more.index), False
        if isinstance(node, Dir):
            fd = node.ldirs[0].open()
            return fd, fd_path(fd), True
        fd = node.ldir.open()
        return fd, fd_path(fd, node.name), False

    # --- attributes ---

    def _attr(self, node: Node, st: Any) -> Attr:
        # st is an os.stat_result: ten integers as a tuple (typeshed says float for the times)
        mode, _, _, nlink, uid, gid, size, atime, mtime, ctime = st
        blocks = st.st_blocks
        rdev = st.st_rdev
        if rdev:
            major, minor = os.major(rdev), os.minor(rdev)
            rdev = (minor & 0xFF) | major << 8 | (minor & ~0xFF) << 12
        more = node.more
        if mode & 0o170000 == 0o040000:
            nlink = self._dir_nlink(node, nlink)
        elif more is not None:
            nlink = 0 if more.unlinked else nlink + more.nlink_delta
            if more.nested_whiteout:
                mode = 0o020000 | mode & 0o7777
            if more.data is not None:
                blocks = self._data_blocks(more.data, blocks)
        if self.idmap.active:
            mode, uid, gid, rdev = self.idmap.show(self, node, mode, uid, gid, rdev)
        return (
            node.ino, size, blocks, atime, mtime, ctime,
            st.st_atime_ns % _NS, st.st_mtime_ns % _NS, st.st_ctime_ns % _NS,
            mode, nlink, uid, gid, rdev, 4096, 0,
        )  # fmt: skip

    def _data_blocks(self, data: tuple[LDir, bytes], blocks: int) -> int:
        try:
            return os.stat(data[1], dir_fd=data[0].open().n, follow_symlinks=False).st_blocks
        except OSError:
            return blocks

    def _dir_nlink(self, node: Node, nlink: int) -> int:
        """2 + subdirectories; a merged directory has to be listed once to know."""
        assert isinstance(node, Dir)
        if node.removed:
            return 0
        if self.static_nlink:
            return 1
        if len(node.ldirs) == 1:
            return nlink
        if node.subdirs < 0:
            try:
                self._list(node)
            except OSError as e:
                if e.errno not in LAYER_GONE:
                    raise
                return 1  # as filesystems say that don't count
        return node.subdirs + 2

    def getattr(self, nodeid: int) -> Attr:
        node = self._node(nodeid)
        return self._attr(node, self._stat(node))

    def _entry(self, node: Node, st: os.stat_result) -> Entry:
        nodeid = node.id
        self.table.counts[nodeid] += 1
        if not nodeid:  # the thread that also found it has let it go meanwhile
            raise fail(errno.ESTALE, node.name)
        return nodeid, self.table.generations[nodeid], self._attr(node, st)

    def watched(self, nodeid: int) -> bool:
        return True

    # --- lanes ---

    def _park(self) -> None:
        """About to do what takes long: leave the fast lane."""
        if getattr(self.lanes, "fast", False):
            raise WouldBlock

    def _list(self, node: Dir) -> None:
        raise NotImplementedError  # listing.py

