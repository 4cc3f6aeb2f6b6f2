"""inotify over layer directories: one watch a directory and branch, gone with the directory's `LDir`.

A watch belongs to a node id: what is told is (node id, name, mask). Watching never fails a request: where the system's
limit is reached it is said once, and the directory stays unwatched until there is room again. Safe from any thread;
`wait` is for one.
"""

from __future__ import annotations

import errno
import os
import select
import sys
import threading
from struct import Struct
from time import monotonic

from unionfs import sysio
from unionfs.core.layers import LDir, fd_path
from unionfs.errors import EXIT_FAILURE, MountError

CONTENT = sysio.IN_MODIFY | sysio.IN_ATTRIB | sysio.IN_CLOSE_WRITE
NAMES = sysio.IN_MOVED_FROM | sysio.IN_MOVED_TO | sysio.IN_CREATE | sysio.IN_DELETE
_MASK = CONTENT | NAMES | sysio.IN_ONLYDIR | sysio.IN_EXCL_UNLINK
_EVENT = Struct("<iIII")
_BUFFER = 1 << 18
RETRY = 5.0  # seconds after the limit was met until the next try
OVERFLOW = -1  # in place of a node id


class Watch:
    __slots__ = ("nodeid", "owner", "wd")

    def __init__(self, owner: Watches, wd: int, nodeid: int) -> None:
        self.owner = owner
        self.wd = wd
        self.nodeid = nodeid

    def __del__(self) -> None:
        self.owner.release(self.wd, self.nodeid)


class Watches:
    def __init__(self) -> None:
        try:
            self.fd = sysio.inotify_init()
        except OSError as e:
            raise MountError(
                f"udba=notify: no inotify here: {e.strerror} (sysctl fs.inotify.max_user_instances?); use udba=reval",
                EXIT_FAILURE,
            ) from None
        self.live: dict[int, dict[int, int]] = {}  # watch number → node id → how many Watch objects; lock: _lock
        self.events = 0
        self.overflows = 0
        self.limit_met = 0
        self._retry_at = 0.0
        self._lock = threading.RLock()  # again by the same thread: `release` comes whenever an object goes
        self._stop = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    def cover(self, ldir: LDir, nodeid: int) -> bool:
        """See to it that the directory is watched. False: it can't be."""
        watch = ldir.watch
        if watch is not None and watch.wd in self.live:
            return True
        if self._retry_at and monotonic() < self._retry_at:
            return False
        try:
            held = ldir.open()
            with self._lock:
                wd = sysio.inotify_add_watch(self.fd, fd_path(held), _MASK)
                nodes = self.live.setdefault(wd, {})
                nodes[nodeid] = nodes.get(nodeid, 0) + 1
                ldir.watch = Watch(self, wd, nodeid)
        except OSError as e:
            if e.errno == errno.ENOSPC:
                self._limit(ldir)
            return False
        return True

    def _limit(self, ldir: LDir) -> None:
        self._retry_at = monotonic() + RETRY
        self.limit_met += 1
        if self.limit_met == 1:
            where = os.fsdecode(ldir.layer.path + ldir.path())
            print(
                f"unionfs: udba=notify: no more inotify watches ({len(self.live)} in use), from {where} on directories "
                "are looked at again at each access, which is slower: raise fs.inotify.max_user_watches",
                file=sys.stderr, flush=True,
            )  # fmt: skip

    def release(self, wd: int, nodeid: int) -> None:
        with self._lock:
            nodes = self.live.get(wd)
            if nodes is None:
                return
            left = nodes.get(nodeid, 0) - 1
            if left > 0:
                nodes[nodeid] = left
                return
            nodes.pop(nodeid, None)
            if nodes:
                return
            del self.live[wd]
            try:
                sysio.inotify_rm_watch(self.fd, wd)
            except OSError:
                pass  # it went with its directory

    def wait(self) -> dict[tuple[int, bytes], int] | None:
        """What has happened: (node id, name) → mask; (OVERFLOW, b"") for what is not known. None: stopped."""
        poll = select.poll()
        poll.register(self.fd, select.POLLIN)
        poll.register(self._stop, select.POLLIN)
        told: dict[tuple[int, bytes], int] = {}
        while not told:
            if self._stop in [fd for fd, _ in poll.poll()]:
                return None
            self._parse(os.read(self.fd, _BUFFER), told)
        return told

    def _parse(self, data: bytes, told: dict[tuple[int, bytes], int]) -> None:
        at = 0
        with self._lock:
            while at < len(data):
                wd, mask, _, length = _EVENT.unpack_from(data, at)
                name = data[at + _EVENT.size : at + _EVENT.size + length].rstrip(b"\0")
                at += _EVENT.size + length
                self.events += 1
                if mask & sysio.IN_Q_OVERFLOW:
                    self.overflows += 1
                    told[OVERFLOW, b""] = mask
                elif mask & sysio.IN_IGNORED:
                    self.live.pop(wd, None)
                else:
                    for nodeid in self.live.get(wd, ()):
                        told[nodeid, name] = told.get((nodeid, name), 0) | mask

    def stop(self) -> None:
        os.eventfd_write(self._stop, 1)

    def close(self) -> None:
        """After the thread that waits has ended."""
        with self._lock:
            self.live.clear()
        os.close(self.fd)
        os.close(self._stop)
