"""Open files: what OPEN, CREATE, TMPFILE and RELEASE mean in each data mode. Safe from any thread.

An inode is in one mode while any open of it exists (the kernel's rule: EIO otherwise), so the first open decides.
"""

from __future__ import annotations

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


class PassthroughOpens:
    """Files with one plain backing descriptor are read and written by the kernel; the rest is cached.

    A cached file keeps no pages from an earlier open here: it may have been written by passthrough in between.
    """

    def __init__(self, ops: Operations, channel: Channel) -> None:
        self._ops = ops
        self._channel = channel
        self._lock = threading.Lock()
        self._open: dict[int, list[int]] = {}  # nodeid: [opens, backing id or 0]; lock: self._lock
        self._passed = 0
        self._cached = 0
        self._refused = 0

    def opened(self, nodeid: int, flags: int) -> tuple[int, int]:
        self._ops.open(nodeid, flags)
        return self.created(nodeid, flags)

    def created(self, nodeid: int, flags: int) -> tuple[int, int]:
        with self._lock:
            state = self._open.get(nodeid)
            first = state is None
            if state is None:
                state = self._open[nodeid] = [0, self._register(nodeid, flags & O_ACCMODE != 0)]
            state[0] += 1
            if state[1]:
                self._passed += 1
                return abi.FOPEN_PASSTHROUGH | abi.FOPEN_NOFLUSH, state[1]
            self._cached += 1
            return (abi.FOPEN_NOFLUSH if first else KEEP), 0

    def _register(self, nodeid: int, write: bool) -> int:
        """The backing id, 0 for a file that has to be cached."""
        fd = self._ops.backing_fd(nodeid, write)
        if fd is None:
            return 0
        try:
            return self._channel.open_backing(fd)
        except OSError:  # ELOOP: the layer is itself stacked too deep
            self._refused += 1
            return 0

    def released(self, nodeid: int) -> None:
        with self._lock:
            state = self._open[nodeid]
            state[0] -= 1
            if not state[0]:
                del self._open[nodeid]
                if state[1]:
                    self._channel.close_backing(state[1])
        self._ops.release(nodeid)

    def statistics(self) -> dict[str, int]:
        return {
            "passthrough_opens": self._passed,
            "cached_opens": self._cached,
            "passthrough_refused": self._refused,
            "passthrough_inodes": sum(1 for state in list(self._open.values()) if state[1]),
        }
