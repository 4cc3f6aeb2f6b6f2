"""INIT: what the kernel offers, what we take, and the reply that says so. Bytes only.

`Negotiated` is all that a session must know of a connection to serve it: a server that takes over the device of a dead
one gets it as bytes and skips INIT, which the kernel sends once.
"""

from __future__ import annotations

import errno
from struct import Struct

from unionfs.errors import EXIT_FAILURE, EXIT_PERMISSION, EXIT_USAGE, MountError
from unionfs.wire import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

DATA_MODES = ("noopen", "cached", "passthrough")

MAX_PAGES = 256  # requests of up to 1 MiB; the kernel's own ceiling is fs.fuse.max_pages_limit
PAGE = 4096
FOREVER = 1 << 31  # seconds; the mount is the only writer, what changes behind it is invalidated by name

# READDIRPLUS always, not AUTO: one message fills dentries and attributes of a whole directory, and what it costs more
# than READDIR is less than the one LOOKUP per entry that AUTO falls back to.
WANTED = (
    "ASYNC_READ", "BIG_WRITES", "DONT_MASK", "DO_READDIRPLUS", "ASYNC_DIO", "PARALLEL_DIROPS", "POSIX_ACL",
    "MAX_PAGES", "CACHE_SYMLINKS", "NO_OPEN_SUPPORT", "NO_OPENDIR_SUPPORT", "HANDLE_KILLPRIV_V2", "SETXATTR_EXT",
    "INIT_EXT", "HAS_RESEND",
)  # fmt: skip
# Where others change the layers too: the kernel drops a file's pages when it sees another mtime or size, and asks
# before each listing and each readlink.
CAREFUL = ("AUTO_INVAL_DATA",)
CARELESS = ("NO_OPENDIR_SUPPORT", "CACHE_SYMLINKS")
# Without these we would not be right, only quick: the kernel would mask modes itself, or strip no privileges.
REQUIRED = ("BIG_WRITES", "DONT_MASK")


class Negotiated:
    """The terms of one connection."""

    __slots__ = ("data", "flags", "max_readahead", "max_write", "minor", "stack_depth", "timeout")

    _LAYOUT = Struct("<IQIIIIQ")

    def __init__(
        self, *, minor: int, flags: int, max_readahead: int, max_write: int, data: str, stack_depth: int, timeout: int
    ) -> None:
        self.minor = minor
        self.flags = flags
        self.max_readahead = max_readahead
        self.max_write = max_write
        self.data = data  # one of DATA_MODES
        self.stack_depth = stack_depth  # passthrough: how deep our own filesystem counts in a stack
        self.timeout = timeout  # seconds that entries, absences and attributes are valid

    def has(self, flag: str) -> bool:
        return bool(self.flags & abi.INIT_FLAGS[flag])

    @property
    def careful(self) -> bool:
        """What the kernel may keep is said with each answer."""
        return self.has("AUTO_INVAL_DATA")

    def to_bytes(self) -> bytes:
        return self._LAYOUT.pack(
            self.minor, self.flags, self.max_readahead, self.max_write, DATA_MODES.index(self.data), self.stack_depth,
            self.timeout,
        )  # fmt: skip

    @classmethod
    def from_bytes(cls, state: bytes) -> Negotiated:
        minor, flags, max_readahead, max_write, data, stack_depth, timeout = cls._LAYOUT.unpack(state)
        return cls(
            minor=minor, flags=flags, max_readahead=max_readahead, max_write=max_write, data=DATA_MODES[data],
            stack_depth=stack_depth, timeout=timeout,
        )  # fmt: skip

    def as_dict(self) -> dict[str, Any]:
        """For people and JSON: `unionfs status`."""
        return {
            "protocol": f"{abi.MAJOR}.{self.minor}",
            "flags": [name for name, bit in abi.INIT_FLAGS.items() if self.flags & bit],
            "max_readahead": self.max_readahead,
            "max_write": self.max_write,
            "timeout": self.timeout,
        }


class Refused(Exception):
    """The kernel speaks another major version: send `reply` and read the next INIT."""

    def __init__(self, reply: bytes, message: str) -> None:
        super().__init__(message)
        self.reply = reply


