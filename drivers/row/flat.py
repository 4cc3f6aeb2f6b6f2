"""The bytes of a frozen file, whatever the number of snapshots it goes through.

A file that was changed in several generations has a block map in each, over the one before. Frozen ones never change,
so their maps are merged once, when the file is opened, into one sorted list of where each range of bytes is: a read is
a bisection and a pread, with a hundred snapshots as with one. Threads: any; nothing changes after construction.
"""

from __future__ import annotations

import errno
import os
from bisect import bisect_right

from unionfs.core.base import OpenFile, fail

from .blockmap import DATA
from .file import _pread

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from .blockmap import BlockMap

    Piece = tuple[int, int, OpenFile]  # [start, end) is in that file, at the same place; what no piece covers is zeros

CHUNK = 1 << 20


class FlatFile(OpenFile):
    """`n` is the upper inode of the topmost generation, for what is asked of an inode."""

    __slots__ = ("__weakref__", "_dense", "_ends", "_sources", "_starts", "size")

    plain = False

    def __init__(self, n: int, pieces: list[Piece], dense: list[bool], size: int) -> None:
        super().__init__(n, False)
        self.size = size
        self._starts = [piece[0] for piece in pieces]
        self._ends = [piece[1] for piece in pieces]
        self._sources = [piece[2] for piece in pieces]
        self._dense = dense

    def pieces(self) -> list[Piece]:
        return list(zip(self._starts, self._ends, self._sources, strict=True))

    def _from(self, offset: int) -> int:
        """The index of the first piece that ends behind offset."""
        i = bisect_right(self._starts, offset) - 1
        return i if i >= 0 and self._ends[i] > offset else i + 1

    def read_at(self, offset: int, buffer: memoryview, fast: bool = False) -> int:
        end = min(offset + len(buffer), self.size)
        if offset >= end:
            return 0
        starts, ends = self._starts, self._ends
        i, at = self._from(offset), offset
        while at < end:
            start = starts[i] if i < len(starts) else end
            if start > at:
                stop = min(start, end)
                buffer[at - offset : stop - offset] = bytes(stop - at)
            else:
                stop = min(ends[i], end)
                part = buffer[at - offset : stop - offset]
                got = _pread(self._sources[i].n, part, at, fast)
                if got < len(part):
                    part[got:] = bytes(len(part) - got)
                i += 1
            at = stop
        return end - offset

    def seek(self, offset: int, whence: int) -> int:
        if offset >= self.size or offset < 0:
            raise fail(errno.ENXIO)
        data = whence == os.SEEK_DATA
        i, at = self._from(offset), offset
        while i < len(self._starts):
            start, end = self._starts[i], self._ends[i]
            if at < start:
                if not data:
                    return at
                at = start
            if self._dense[i]:
                if data:
                    return at
                at = end
            else:
                at = _seek(self._sources[i].n, at, whence, end)
                if at < end:
                    return at
            i += 1
        if data:
            raise fail(errno.ENXIO)
        return min(at, self.size)

    def copy_to(self, target: int, length: int) -> None:
        copy_content(self, target, length)

    def sync(self, datasync: bool) -> None:
        """What is dirty is the open file's that wrote it, and synced by that."""
        (os.fdatasync if datasync else os.fsync)(self.n)


def _seek(fd: int, at: int, whence: int, end: int) -> int:
    try:
        return min(os.lseek(fd, at, whence), end)
    except OSError as e:
        if e.errno != errno.ENXIO:
            raise
        return end


def flatten(n: int, base: OpenFile, blockmap: BlockMap) -> FlatFile:
    """One more generation: `n` (owned by the result) is the upper inode, `base` what is below its map."""
    size = os.fstat(n).st_size
    bs = blockmap.blocksize
    own = OpenFile(os.dup(n), False)
    if isinstance(base, FlatFile):
        below = list(zip(base.pieces(), base._dense, strict=True))
    else:
        below = [((0, os.fstat(base.n).st_size, base), False)]
    runs = blockmap.extents.redirected()
    changes = [(first * bs, end * bs, own if kind == DATA else None) for first, end, kind in runs]
    merged = list(_merged(below, changes, min(blockmap.limit, size), size))
    return FlatFile(n, [piece for piece, _ in merged], [dense for _, dense in merged], size)


def _merged(
    below: list[tuple[Piece, bool]], changes: list[tuple[int, int, OpenFile | None]], limit: int, size: int
) -> Iterator[tuple[Piece, bool]]:
    pending = iter(below)
    piece = _cut(next(pending, None), limit)
    for start, end, own in changes:
        while piece is not None and piece[0][0] < end:
            (s, e, source), dense = piece
            if s < start:
                yield (s, min(e, start), source), dense
            if e > end:
                piece = ((max(s, end), e, source), dense)
                break
            piece = _cut(next(pending, None), limit)
        if own is not None and start < size:
            yield (start, min(end, size), own), True
    while piece is not None:
        yield piece
        piece = _cut(next(pending, None), limit)


def _cut(piece: tuple[Piece, bool] | None, limit: int) -> tuple[Piece, bool] | None:
    if piece is None or piece[0][0] >= limit:
        return None
    (start, end, source), dense = piece
    return (start, min(end, limit), source), dense


def segments(f: OpenFile, length: int) -> Iterator[tuple[int, int]]:
    """The ranges of an open file's first `length` bytes that hold data."""
    seek = f.seek if not f.plain else lambda at, whence: os.lseek(f.n, at, whence)
    at = 0
    while at < length:
        try:
            at = seek(at, os.SEEK_DATA)
        except OSError as e:
            if e.errno != errno.ENXIO:
                raise
            return
        end = min(seek(at, os.SEEK_HOLE), length)
        if at < end:
            yield at, end
        at = end


def read_range(f: OpenFile, offset: int, length: int) -> bytes:
    """What it shows there; short at its end."""
    if f.plain:
        return os.pread(f.n, length, offset)
    buffer = bytearray(length)
    return bytes(buffer[: f.read_at(offset, memoryview(buffer))])


def copy_content(f: OpenFile, target: int, length: int) -> None:
    for start, end in segments(f, length):
        for at in range(start, end, CHUNK):
            piece = read_range(f, at, min(CHUNK, end - at))
            if os.pwrite(target, piece, at) != len(piece):
                raise fail(errno.ENOSPC)
    os.ftruncate(target, length)
