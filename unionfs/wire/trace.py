"""One line per request and per reply, for `-d`. Bytes in, text out; slow and never on the hot path."""

from __future__ import annotations

import errno
from struct import Struct

from unionfs.wire import abi
from unionfs.wire.dispatch import NAMES

_HIDDEN = 64  # names and values longer than this are cut

# Per opcode: the fixed part after the header, the names of its fields ("_": not shown), and whether names follow.
_BODIES: dict[int, tuple[Struct, tuple[str, ...], bool]] = {
    abi.LOOKUP: (Struct(""), (), True),
    abi.FORGET: (abi.U64, ("nlookup",), False),
    abi.SETATTR: (
        abi.SETATTR_IN,
        ("valid", "_", "_", "size", "_", "atime", "mtime", "_", "_", "_", "_", "mode", "_", "uid", "gid", "_"),
        False,
    ),
    abi.SYMLINK: (Struct(""), (), True),
    abi.MKNOD: (abi.MKNOD_IN, ("mode", "rdev", "umask", "_"), True),
    abi.MKDIR: (abi.MKDIR_IN, ("mode", "umask"), True),
    abi.UNLINK: (Struct(""), (), True),
    abi.RMDIR: (Struct(""), (), True),
    abi.RENAME: (abi.U64, ("newdir",), True),
    abi.RENAME2: (abi.RENAME2_IN, ("newdir", "flags", "_"), True),
    abi.LINK: (abi.U64, ("oldnodeid",), True),
    abi.OPEN: (abi.U32, ("flags",), False),
    abi.READ: (abi.READ_IN, ("_", "offset", "size"), False),
    abi.WRITE: (abi.WRITE_IN, ("_", "offset", "size", "flags"), False),
    abi.FSYNC: (abi.FSYNC_IN, ("_", "flags", "_"), False),
    abi.SETXATTR: (abi.SETXATTR_IN, ("size", "flags", "extra", "_"), True),
    abi.GETXATTR: (abi.GETXATTR_IN, ("size", "_"), True),
    abi.LISTXATTR: (abi.GETXATTR_IN, ("size", "_"), False),
    abi.REMOVEXATTR: (Struct(""), (), True),
    abi.INIT: (abi.INIT_IN, ("major", "minor", "max_readahead", "flags"), False),
    abi.READDIR: (abi.READ_IN, ("_", "offset", "size"), False),
    abi.READDIRPLUS: (abi.READ_IN, ("_", "offset", "size"), False),
    abi.FSYNCDIR: (abi.FSYNC_IN, ("_", "flags", "_"), False),
    abi.CREATE: (abi.CREATE_IN, ("flags", "mode", "umask", "_"), True),
    abi.TMPFILE: (abi.CREATE_IN, ("flags", "mode", "umask", "_"), False),
    abi.INTERRUPT: (abi.U64, ("target",), False),
    abi.IOCTL: (abi.IOCTL_IN, ("_", "flags", "command", "_", "in_size", "out_size"), False),
    abi.BATCH_FORGET: (abi.BATCH_FORGET_IN, ("count", "_"), False),
    abi.FALLOCATE: (abi.FALLOCATE_IN, ("_", "offset", "length", "mode", "_"), False),
    abi.LSEEK: (abi.LSEEK_IN, ("_", "offset", "whence", "_"), False),
    abi.COPY_FILE_RANGE: (
        abi.COPY_FILE_RANGE_IN, ("_", "from", "nodeid_out", "_", "to", "length", "flags"), False,
    ),
}  # fmt: skip
_BODIES[abi.COPY_FILE_RANGE_64] = _BODIES[abi.COPY_FILE_RANGE]

_OCTAL = frozenset(("mode", "umask"))
_HEX = frozenset(("flags", "valid", "command"))
_ENTRIES = frozenset((abi.LOOKUP, abi.MKNOD, abi.MKDIR, abi.SYMLINK, abi.LINK, abi.CREATE, abi.TMPFILE))


def request(data: bytes) -> str:
    _, opcode, unique, nodeid, uid, gid, pid, _, _ = abi.IN_HEADER.unpack_from(data)
    words = [f"#{unique} {NAMES.get(opcode, f'opcode {opcode}')} nodeid={nodeid} uid={uid} gid={gid} pid={pid}"]
    layout, fields, names = _BODIES.get(opcode, (abi.U64, (), False))
    if fields:
        values = layout.unpack_from(data, abi.IN_HEADER_SIZE)
        pairs = zip(fields, values, strict=True)
        words += [f"{field}={_number(field, value)}" for field, value in pairs if field != "_"]
    if names:
        start = abi.IN_HEADER_SIZE + (layout.size if fields else 0)
        words += [_bytes(name) for name in data[start:].split(b"\0") if name]
    return " ".join(words)


def reply(opcode: int, data: bytes) -> str:
    size, error, unique = abi.OUT_HEADER.unpack_from(data)
    head = f"#{unique} {NAMES.get(opcode, f'opcode {opcode}')} ->"
    if error:
        return f"{head} {errno.errorcode.get(-error, 'errno')} ({-error})"
    if opcode in _ENTRIES:
        nodeid, _, valid = Struct("<QQQ").unpack_from(data, 16)
        mode, nlink = Struct("<II").unpack_from(data, 16 + 40 + 60)
        if not nodeid:
            return f"{head} no such entry, for {valid} s"
        return f"{head} nodeid={nodeid} mode={mode:o} nlink={nlink} for {valid} s"
    if opcode in (abi.GETATTR, abi.SETATTR):
        ino, length = abi.U64X2.unpack_from(data, 32)
        mode, nlink = Struct("<II").unpack_from(data, 32 + 60)
        return f"{head} ino={ino} size={length} mode={mode:o} nlink={nlink}"
    if opcode == abi.OPEN:
        _, flags, backing = abi.OPEN_OUT.unpack_from(data, 16)
        return f"{head} flags={flags:#x} backing={backing}"
    return f"{head} {size - abi.OUT_HEADER_SIZE} bytes"


def _number(field: str, value: int) -> str:
    return f"{value:o}" if field in _OCTAL else f"{value:#x}" if field in _HEX else str(value)


def _bytes(name: bytes) -> str:
    return repr(name) if len(name) <= _HIDDEN else f"{name[:_HIDDEN]!r}+{len(name) - _HIDDEN}"
