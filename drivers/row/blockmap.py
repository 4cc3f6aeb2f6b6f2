"""The block map of one redirected file: which blocks of the sparse upper file hold data, kept apart from its holes.

A map file is a header and a log of checksummed records (docs/row-format.md). Blocks are redirected by appending a
record; a CHECKPOINT record says that the data of all records before it is on the disk. After a power cut only what a
checkpoint covers is believed; after the death of the server alone (same boot) all of it is, since the data is in the
page cache. A torn tail fails its checksum and ends the log. No threads of its own: the caller holds the file's lock.
"""

from __future__ import annotations

import errno
import os
from struct import Struct
from zlib import crc32

from .extents import Extents

MAGIC = b"UFSROWM1"
VERSION = 1
HEADER = Struct("<8sIIQQQ16sI")  # magic, version, block size, base size, base mtime (ns), base inode, spare, crc32
RECORD = Struct("<IIQQII")  # kind, spare, first, count or value, its number, crc32 of what is before it

_BODY = Struct("<IIQQI").pack  # a record without its crc32

DATA = 1  # blocks [first, first + count) are in the upper file
HOLE = 2  # blocks [first, first + count) read as zeros
LIMIT = 3  # the base is valid up to byte `count` only
CHECKPOINT = 4  # the data of all records before this one is on the disk
BOOT = 5  # records from here on were written under the boot whose hash is `count`

COMPACT_AT = 4096  # records; a map with more than that and four times its live extents is written anew


class MapError(Exception):
    """The map can't be used: what is wrong, in words."""


def boot_hash() -> int:
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as f:
            return crc32(f.read())
    except OSError:
        return 0


def version_of(dirfd: int, name: str) -> int:
    """What a map's header says, if it is one that can be believed; else ours: its own reader will say what is wrong."""
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=dirfd)
    try:
        raw = os.read(fd, HEADER.size)
    finally:
        os.close(fd)
    if len(raw) < HEADER.size or raw[:8] != MAGIC or crc32(raw[:-4]) != int.from_bytes(raw[-4:], "little"):
        return VERSION
    return int(HEADER.unpack(raw)[1])


class Base:
    """What the map was made over: a file that must not have changed since."""

    __slots__ = ("ino", "mtime_ns", "size")

    def __init__(self, size: int, mtime_ns: int, ino: int) -> None:
        self.size = size
        self.mtime_ns = mtime_ns
        self.ino = ino


