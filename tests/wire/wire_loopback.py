"""A small loopback `Operations` over one directory: enough of a filesystem to drive a session for real.

Nodes are paths (hard links are not told apart); no union, no copy-up, no permission logic. Not a model of the core.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import signal
import stat
import struct
import sys
import threading
import time
from typing import Any

from unionfs.api import Attr, Changes, DirEntry, DirEntryPlus, Entry, Notifier
from unionfs.errors import WouldBlock

LIBC = ctypes.CDLL(None, use_errno=True)
O_PATH_NOFOLLOW = os.O_PATH | os.O_NOFOLLOW


def attr_of(st: os.stat_result) -> Attr:
    return (
        st.st_ino, st.st_size, st.st_blocks, st.st_atime_ns // 10**9, st.st_mtime_ns // 10**9, st.st_ctime_ns // 10**9,
        st.st_atime_ns % 10**9, st.st_mtime_ns % 10**9, st.st_ctime_ns % 10**9, st.st_mode, st.st_nlink, st.st_uid,
        st.st_gid, encode_dev(st.st_rdev), st.st_blksize, 0,
    )  # fmt: skip


def encode_dev(rdev: int) -> int:
    major, minor = os.major(rdev), os.minor(rdev)
    return minor & 0xFF | major << 8 | (minor & ~0xFF) << 12


class Node:
    __slots__ = ("fd", "nlookup", "path")

    def __init__(self, path: bytes) -> None:
        self.path = path
        self.nlookup = 0
        self.fd = -1  # opened at the first data access, kept: an unlinked file lives until FORGET


class Lanes(threading.local):
    fast = False


class Loopback:
    """Implements api.Operations over `root`."""

    def __init__(self, root: bytes) -> None:
        self.lanes: Any = Lanes()
        self.root = root
        self.nodes = {1: Node(root)}
        self.by_path = {root: 1}
        self.next = 2
        self.lock = threading.RLock()
        self.slow_names: set[bytes] = set()  # looked up in the slow lane only
        self.slow_gate = threading.Event()  # what the slow lane waits for there
        self.opens = 0
        self.notifier: Notifier | None = None
        self.stopped = False

    def start(self, notifier: Notifier) -> None:
        self.notifier = notifier

    def stop(self) -> None:
        for node in self.nodes.values():
            if node.fd >= 0:
                os.close(node.fd)
        self.stopped = True

    def statistics(self) -> dict[str, Any]:
        return {"nodes": len(self.nodes)}

    def _path(self, parent: int, name: bytes) -> bytes:
        return self.nodes[parent].path + b"/" + name

    def _entry(self, path: bytes) -> Entry:
        st = os.lstat(path)
        with self.lock:
            nodeid = self.by_path.get(path)
            if nodeid is None:
                nodeid = self.by_path[path] = self.next
                self.nodes[nodeid] = Node(path)
                self.next += 1
            self.nodes[nodeid].nlookup += 1
        return nodeid, 0, attr_of(st)

    def _gone(self, path: bytes) -> None:
        self.by_path.pop(path, None)

    def _fd(self, nodeid: int) -> int:
        node = self.nodes[nodeid]
        with self.lock:
            if node.fd < 0:
                try:
                    node.fd = os.open(node.path, os.O_RDWR | os.O_CLOEXEC)
                except OSError as error:
                    if error.errno not in (errno.EISDIR, errno.EROFS, errno.EACCES):
                        raise
                    node.fd = os.open(node.path, os.O_RDONLY | os.O_CLOEXEC)
            return node.fd

    def lookup(self, parent: int, name: bytes) -> Entry | None:
        if name in self.slow_names:
            if self.lanes.fast:
                raise WouldBlock
            with open(self.root + b".begun-" + name, "w"):
                self.slow_gate.wait(60)
        try:
            return self._entry(self._path(parent, name))
        except FileNotFoundError:
            return None

    def forget(self, nodeid: int, nlookup: int) -> None:
        with self.lock:
            node = self.nodes[nodeid]
            node.nlookup -= nlookup
            if node.nlookup <= 0 and nodeid != 1:
                del self.nodes[nodeid]
                for path in [path for path, known in self.by_path.items() if known == nodeid]:
                    del self.by_path[path]
                if node.fd >= 0:
                    os.close(node.fd)

    def getattr(self, nodeid: int) -> Attr:
        node = self.nodes[nodeid]
        return attr_of(os.fstat(node.fd) if node.fd >= 0 else os.lstat(node.path))

    def setattr(self, nodeid: int, changes: Changes) -> Attr:
        node = self.nodes[nodeid]
        if changes.size is not None:
            os.ftruncate(self._fd(nodeid), changes.size)
        where: Any = node.fd if node.fd >= 0 else node.path  # by descriptor: the file may be unlinked
        follow = node.fd >= 0
        if changes.uid is not None or changes.gid is not None:
            owner = (-1 if new is None else new for new in (changes.uid, changes.gid))
            os.chown(where, *owner, follow_symlinks=follow)
        if changes.mode is not None:
            os.chmod(where, stat.S_IMODE(changes.mode))
        if changes.atime_ns is not None or changes.mtime_ns is not None:
            st = os.stat(where, follow_symlinks=follow)
            now = time.time_ns()
            pick = [
                old if new is None else now if new == -1 else new
                for new, old in ((changes.atime_ns, st.st_atime_ns), (changes.mtime_ns, st.st_mtime_ns))
            ]
            os.utime(where, ns=(pick[0], pick[1]), follow_symlinks=follow)
        return self.getattr(nodeid)

    def readlink(self, nodeid: int) -> bytes:
        return os.readlink(self.nodes[nodeid].path)

    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, umask: int, uid: int, gid: int) -> Entry:
        path = self._path(parent, name)
        os.mknod(path, mode & ~umask, rdev)
        os.lchown(path, uid, gid)
        return self._entry(path)

    def mkdir(self, parent: int, name: bytes, mode: int, umask: int, uid: int, gid: int) -> Entry:
        path = self._path(parent, name)
        os.mkdir(path, mode & ~umask)
        os.lchown(path, uid, gid)
        return self._entry(path)

    def create(self, parent: int, name: bytes, flags: int, mode: int, umask: int, uid: int, gid: int) -> Entry:
        entry = self.mknod(parent, name, mode, 0, umask, uid, gid)
        self.opens += 1
        return entry

    def tmpfile(self, parent: int, flags: int, mode: int, umask: int, uid: int, gid: int) -> Entry:
        fd = os.open(self.nodes[parent].path, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, mode & ~umask)
        with self.lock:
            nodeid, self.next = self.next, self.next + 1
            node = self.nodes[nodeid] = Node(b"/proc/self/fd/%d" % fd)
            node.fd, node.nlookup = fd, 1
        self.opens += 1
        return nodeid, 0, attr_of(os.fstat(fd))

    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Entry:
        path = self._path(parent, name)
        os.symlink(target, path)
        os.lchown(path, uid, gid)
        return self._entry(path)

    def link(self, nodeid: int, parent: int, name: bytes) -> Entry:
        path = self._path(parent, name)
        source = self.nodes[nodeid].path
        if LIBC.linkat(-100, source, -100, path, 0x400 if source.startswith(b"/proc/") else 0):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        with self.lock:
            self.by_path[path] = nodeid
            self.nodes[nodeid].nlookup += 1
        return nodeid, 0, attr_of(os.lstat(path))

    def unlink(self, parent: int, name: bytes) -> None:
        path = self._path(parent, name)
        nodeid = self.by_path.get(path)
        if nodeid is not None and stat.S_ISREG(os.lstat(path).st_mode):
            self._fd(nodeid)
        os.unlink(path)
        self._gone(path)

    def rmdir(self, parent: int, name: bytes) -> None:
        path = self._path(parent, name)
        os.rmdir(path)
        self._gone(path)

    def rename(self, parent: int, name: bytes, newparent: int, newname: bytes, flags: int) -> None:
        old, new = self._path(parent, name), self._path(newparent, newname)
        if LIBC.renameat2(-100, old, -100, new, flags):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        with self.lock:
            moved, other = self.by_path.pop(old, None), self.by_path.pop(new, None)
            for nodeid, path in ((moved, new), (other if flags & 2 else None, old)):
                if nodeid is not None:
                    self.by_path[path] = nodeid
                    self.nodes[nodeid].path = path

    def open(self, nodeid: int, flags: int) -> None:
        self._fd(nodeid)
        self.opens += 1

    def release(self, nodeid: int) -> None:
        self.opens -= 1

    def backing_fd(self, nodeid: int, write: bool) -> int | None:
        return None if self.nodes[nodeid].path.endswith(b".cached") else os.dup(self._fd(nodeid))

    def read(self, nodeid: int, offset: int, buffer: memoryview) -> int:
        return os.preadv(self._fd(nodeid), [buffer], offset)

    def write(self, nodeid: int, offset: int, data: memoryview, kill_suidgid: bool) -> int:
        return os.pwrite(self._fd(nodeid), data, offset)

    def fsync(self, nodeid: int, datasync: bool) -> None:
        os.fsync(self._fd(nodeid))

    def fallocate(self, nodeid: int, mode: int, offset: int, length: int) -> None:
        if LIBC.fallocate64(self._fd(nodeid), mode, ctypes.c_int64(offset), ctypes.c_int64(length)):
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))

    def lseek(self, nodeid: int, offset: int, whence: int) -> int:
        return os.lseek(self._fd(nodeid), offset, whence)

    def copy_file_range(self, src: int, src_off: int, dst: int, dst_off: int, length: int, flags: int) -> int:
        return os.copy_file_range(self._fd(src), self._fd(dst), length, src_off, dst_off)

    def _names(self, nodeid: int) -> list[bytes]:
        return sorted(os.listdir(self.nodes[nodeid].path))

    def readdir(self, nodeid: int, cookie: int, size: int, overhead: int) -> list[DirEntry]:
        found: list[DirEntry] = []
        base = self.nodes[nodeid].path
        for at, name in enumerate(self._names(nodeid)[cookie - 2 :], cookie + 1):
            size -= overhead + (len(name) + 7 & ~7)
            if size < 0:
                break
            st = os.lstat(base + b"/" + name)
            found.append((name, at, st.st_ino, st.st_mode))
        return found

    def readdirplus(self, nodeid: int, cookie: int, size: int, overhead: int) -> list[DirEntryPlus]:
        found: list[DirEntryPlus] = []
        base = self.nodes[nodeid].path
        for at, name in enumerate(self._names(nodeid)[cookie - 2 :], cookie + 1):
            size -= overhead + (len(name) + 7 & ~7)
            if size < 0:
                break
            found.append((name, at, self._entry(base + b"/" + name)))
        return found

    def read_ahead(self) -> None:
        pass

    def fsyncdir(self, nodeid: int, datasync: bool) -> None:
        os.fsync(self._fd(nodeid))

    def syncfs(self) -> None:
        os.sync()

    def statfs(self) -> tuple[int, int, int, int, int, int, int, int]:
        st = os.statvfs(self.root)
        return (
            st.f_blocks, st.f_bfree, st.f_bavail, st.f_files, st.f_ffree, st.f_bsize, st.f_namemax, st.f_frsize,
        )  # fmt: skip

    def getxattr(self, nodeid: int, name: bytes) -> bytes:
        return os.getxattr(self.nodes[nodeid].path, name, follow_symlinks=False)

    def listxattr(self, nodeid: int, uid: int) -> list[bytes]:
        return [os.fsencode(name) for name in os.listxattr(self.nodes[nodeid].path, follow_symlinks=False)]

    def setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int, kill_sgid: bool) -> None:
        os.setxattr(self.nodes[nodeid].path, name, value, flags, follow_symlinks=False)

    def removexattr(self, nodeid: int, name: bytes) -> None:
        os.removexattr(self.nodes[nodeid].path, name, follow_symlinks=False)

    def ioctl_getflags(self, nodeid: int) -> int:
        data = fcntl.ioctl(self._fd(nodeid), 0x80086601, bytes(8))
        return int(struct.unpack_from("<I", data)[0])

    def ioctl_setflags(self, nodeid: int, flags: int) -> None:
        fcntl.ioctl(self._fd(nodeid), 0x40086602, struct.pack("<Q", flags))

    def birth_time(self, nodeid: int) -> tuple[int, int] | None:
        return 1_000_000_007, 42

    def which(self, path: bytes) -> list[dict[str, Any]]:
        return []

    def diff(self) -> list[tuple[str, bytes]]:
        return []


def mount(fd: int, mountpoint: bytes) -> None:
    options = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other".encode()
    if LIBC.mount(b"loopback", mountpoint, b"fuse.loopback", 0, options):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def unmount(mountpoint: bytes, lazy: bool = False) -> None:
    if LIBC.umount2(mountpoint, 2 if lazy else 0):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def main() -> None:
    """python wire_loopback.py ROOT MOUNTPOINT DATA [word...]: prints "ready", serves, prints statistics as JSON.

    Words: writeback, debug; one (slow thread only); any other is a name that only the slow lane looks up, and there
    not before SIGUSR1 (ROOT.begun-NAME exists from when that begins).
    """
    from unionfs.session.direct import DirectSession

    root, mountpoint, data, *words = sys.argv[1:]
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    mount(fd, os.fsencode(mountpoint))
    ops = Loopback(os.fsencode(root))
    ops.slow_names = {os.fsencode(word) for word in words} - {b"writeback", b"debug", b"one"}
    signal.signal(signal.SIGUSR1, lambda *_: ops.slow_gate.set())
    session = DirectSession(
        fd,
        ops,
        data=data,
        writeback="writeback" in words,
        debug="debug" in words,
        max_threads=1 if "one" in words else 16,
    )
    try:
        session.serve(lambda: print("ready", flush=True))
    finally:
        try:
            unmount(os.fsencode(mountpoint), lazy=True)
        except OSError:
            pass
    statistics = session.statistics()
    print(json.dumps({**statistics, "opens_left": ops.opens, "stopped": ops.stopped}), flush=True)


if __name__ == "__main__":
    main()
