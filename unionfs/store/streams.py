"""What an archive passes through before it is unpacked: decompression by its first bytes, digest, limit of size."""

from __future__ import annotations

import gzip
import hashlib
import io
import sys
import zlib
from collections.abc import Iterator
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from unionfs.store.api import Invalid, Readable, Unsupported

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer as Buffer

_CHUNK = 1 << 18
_MAX_WINDOW_LOG = 27  # 128 MiB: what a decompressor must be ready to remember, as the format's tools have it


class Packer(Protocol):
    def compress(self, data: bytes, /) -> bytes: ...
    def flush(self) -> bytes: ...


class Pushback(io.RawIOBase):
    """A stream of which something was read to look at it."""

    def __init__(self, source: Readable, head: bytes = b"") -> None:
        self._source = source
        self._head = head

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        if size < 0:
            return b"".join(iter(lambda: self.read(_CHUNK), b""))
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        return self._source.read(size)

    def readinto(self, buffer: Buffer, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)


class Digesting(Pushback):
    """Passes bytes on and digests them. `limit`: more of them are Invalid (a decompression bomb)."""

    def __init__(self, source: Readable, limit: int | None = None) -> None:
        super().__init__(source)
        self._limit = limit
        self._digest = hashlib.sha256()
        self._count = 0

    def read(self, size: int = -1) -> bytes:
        data = super().read(size)
        if size < 0:
            return data  # read by pieces, each through here
        self._count += len(data)
        if self._limit is not None and self._count > self._limit:
            raise Invalid(f"the archive is larger than {self._limit} bytes unpacked: raise the option apply.max_size")
        self._digest.update(data)
        return data

    @property
    def digest(self) -> str:
        return "sha256:" + self._digest.hexdigest()

    def drain(self) -> None:
        while self.read(_CHUNK):
            pass


def decompressed(stream: Readable) -> Readable:
    """The plain bytes of a plain, gzip or zstd stream. Errors in the compressed data: see `compression_errors`."""
    head = b""
    while len(head) < 4 and (more := stream.read(4 - len(head))):
        head += more
    whole = Pushback(stream, head)
    if head.startswith(b"\x1f\x8b"):
        return gzip.GzipFile(fileobj=io.BufferedReader(whole, _CHUNK))
    if head == b"\x28\xb5\x2f\xfd":
        zstd = _zstd()
        limits = {zstd.DecompressionParameter.window_log_max: _MAX_WINDOW_LOG}
        unpacker: Readable = zstd.ZstdFile(io.BufferedReader(whole, _CHUNK), "rb", options=limits)
        return unpacker
    if head.startswith((b"BZh", b"\xfd7zX")):
        raise Unsupported("the layer is compressed with bzip2 or xz: the image spec knows gzip and zstd only")
    return whole


def compression_errors() -> tuple[type[Exception], ...]:
    """What reading a damaged stream raises."""
    found: tuple[type[Exception], ...] = (gzip.BadGzipFile, zlib.error, EOFError)
    try:
        return (*found, _zstd().ZstdError)
    except Unsupported:
        return found


def _zstd() -> ModuleType:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise Unsupported("a zstd layer needs the package backports.zstd: pip install 'unionfs[images]'") from None
    found: ModuleType = zstd
    return found


def compressed(pieces: Iterator[bytes], how: str) -> Iterator[bytes]:
    """gzip (reproducible: no name, no time) or zstd or, for "", as it is."""
    if not how:
        yield from pieces
        return
    packer: Packer
    if how == "gzip":
        packer = zlib.compressobj(6, zlib.DEFLATED, 31)
    elif how == "zstd":
        packer = _zstd().ZstdCompressor(level=3)
    else:
        raise Invalid(f"compression {how!r}: one of gzip, zstd, none")
    for piece in pieces:
        if data := packer.compress(piece):
            yield data
    yield packer.flush()