def negotiate(
    request: bytes, *, data: str = "auto", writeback: bool = False, stack_depth: int = 1, timeout: int | None = None,
    acl: bool = True, careful: bool = False,
) -> tuple[Negotiated, bytes]:
    """From an INIT request to the terms and the INIT reply. MountError where what was asked for can't be had."""
    _, opcode, unique, _ = abi.IN_HEAD.unpack_from(request)
    if opcode != abi.INIT:
        raise Refused(abi.OUT_HEADER.pack(16, -errno.EIO, unique), f"opcode {opcode} before INIT")
    major, minor, max_readahead, offered = abi.INIT_IN.unpack_from(request, abi.IN_HEADER_SIZE)
    if major > abi.MAJOR:  # the kernel asks again with our version
        reply = bytearray(abi.INIT_REPLY.size)
        abi.INIT_REPLY.pack_into(reply, 0, len(reply), 0, unique, abi.MAJOR, abi.MINOR, *(0,) * 11)
        raise Refused(bytes(reply), f"the kernel speaks FUSE {major}, we speak {abi.MAJOR}")
    if major < abi.MAJOR or minor < 23:
        raise MountError(f"kernel speaks FUSE protocol {major}.{minor}, at least 7.23 is needed", EXIT_FAILURE)
    if offered & abi.INIT_EXT:
        offered |= abi.U32.unpack_from(request, abi.IN_HEADER_SIZE + abi.INIT_IN.size)[0] << 32

    missing = [name for name in REQUIRED if not offered & abi.INIT_FLAGS[name]]
    if missing:
        raise MountError(f"kernel lacks FUSE features {', '.join(missing)}", EXIT_FAILURE)
    wanted = _bits(WANTED)
    if data == "auto":
        data = "noopen" if offered & abi.INIT_FLAGS["NO_OPEN_SUPPORT"] else "cached"
    if data == "noopen" and not offered & abi.INIT_FLAGS["NO_OPEN_SUPPORT"]:
        raise MountError("data=noopen: this kernel has no FUSE_NO_OPEN_SUPPORT; use data=cached", EXIT_FAILURE)
    if data == "passthrough":
        if writeback:
            raise MountError("data=passthrough and writeback exclude each other in the kernel", EXIT_USAGE)
        if not offered & abi.INIT_FLAGS["PASSTHROUGH"]:
            raise MountError(
                "data=passthrough: the kernel does not offer FUSE_PASSTHROUGH (Linux 6.9, CONFIG_FUSE_PASSTHROUGH)",
                EXIT_PERMISSION,
            )
        wanted |= abi.INIT_FLAGS["PASSTHROUGH"]
    elif data not in DATA_MODES:
        raise MountError(f"data={data}: not one of auto, {', '.join(DATA_MODES)}", EXIT_USAGE)
    if careful:
        wanted = wanted & ~_bits(CARELESS) | _bits(CAREFUL)
    if not acl:
        wanted &= ~abi.INIT_FLAGS["POSIX_ACL"]
    if writeback:
        wanted |= abi.INIT_FLAGS["WRITEBACK_CACHE"]

    flags = offered & wanted
    terms = Negotiated(
        minor=min(minor, abi.MINOR),
        flags=flags,
        max_readahead=max_readahead,
        max_write=MAX_PAGES * PAGE if flags & abi.INIT_FLAGS["MAX_PAGES"] else 32 * PAGE,
        data=data,
        stack_depth=stack_depth if data == "passthrough" else 0,
        timeout=FOREVER if timeout is None else timeout,
    )
    return terms, reply_to(unique, terms)


def _bits(names: tuple[str, ...]) -> int:
    return sum(abi.INIT_FLAGS[name] for name in names)


def reply_to(unique: int, terms: Negotiated) -> bytes:
    """The INIT reply. 64 requests in the background (the kernel's default is 12): read-ahead must not run dry."""
    return abi.INIT_REPLY.pack(
        abi.INIT_REPLY.size, 0, unique, abi.MAJOR, abi.MINOR, terms.max_readahead, terms.flags & 0xFFFFFFFF, 64, 48,
        terms.max_write, 1, terms.max_write // PAGE, 0, terms.flags >> 32, terms.stack_depth, 0,
    )  # fmt: skip
