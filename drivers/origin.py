"""Where a copy came from: overlayfs's origin xattr (struct ovl_fb, fs/overlayfs/overlayfs.h), written and read.

The value is a file handle of the lower inode behind a small header, and it also names the inode's entry in the index.
The inode number inside it is what keeps st_ino the same over copy-up.
"""

from __future__ import annotations

import errno
import struct

from unionfs import sysio
from unionfs.core.layers import Layer, LDir

_MAGIC = 0xFB
_HEADER = struct.Struct("<BBBBB16s")  # version, magic, length, flags (0: little-endian), handle type, filesystem UUID

# file handle types (include/linux/exportfs.h)
_INO32_GEN = 0x01
_INO64_GEN = 0x81
_BTRFS = 0x4D


def layer_uuid(layer: Layer) -> bytes:
    if layer.uuid is None:
        layer.uuid = sysio.fs_uuid(layer.root.open().n)
    return layer.uuid


def encode(source: LDir, name: bytes) -> bytes:
    """The origin value for source/name (b"": source itself). OSError where the filesystem has no handles."""
    kind, handle = sysio.name_to_handle(source.open().n, name)
    return _HEADER.pack(0, _MAGIC, _HEADER.size + len(handle), 0, kind & 0xFF, layer_uuid(source.layer)) + handle


def index_name(source: LDir, name: bytes) -> bytes | None:
    """The name of source/name's entry in the index. None where the filesystem has no handles: no index then."""
    try:
        return encode(source, name).hex().encode()
    except OSError as e:
        if e.errno not in (errno.EOPNOTSUPP, errno.EOVERFLOW):
            raise
        return None


def inode(value: bytes) -> tuple[bytes, int] | None:
    """(filesystem UUID, inode number) of an origin value; None where its handle type is not one that we can read."""
    if len(value) <= _HEADER.size or value[1] != _MAGIC or value[3] & 1:
        return None
    _, _, _, _, kind, uuid = _HEADER.unpack_from(value)
    handle = value[_HEADER.size :]
    if kind == _INO32_GEN and len(handle) == 8:  # ext4, xfs
        return uuid, int(struct.unpack_from("<I", handle)[0])
    if kind == _INO32_GEN and len(handle) == 12:  # tmpfs: generation, low, high
        low, high = struct.unpack_from("<II", handle, 4)
        return uuid, low | high << 32
    if kind in (_INO64_GEN, _BTRFS) and len(handle) >= 12:  # xfs, btrfs
        return uuid, int(struct.unpack_from("<Q", handle)[0])
    return None


def shown_ino(value: bytes, layers: list[Layer], bases: dict[int, int]) -> int | None:
    """The st_ino to show for a copy with this origin: the lower inode's, in the number range of its filesystem."""
    found = inode(value)
    if found is None:
        return None
    uuid, ino = found
    if len(bases) == 1:
        return ino + next(iter(bases.values()))
    for layer in reversed(layers):
        if layer_uuid(layer) == uuid:
            return ino + bases.get(layer.st_dev, 0)
    return None


def device_bases(layers: list[Layer]) -> dict[int, int]:
    """st_dev → what is added to st_ino so that numbers of different filesystems differ; counted from the bottom."""
    bases: dict[int, int] = {}
    for layer in reversed(layers):
        bases.setdefault(layer.st_dev, len(bases) << 56)
    return bases


def supported(ldir: LDir) -> bool:
    try:
        sysio.name_to_handle(ldir.open().n, b"")
    except OSError:
        return False
    return True
