"""One redirected file, open: bytes from the sparse upper file where blocks are redirected, from the base elsewhere.

What the core calls instead of pread and friends when a file is not backed by one plain descriptor. Threads: any; the
file's lock orders changes, reads take the block map under it and move bytes outside.
"""

from __future__ import annotations

import errno
import os
import threading

from unionfs import sysio
from unionfs.core.base import OpenFile, fail
from unionfs.errors import WouldBlock

from .blockmap import DATA, HOLE, BlockMap

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ZERO_RANGE = 0x10
CHUNK = 1 << 20
# What a miss of the page cache reads around the bytes asked for. A copy-up would have read it all; a row of a cold
# database and its neighbours (3 pages) took 430 us without it and 210 with it, a lone random page 150 either way.
READ_AROUND = 32 << 10
SEEK_WINDOW = 1 << 16  # blocks looked at together
_KNOWN = sysio.FALLOC_FL_KEEP_SIZE | sysio.FALLOC_FL_PUNCH_HOLE | ZERO_RANGE


class RowFile(OpenFile):
    """`n` is the sparse upper file. `ident` names its map."""

    __slots__ = ("__weakref__", "base", "ident", "lock", "map", "on_dirty", "unit")

    plain = False

    def __init__(self, n: int, writable: bool, base: OpenFile, blockmap: BlockMap, ident: str) -> None:
        super().__init__(n, writable)
        self.base = base
        self.map = blockmap
        self.unit = blockmap.blocksize
        self.ident = ident
        self.lock = threading.RLock()
        size = os.fstat(n).st_size
        if size < blockmap.limit:  # a cut whose record a crash took: what it hid must not come back as the file grows
            if writable:
                blockmap.truncate(size)
            else:
                blockmap.limit = size
        self.on_dirty: Callable[[RowFile], None] | None = None  # told when the map has something to checkpoint

    def __del__(self) -> None:
        self.map.close()
        super().__del__()

    # --- reading ---

    def _take(self, fast: bool) -> None:
        if not self.lock.acquire(blocking=not fast):
            raise WouldBlock  # a sync holds it, say

    def read_at(self, offset: int, buffer: memoryview, fast: bool = False) -> int:
        bs = self.map.blocksize
        self._take(fast)
        try:
            size = os.fstat(self.n).st_size
            end = min(offset + len(buffer), size)
            if offset >= end:
                return 0
            runs = self.map.extents.runs(offset // bs, -(-end // bs))
            limit = self.map.limit
        finally:
            self.lock.release()
        for first, stop, kind in runs:
            at, to = max(first * bs, offset), min(stop * bs, end)
            part = buffer[at - offset : to - offset]
            got = 0
            if kind == DATA:
                got = _pread(self.n, part, at, fast)
            elif kind == 0 and at < limit:
                got = self._read_base(part[: min(to, limit) - at], at, fast)
            if got < len(part):
                part[got:] = bytes(len(part) - got)
        return end - offset

    def _read_base(self, part: memoryview, at: int, fast: bool) -> int:
        if not self.base.plain:
            return self.base.read_at(at, part, fast)
        if not fast and len(part) < READ_AROUND:
            os.posix_fadvise(self.base.n, at - at % READ_AROUND, READ_AROUND, os.POSIX_FADV_WILLNEED)
        return _pread(self.base.n, part, at, fast)

    def seek(self, offset: int, whence: int) -> int:
        """SEEK_DATA or SEEK_HOLE over what the file shows."""
        size = os.fstat(self.n).st_size
        if offset >= size or offset < 0:
            raise fail(errno.ENXIO)
        want_data = whence == os.SEEK_DATA
        bs = self.map.blocksize
        for first in range(offset // bs, -(-size // bs), SEEK_WINDOW):
            stop = min((first + SEEK_WINDOW) * bs, size)
            for at, is_data in self._segments(max(offset, first * bs), stop):
                if is_data == want_data:
                    return at
        if want_data:
            raise fail(errno.ENXIO)
        return size

    def _segments(self, offset: int, size: int) -> Iterator[tuple[int, bool]]:
        """[offset, size) as pieces (where it begins, is data)."""
        bs = self.map.blocksize
        with self.lock:
            runs = self.map.extents.runs(offset // bs, -(-size // bs))
            limit = self.map.limit
        for first, stop, kind in runs:
            at, to = max(first * bs, offset), min(stop * bs, size)
            if kind:
                yield at, kind == DATA
                continue
            end = min(to, limit)
            while at < end:
                data = self._seek_base(at, os.SEEK_DATA, end)
                if data > at:
                    yield at, False
                if data < end:
                    yield data, True
                    data = self._seek_base(data, os.SEEK_HOLE, end)
                at = data
            if end < to:
                yield max(end, first * bs, offset), False

    def _seek_base(self, at: int, whence: int, end: int) -> int:
        """The base's next data or hole, at most `end`."""
        try:
            found = self.base.seek(at, whence) if not self.base.plain else os.lseek(self.base.n, at, whence)
        except OSError as e:
            if e.errno != errno.ENXIO:
                raise
            return end
        return min(found, end)

    # --- changing ---

    def write_at(self, offset: int, data: memoryview | bytes, fast: bool = False) -> int:
        self._take(fast)
        try:
            bs = self.map.blocksize
            end = offset + len(data)
            first, stop = offset // bs, -(-end // bs)
            if self.map.extents.has(first, stop, DATA):
                return os.pwrite(self.n, data, offset)
            if offset % bs or end % bs:
                size = os.fstat(self.n).st_size
                if offset % bs:
                    self._fill(first, size, fast)
                if end % bs and end < size and not (stop - 1 == first and offset % bs):
                    self._fill(stop - 1, size, fast)
            done = os.pwrite(self.n, data, offset)
            # a short write (full disk): the blocks that it reached whole, and the one it ends in, which was filled
            reached = -(-(offset + done) // bs)
            if done < len(data) and (offset + done) % bs and reached - 1 > first:
                reached -= 1
                done = reached * bs - offset
            self._redirect(first, reached, DATA)
            return done
        finally:
            self.lock.release()

    def _fill(self, block: int, size: int, fast: bool) -> None:
        """Bring what a block shows into the upper file, before a part of it is overwritten."""
        if self.map.extents.has(block, block + 1, DATA):
            return
        bs = self.map.blocksize
        at = block * bs
        length = min(bs, size - at)
        if length <= 0:
            return
        content = bytearray(length)
        self.read_at(at, memoryview(content), fast)
        if os.pwrite(self.n, content, at) != length:
            raise fail(errno.ENOSPC)

    def _redirect(self, first: int, stop: int, kind: int) -> None:
        if first < stop:
            self.map.redirect(first, stop, kind)
            if self.on_dirty is not None and self.map.dirty:
                self.on_dirty(self)

    def truncate(self, size: int) -> None:
        with self.lock:
            os.ftruncate(self.n, size)
            self.map.truncate(size)
            if self.on_dirty is not None and self.map.dirty:
                self.on_dirty(self)

    def fallocate(self, mode: int, offset: int, length: int) -> None:
        if mode & ~_KNOWN or (mode & ZERO_RANGE and mode & sysio.FALLOC_FL_PUNCH_HOLE):
            raise fail(errno.EOPNOTSUPP)
        with self.lock:
            if not mode & (sysio.FALLOC_FL_PUNCH_HOLE | ZERO_RANGE):
                sysio.fallocate(self.n, mode, offset, length)
                return
            end = offset + length
            grows = mode & ZERO_RANGE and not mode & sysio.FALLOC_FL_KEEP_SIZE
            if grows and end > os.fstat(self.n).st_size:
                os.ftruncate(self.n, end)
            self._zero(offset, min(end, os.fstat(self.n).st_size))

    def _zero(self, offset: int, end: int) -> None:
        bs = self.map.blocksize
        size = os.fstat(self.n).st_size
        first, stop = -(-offset // bs), (end // bs if end < size else -(-end // bs))
        if first >= stop:
            if end > offset:
                self.write_at(offset, bytes(end - offset))
            return
        if offset < first * bs:
            self.write_at(offset, bytes(first * bs - offset))
        if stop * bs < end:
            self.write_at(stop * bs, bytes(end - stop * bs))
        punch = sysio.FALLOC_FL_PUNCH_HOLE | sysio.FALLOC_FL_KEEP_SIZE
        self._redirect(first, stop, HOLE)  # a hole that the map does not know would show the base
        sysio.fallocate(self.n, punch, first * bs, (stop - first) * bs)

    # --- durability ---

    def sync(self, datasync: bool) -> None:
        """Data, then map: after it both are on the disk."""
        with self.lock:
            (os.fdatasync if datasync else os.fsync)(self.n)
            self.map.checkpoint()

    def copy_to(self, target: int, length: int) -> None:
        from .flat import copy_content  # which needs this module

        copy_content(self, target, length)

    def absorb(self) -> None:
        """Copy up all that still shows of the base."""
        bs = self.map.blocksize
        with self.lock:
            size = os.fstat(self.n).st_size
            for first, stop, kind in self.map.extents.runs(0, -(-size // bs)):
                if kind:
                    continue
                for block in range(first, stop, CHUNK // bs):
                    upto = min(block + CHUNK // bs, stop)
                    content = bytearray(min(upto * bs, size) - block * bs)
                    self.read_at(block * bs, memoryview(content))
                    if os.pwrite(self.n, content, block * bs) != len(content):
                        raise fail(errno.ENOSPC)
                    self._redirect(block, upto, DATA)

    def bare(self) -> None:
        """Make the upper file alone show the same: what a power cut left in it where the map has holes goes."""
        bs = self.map.blocksize
        size = os.fstat(self.n).st_size
        for first, stop, kind in self.map.extents.runs(0, -(-size // bs)):
            if kind != DATA:
                punch = sysio.FALLOC_FL_PUNCH_HOLE | sysio.FALLOC_FL_KEEP_SIZE
                sysio.fallocate(self.n, punch, first * bs, (stop - first) * bs)
        os.fdatasync(self.n)

    def needs_base(self) -> bool:
        """Some byte of the base still shows."""
        return not self.map.extents.covers(-(-self.map.limit // self.map.blocksize))


def _pread(fd: int, buffer: memoryview, offset: int, fast: bool) -> int:
    """`fast`: what is in the page cache, or WouldBlock."""
    if fast:
        try:
            got = os.preadv(fd, (buffer,), offset, os.RWF_NOWAIT)
        except BlockingIOError:
            raise WouldBlock from None
        except OSError as e:
            if e.errno != errno.EOPNOTSUPP:
                raise
        else:
            if got == len(buffer):
                return got
            raise WouldBlock  # the end of the file, or of what is cached: the slow lane finds out
    return os.preadv(fd, (buffer,), offset)
