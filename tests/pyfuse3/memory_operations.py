"""`Operations` over a tree in memory: what the adapter's tests mount instead of a union.

Node ids and st_ino are apart on purpose. Says which thread ran what, counts lookups as the contract asks, refuses the
fast lane for the operations named in `slow`, and raises what `faults` holds for an operation.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Callable
from typing import Any

from unionfs.api import ROOT_ID, Attr, Changes, DirEntryPlus, Entry, Notifier
from unionfs.errors import WouldBlock


class Node:
    def __init__(self, nodeid: int, ino: int, mode: int, uid: int = 0, gid: int = 0, rdev: int = 0) -> None:
        self.nodeid, self.ino, self.mode, self.uid, self.gid, self.rdev = nodeid, ino, mode, uid, gid, rdev
        self.nlink = 2 if stat.S_ISDIR(mode) else 1
        self.atime = self.mtime = self.ctime = time.time_ns()
        self.data = bytearray()
        self.target = b""
        self.children: dict[bytes, Node] = {}
        self.xattrs: dict[bytes, bytes] = {}
        self.lookups = 0
        self.opens = 0


class MemoryOperations:
    def __init__(self) -> None:
        self.lanes = threading.local()
        self.root = Node(ROOT_ID, 7_000_001, stat.S_IFDIR | 0o755)
        self.nodes = {ROOT_ID: self.root}
        self.calls: list[tuple[str, bool, tuple[Any, ...]]] = []  # operation, in the fast lane, arguments
        self.slow: set[str] = set()
        self.faults: dict[str, Exception] = {}
        self.next_nodeid = 50
        self.next_ino: Callable[[int], int] = lambda nodeid: 9_000_000 + nodeid
        self.notifier: Notifier | None = None
        self.stopped = 0
        self.gate = threading.Event()  # an operation in `waiting` answers only when this is set
        self.waiting: set[str] = set()
        self.in_wait = threading.Event()

    def _enter(self, name: str, *args: Any) -> None:
        fast = getattr(self.lanes, "fast", False)
        if fast and (name in self.slow or name in self.waiting):
            raise WouldBlock
        self.calls.append((name, fast, args))
        if name in self.waiting:
            self.in_wait.set()
            assert self.gate.wait(60)
        if name in self.faults:
            raise self.faults[name]

    def named(self, name: str) -> list[tuple[Any, ...]]:
        return [args for operation, _, args in self.calls if operation == name]

    # Life

    def start(self, notifier: Notifier) -> None:
        self.notifier = notifier

    def stop(self) -> None:
        self.stopped += 1

    def statistics(self) -> dict[str, Any]:
        return {}

    # Names

    def _attr(self, node: Node) -> Attr:
        size = len(node.target) if stat.S_ISLNK(node.mode) else len(node.data)
        times = (node.atime, node.mtime, node.ctime)
        return (
            node.ino, size, -(-size // 512), *(t // 10**9 for t in times), *(t % 10**9 for t in times),
            node.mode, node.nlink, node.uid, node.gid, node.rdev, 4096, 0,
        )  # type: ignore[return-value]  # fmt: skip

    def _entry(self, node: Node) -> Entry:
        node.lookups += 1
        return node.nodeid, 0, self._attr(node)

    def _add(self, parent: int, name: bytes, mode: int, umask: int, uid: int, gid: int, rdev: int = 0) -> Node:
        children = self.nodes[parent].children
        if name in children:
            raise FileExistsError(errno.EEXIST, "exists")
        self.next_nodeid += 1
        nodeid = self.next_nodeid
        node = self.nodes[nodeid] = children[name] = Node(
            nodeid, self.next_ino(nodeid), mode & ~umask, uid, gid, rdev
        )
        return node

    def add_file(self, name: bytes, data: bytes = b"", mode: int = 0o644) -> Node:
        """For tests: a file in the root that nobody has looked up."""
        node = self._add(ROOT_ID, name, stat.S_IFREG | mode, 0, 0, 0)
        node.data += data
        return node

    def lookup(self, parent: int, name: bytes) -> Entry | None:
        self._enter("lookup", parent, name)
        node = self.nodes[parent].children.get(name)
        return self._entry(node) if node else None

    def forget(self, nodeid: int, nlookup: int) -> None:
        self._enter("forget", nodeid, nlookup)
        node = self.nodes[nodeid]
        node.lookups -= nlookup
        assert node.lookups >= 0, (nodeid, nlookup)
        self._reap(node)

    def _reap(self, node: Node) -> None:
        if node.lookups == 0 and node.nlink == 0:
            del self.nodes[node.nodeid]

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, umask: int, uid: int, gid: int) -> Entry:
        self._enter("mknod", parent, name, mode, rdev, umask, uid, gid)
        return self._entry(self._add(parent, name, mode, umask, uid, gid, rdev))

    def mkdir(self, parent: int, name: bytes, mode: int, umask: int, uid: int, gid: int) -> Entry:
        self._enter("mkdir", parent, name, mode, umask, uid, gid)
        entry = self._entry(self._add(parent, name, stat.S_IFDIR | mode, umask, uid, gid))
        self.nodes[parent].nlink += 1
        return entry

    def create(self, parent: int, name: bytes, flags: int, mode: int, umask: int, uid: int, gid: int) -> Entry:
        self._enter("create", parent, name, flags, mode, umask, uid, gid)
        node = self._add(parent, name, mode, umask, uid, gid)
        node.opens += 1
        return self._entry(node)

    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Entry:
        self._enter("symlink", parent, name, target, uid, gid)
        node = self._add(parent, name, stat.S_IFLNK | 0o777, 0, uid, gid)
        node.target = target
        return self._entry(node)

    def link(self, nodeid: int, parent: int, name: bytes) -> Entry:
        self._enter("link", nodeid, parent, name)
        node = self.nodes[parent].children[name] = self.nodes[nodeid]
        node.nlink += 1
        return self._entry(node)

    def unlink(self, parent: int, name: bytes) -> None:
        self._enter("unlink", parent, name)
        try:
            node = self.nodes[parent].children.pop(name)
        except KeyError:
            raise FileNotFoundError(errno.ENOENT, "no such name")
        node.nlink -= 1
        self._reap(node)

    def rmdir(self, parent: int, name: bytes) -> None:
        self._enter("rmdir", parent, name)
        if self.nodes[parent].children[name].children:
            raise OSError(errno.ENOTEMPTY, "not empty")
        node = self.nodes[parent].children.pop(name)
        node.nlink = 0
        self.nodes[parent].nlink -= 1
        self._reap(node)

    def rename(self, parent: int, name: bytes, newparent: int, newname: bytes, flags: int) -> None:
        self._enter("rename", parent, name, newparent, newname, flags)
        source, target = self.nodes[parent].children, self.nodes[newparent].children
        if flags & 1 and newname in target:
            raise FileExistsError(errno.EEXIST, "exists")
        if flags & 2:
            source[name], target[newname] = target[newname], source[name]
            return
        replaced = target.get(newname)
        target[newname] = source.pop(name)
        if replaced:
            replaced.nlink = 0
            self._reap(replaced)

    def readlink(self, nodeid: int) -> bytes:
        self._enter("readlink", nodeid)
        return self.nodes[nodeid].target

    # Attributes

    def getattr(self, nodeid: int) -> Attr:
        self._enter("getattr", nodeid)
        return self._attr(self.nodes[nodeid])

    def setattr(self, nodeid: int, changes: Changes) -> Attr:
        self._enter("setattr", nodeid, changes)
        node = self.nodes[nodeid]
        if changes.size is not None:
            del node.data[changes.size :]
            node.data += bytes(changes.size - len(node.data))
        if changes.kill_suidgid:
            node.mode &= ~stat.S_ISUID
        if changes.mode is not None:
            node.mode = stat.S_IFMT(node.mode) | changes.mode
        node.uid = node.uid if changes.uid is None else changes.uid
        node.gid = node.gid if changes.gid is None else changes.gid
        node.atime = node.atime if changes.atime_ns is None else changes.atime_ns
        node.mtime = node.mtime if changes.mtime_ns is None else changes.mtime_ns
        return self._attr(node)

    # Data

    def open(self, nodeid: int, flags: int) -> None:
        self._enter("open", nodeid, flags)
        self.nodes[nodeid].opens += 1

    def release(self, nodeid: int) -> None:
        self._enter("release", nodeid)
        self.nodes[nodeid].opens -= 1

    def read(self, nodeid: int, offset: int, buffer: memoryview) -> int:
        self._enter("read", nodeid, offset, len(buffer))
        piece = bytes(self.nodes[nodeid].data[offset : offset + len(buffer)])
        buffer[: len(piece)] = piece
        return len(piece)

    def write(self, nodeid: int, offset: int, data: memoryview, kill_suidgid: bool) -> int:
        self._enter("write", nodeid, offset, len(data), kill_suidgid)
        node = self.nodes[nodeid]
        node.data += bytes(max(0, offset - len(node.data)))
        node.data[offset : offset + len(data)] = data
        return len(data)

    def fsync(self, nodeid: int, datasync: bool) -> None:
        self._enter("fsync", nodeid, datasync)

    # Directories

    def read_ahead(self) -> None:
        self._enter("read_ahead")

    def readdirplus(self, nodeid: int, cookie: int, size: int, overhead: int) -> list[DirEntryPlus]:
        self._enter("readdirplus", nodeid, cookie, size, overhead)
        node = self.nodes[nodeid]
        result: list[DirEntryPlus] = []
        for position, name in enumerate(sorted(node.children)[cookie - 2 :], cookie + 1):
            size -= overhead + len(name) + 7 & ~7
            if size < 0:
                break
            result.append((name, position, self._entry(node.children[name])))
        return result

    def fsyncdir(self, nodeid: int, datasync: bool) -> None:
        self._enter("fsyncdir", nodeid, datasync)

    # The filesystem, and extended attributes

    def statfs(self) -> tuple[int, int, int, int, int, int, int, int]:
        self._enter("statfs")
        return 1000, 600, 500, 400, 300, 4096, 255, 1024

    def getxattr(self, nodeid: int, name: bytes) -> bytes:
        self._enter("getxattr", nodeid, name)
        try:
            return self.nodes[nodeid].xattrs[name]
        except KeyError:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))

    def listxattr(self, nodeid: int, uid: int) -> list[bytes]:
        self._enter("listxattr", nodeid)
        return sorted(self.nodes[nodeid].xattrs)

    def setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int, kill_sgid: bool) -> None:
        self._enter("setxattr", nodeid, name, value, flags, kill_sgid)
        self.nodes[nodeid].xattrs[name] = bytes(value)
        if kill_sgid:
            self.nodes[nodeid].mode &= ~stat.S_ISGID

    def removexattr(self, nodeid: int, name: bytes) -> None:
        self._enter("removexattr", nodeid, name)
        if self.nodes[nodeid].xattrs.pop(name, None) is None:
            raise OSError(errno.ENODATA, os.strerror(errno.ENODATA))
