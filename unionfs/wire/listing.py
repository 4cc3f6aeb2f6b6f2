"""Records of READDIR and READDIRPLUS, and the two dialects of inode-flag ioctls, as bytes.

A listing's records go straight into the reply buffer, behind the place of its header. "." and ".." are made here
(cookies 1 and 2, not counted as lookups: their nodeid in a plus record is 0); the core's names have cookies above 2,
and an offset of 2 asks it for the first.
"""

from __future__ import annotations

import errno
from struct import Struct

from unionfs.wire import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from unionfs.api import Operations

_START = abi.OUT_HEADER_SIZE
_NO_ATTR = (0,) * 16
_PADDING = tuple(b"\0" * (-size % 8) for size in range(8))  # by size modulo 8
DT_DIR = 4
# What one reply should hold, about 48 names, where the next one can be made ready while the client works through it.
PIECE = 8192
WHOLE = 1 << 32
UNKNOWN_INO = 0xFFFFFFFF  # of "..": any number but 0, which readdir(3) would skip

# FS_IOC_FSGETXATTR's names for what FS_IOC_GETFLAGS says: xflag, flag
_XFLAGS = ((0x08, 0x10), (0x10, 0x20), (0x20, 0x08), (0x40, 0x80), (0x80, 0x40), (0x200, 1 << 29), (0x8000, 1 << 25))


class _Packers(dict[int, "Callable[..., None]"]):
    """What packs a plus record together with its name, by the name's length with its padding."""

    def __missing__(self, padded: int) -> Callable[..., None]:
        pack = self[padded] = Struct(f"{abi.DIRENTPLUS.format}{padded}s").pack_into  # `s` fills up with zeros
        return pack


_packers = _Packers()


def plus(
    ops: Operations, nodeid: int, offset: int, out: memoryview, room: int, timeout: int,
    watched: Callable[[int], bool] | None = None,
) -> int:  # fmt: skip
    """Fill `out` with records of at most `room` bytes; the end of the reply. Attributes of nodes that are not `watched`
    are not to be kept."""
    at = _START
    if offset < 2:
        at = _dots(ops, nodeid, offset, out, at, plus=True)
        offset = 2
    packers = _packers
    for name, cookie, (child, generation, attr) in ops.readdirplus(nodeid, offset, room + _START - at, 152):
        size = len(name)
        of_node = timeout if watched is None or watched(child) else 0
        padded = (size + 7) & ~7
        packers[padded](
            out, at, child, generation, timeout, of_node, 0, 0, *attr, attr[0], cookie, size, attr[9] >> 12, name
        )
        at += 152 + padded
    return at


def plain(ops: Operations, nodeid: int, offset: int, out: memoryview, room: int) -> int:
    at = _START
    if offset < 2:
        at = _dots(ops, nodeid, offset, out, at, plus=False)
        offset = 2
    pack = abi.DIRENT.pack_into
    for name, cookie, ino, mode in ops.readdir(nodeid, offset, room + _START - at, 24):
        size = len(name)
        pack(out, at, ino, cookie, size, mode >> 12)
        name += _PADDING[size & 7]
        at += 24
        end = at + len(name)
        out[at:end] = name
        at = end
    return at


def _dots(ops: Operations, nodeid: int, offset: int, out: memoryview, at: int, *, plus: bool) -> int:
    own = ops.getattr(nodeid)[0]
    for cookie, name, ino in ((1, b".", own), (2, b"..", own if nodeid == abi.ROOT_ID else UNKNOWN_INO)):
        if cookie <= offset:
            continue
        if plus:
            abi.DIRENTPLUS.pack_into(out, at, 0, 0, 0, 0, 0, 0, *_NO_ATTR, ino, cookie, len(name), DT_DIR)
            at += 152
        else:
            abi.DIRENT.pack_into(out, at, ino, cookie, len(name), DT_DIR)
            at += 24
        out[at : at + 8] = name.ljust(8, b"\0")
        at += 8
    return at


def inode_flags(ops: Operations, nodeid: int, command: int, data: memoryview) -> bytes | None:
    """What chattr(1) and lsattr(1) do, in either dialect; None: not an ioctl of ours (ENOTTY)."""
    if command in (abi.FS_IOC_GETFLAGS, abi.FS_IOC_GETFLAGS_32):
        return abi.U32.pack(ops.ioctl_getflags(nodeid))
    if command in (abi.FS_IOC_SETFLAGS, abi.FS_IOC_SETFLAGS_32):
        ops.ioctl_setflags(nodeid, abi.U32.unpack_from(data)[0])
        return b""
    if command == abi.FS_IOC_FSGETXATTR:
        flags = ops.ioctl_getflags(nodeid)
        return abi.FSXATTR.pack(sum(xflag for xflag, flag in _XFLAGS if flags & flag), 0, 0, 0, 0)
    if command == abi.FS_IOC_FSSETXATTR:
        xflags, *others = abi.FSXATTR.unpack_from(data)
        if any(others) or xflags & ~sum(xflag for xflag, _ in _XFLAGS):  # project ids, extent sizes: not ours to keep
            raise OSError(errno.EOPNOTSUPP, "inode flags")
        keep = ops.ioctl_getflags(nodeid) & ~sum(flag for _, flag in _XFLAGS)
        ops.ioctl_setflags(nodeid, keep | sum(flag for xflag, flag in _XFLAGS if xflags & xflag))
        return b""
    return None
