"""Open files: what OPEN, CREATE, TMPFILE and RELEASE mean in each data mode. Safe from any thread.

An inode is in one mode while any open of it exists (the kernel's rule: EIO otherwise), so the first open decides.
"""

from __future__ import annotations

import errno
import os
import threading

from unionfs.wire import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unionfs.api import Operations
    from unionfs.session.channel import Channel

KEEP = abi.FOPEN_KEEP_CACHE | abi.FOPEN_NOFLUSH
O_ACCMODE = 3


class CachedOpens:
    """Data goes through the kernel's page cache.

    In the noopen mode only O_TMPFILE comes here, and the kernel sends no RELEASE for it.
    """

    def __init__(self, ops: Operations) -> None:
        self._ops = ops

    def opened(self, nodeid: int, flags: int) -> tuple[int, int]:
        self._ops.open(nodeid, flags)
        return KEEP, 0

    def created(self, nodeid: int, flags: int) -> tuple[int, int]:
        return KEEP, 0

    def released(self, nodeid: int) -> None:
        self._ops.release(nodeid)

    def statistics(self) -> dict[str, int]:
        return {}


class _Inode:
    """An open inode: how often, by which backing id (0: cached, maybe with earlier pages), for which file, and whether
    that may be written."""

    __slots__ = ("backing", "file", "keep", "opens", "write")

    def __init__(self, write: bool) -> None:
        self.opens = 0
        self.backing = 0
        self.keep = False
        self.file: tuple[int, int] | None = None
        self.write = write


class PassthroughOpens:
    """Files with one plain backing descriptor are read and written by the kernel; the rest is cached.

    A cached file keeps its pages from one open to the next where it never had a descriptor to pass (it lies in a lower
    layer): once it has one, that stays so. Where passing it failed, it keeps none: it may have been passed before.
    """

    def __init__(self, ops: Operations, channel: Channel) -> None:
        self._ops = ops
        self._channel = channel
        self._lock = threading.Lock()
        self._open: dict[int, _Inode] = {}  # by nodeid, while open; lock: self._lock
        self._passed = 0
        self._cached = 0
        self._refused = 0

    def opened(self, nodeid: int, flags: int) -> tuple[int, int]:
        self._ops.open(nodeid, flags)
        return self.created(nodeid, flags)

    def created(self, nodeid: int, flags: int) -> tuple[int, int]:
        with self._lock:
            write = flags & O_ACCMODE != 0
            inode = self._open.get(nodeid)
            first = inode is None
            if inode is None:
                inode = self._open[nodeid] = self._register(nodeid, write)
            elif write and inode.backing and not inode.write:
                self._check_same(nodeid, inode)
            inode.opens += 1
            if inode.backing:
                self._passed += 1
                return abi.FOPEN_PASSTHROUGH | abi.FOPEN_NOFLUSH, inode.backing
            self._cached += 1
            return (abi.FOPEN_NOFLUSH if first and not inode.keep else KEEP), 0

    def _register(self, nodeid: int, write: bool) -> _Inode:
        inode = _Inode(write)
        try:
            fd = self._ops.backing_fd(nodeid, write)
            inode.keep = fd is None
            if fd is not None:
                try:
                    inode.file = _identity(fd)
                    inode.backing = self._channel.open_backing(fd)
                finally:
                    os.close(fd)
        except OSError:  # ELOOP: the layer is itself stacked too deep
            self._refused += 1
        return inode

    def _check_same(self, nodeid: int, inode: _Inode) -> None:
        """Before the kernel is told to write: the file that it reads from must not be a lower one, by any mistake."""
        fd = self._ops.backing_fd(nodeid, True)
        same = fd is not None and _identity(fd) == inode.file
        if fd is not None:
            os.close(fd)
        if not same:
            self._ops.release(nodeid)
            raise OSError(errno.EBUSY, "open for reading by passthrough from another file")
        inode.write = True

    def released(self, nodeid: int) -> None:
        with self._lock:
            inode = self._open[nodeid]
            inode.opens -= 1
            if not inode.opens:
                del self._open[nodeid]
                if inode.backing:
                    self._channel.close_backing(inode.backing)
        self._ops.release(nodeid)

    def statistics(self) -> dict[str, int]:
        return {
            "passthrough_opens": self._passed,
            "cached_opens": self._cached,
            "passthrough_refused": self._refused,
            "passthrough_inodes": sum(1 for inode in list(self._open.values()) if inode.backing),
        }


def _identity(fd: int) -> tuple[int, int]:
    st = os.fstat(fd)
    return st.st_dev, st.st_ino