class BlockMap:
    def __init__(self, fd: int, blocksize: int, base: Base) -> None:
        self.fd = fd  # O_APPEND, owned
        self.blocksize = blocksize
        self.base = base
        self.limit = base.size  # bytes of the base that count
        self.extents = Extents()
        self.records = 0
        self.dirty = False  # records since the last checkpoint
        self.trusted = True  # the log ended cleanly when it was read
        self._compact_at = COMPACT_AT
        self._compact_records = 0

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    # --- making and reading ---

    @classmethod
    def create(cls, dirfd: int, name: str, blocksize: int, base: Base) -> BlockMap:
        fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600, dir_fd=dirfd)
        made = cls(fd, blocksize, base)
        os.write(fd, made._header())
        made._append(BOOT, 0, boot_hash())
        return made

    def _header(self) -> bytes:
        body = HEADER.pack(MAGIC, VERSION, self.blocksize, self.base.size, self.base.mtime_ns, self.base.ino, b"", 0)[
            :-4
        ]
        return body + crc32(body).to_bytes(4, "little")

    @classmethod
    def load(cls, dirfd: int, name: str, write: bool, unborn: tuple[int, Base] | None = None) -> BlockMap:
        """`unborn`: block size and base of a map that a power cut left empty: nothing of it was ever durable."""
        flags = (os.O_RDWR | os.O_APPEND) if write else os.O_RDONLY
        fd = os.open(name, flags | os.O_CLOEXEC, dir_fd=dirfd)
        try:
            return cls._replay(fd, write, unborn)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def _replay(cls, fd: int, write: bool, unborn: tuple[int, Base] | None) -> BlockMap:
        raw = os.pread(fd, os.fstat(fd).st_size, 0)
        if unborn is not None and not raw[: HEADER.size].strip(b"\0"):
            found = cls(fd, *unborn)
            if write:
                os.ftruncate(fd, 0)
                os.write(fd, found._header())
                found._append(BOOT, 0, boot_hash())
            return found
        if len(raw) < HEADER.size or crc32(raw[: HEADER.size - 4]) != int.from_bytes(
            raw[HEADER.size - 4 : HEADER.size], "little"
        ):
            raise MapError("the header is damaged")
        magic, version, blocksize, size, mtime_ns, ino, _, _ = HEADER.unpack_from(raw)
        if magic != MAGIC:
            raise MapError("not a block map")
        if version != VERSION:
            raise MapError(f"format version {version}, this program knows {VERSION}")
        found = cls(fd, blocksize, Base(size, mtime_ns, ino))
        records, whole = parse(raw)
        believed = believe(records)
        for kind, first, value in records[:believed]:
            found._apply(kind, first, value)
        found.records = believed
        found.trusted = whole and believed == len(records)
        if write:
            end = HEADER.size + believed * RECORD.size
            if end != len(raw):
                os.ftruncate(fd, end)  # what is not believed now must never be
            found._append(BOOT, 0, boot_hash())
        return found

    def _apply(self, kind: int, first: int, value: int) -> None:
        if kind in (DATA, HOLE):
            self.extents.put(first, first + value, kind)
        elif kind == LIMIT:
            self.limit = min(self.limit, value)
            self.extents.cut(-(-value // self.blocksize) if first == 0 else first)

    # --- changing ---

    def _append(self, kind: int, first: int, value: int) -> None:
        if os.write(self.fd, packed(kind, first, value, self.records)) != RECORD.size:
            # a full disk; what stands behind half a record would not be believed
            os.ftruncate(self.fd, HEADER.size + self.records * RECORD.size)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.records += 1

    def redirect(self, first: int, end: int, kind: int) -> None:
        """Blocks [first, end) are DATA or HOLE from now on. Their data must have been written before."""
        if self.extents.has(first, end, kind):
            return
        self._append(kind, first, end - first)
        self.extents.put(first, end, kind)
        self.dirty = True

    def truncate(self, size: int) -> None:
        """The file was cut to `size` bytes: what lies behind is gone for good, growing again gives zeros."""
        end = -(-size // self.blocksize)
        if size < self.limit or self.extents.end() > end:
            self._append(LIMIT, end, min(size, self.limit))
            self.limit = min(self.limit, size)
            self.extents.cut(end)
            self.dirty = True

    def checkpoint(self) -> None:
        """The caller has synced the data: make what the map says of it durable too."""
        if not self.dirty:
            return  # a sync of a clean file is a flush of the disk all the same
        self._append(CHECKPOINT, 0, 0)
        os.fdatasync(self.fd)
        self.dirty = False

    def compacted(self) -> bytes | None:
        """The same map in as few records as there are extents, where that is worth it."""
        if self.records < self._compact_at:
            return None
        runs = self.extents.redirected()
        if self.records < 4 * len(runs):
            self._compact_at = 4 * len(runs)  # not before: to count them takes a while
            return None
        out = [self._header()]
        rows = [(BOOT, 0, boot_hash())]
        if self.limit != self.base.size:
            rows.append((LIMIT, 1 << 62, self.limit))
        rows += [(kind, first, end - first) for first, end, kind in runs]
        rows.append((CHECKPOINT, 0, 0))
        for number, (kind, first, value) in enumerate(rows):
            out.append(packed(kind, first, value, number))
        self._compact_records = len(rows)
        return b"".join(out)

    def replaced(self, fd: int) -> None:
        """The compacted map is in place: go on with it."""
        os.close(self.fd)
        self.fd = fd
        self.records = self._compact_records
        self._compact_at = max(COMPACT_AT, 4 * self.records)


def packed(kind: int, first: int, value: int, number: int) -> bytes:
    body = _BODY(kind, 0, first, value, number & 0xFFFFFFFF)
    return body + crc32(body).to_bytes(4, "little")


def parse(raw: bytes) -> tuple[list[tuple[int, int, int]], bool]:
    """The log's records up to the first that is torn or out of order, and whether that was all of it."""
    records: list[tuple[int, int, int]] = []
    at = HEADER.size
    while at + RECORD.size <= len(raw):
        kind, _, first, value, generation, crc = RECORD.unpack_from(raw, at)
        if crc32(raw[at : at + RECORD.size - 4]) != crc or generation != len(records) & 0xFFFFFFFF:
            return records, False
        records.append((kind, first, value))
        at += RECORD.size
    return records, at == len(raw)


def believe(records: list[tuple[int, int, int]]) -> int:
    """How many records hold: all that a checkpoint covers, and those written under this very boot."""
    now = boot_hash()
    believed = 0
    current = False
    for number, (kind, _, value) in enumerate(records, 1):
        if kind == BOOT:
            current = value == now and now != 0
        if kind == CHECKPOINT or (current and believed == number - 1):
            believed = number
    return believed
