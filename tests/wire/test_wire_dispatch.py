"""Every opcode: these request bytes make this call of the core and these reply bytes."""

from __future__ import annotations

import errno
import os
import struct
from typing import Any

import pytest
from wire_fakes import ATTR, ATTR_BYTES, ENTRY, ENTRY_BYTES, VALID, FakeOps, failed, ok, request, terms

from unionfs.errors import WouldBlock
from unionfs.wire import dispatch
from unionfs.wire.dispatch import Dispatcher, Opens

ENOSYS = failed(errno.ENOSYS)
ATTR_OUT = struct.pack("<QII", VALID, 0, 0) + ATTR_BYTES
CREATE_BODY = struct.pack("<IIII", 0o102, 0o100666, 0o22, 0)
COPY_BODY = struct.pack("<QQQQQQQ", 0, 1 << 40, 9, 0, 5, 1 << 20, 0)
READ_BODY = struct.pack("<QQIIQII", 0, 1 << 33, 4096, 0, 0, 0, 0)
FSYNC_BODY = struct.pack("<QII", 0, 1, 0)
XATTR_BODY = struct.pack("<IIII", 3, 1, 1, 0) + b"user.a\0xyz"


class FakeOpens:
    def __init__(self, ops: FakeOps) -> None:
        self.ops = ops

    def opened(self, nodeid: int, flags: int) -> tuple[int, int]:
        self.ops.opened(nodeid, flags)
        return 0x22, 0

    def created(self, nodeid: int, flags: int) -> tuple[int, int]:
        self.ops.created(nodeid, flags)
        return 0x80, 3

    def released(self, nodeid: int) -> None:
        self.ops.released(nodeid)


def answer(
    ops: FakeOps, message: bytes, *, data: str = "noopen", fast: bool = True, opens: Opens | None = None, **changes: Any
) -> bytes | None:
    dispatcher = Dispatcher(ops, terms(data=data, **changes), opens or FakeOpens(ops), fast=fast)
    dispatcher.load(message)
    _, opcode, unique, nodeid = struct.unpack_from("<IIQQ", message)
    reply = dispatcher.answer(opcode, unique, nodeid, len(message))
    return None if reply is None else bytes(reply)


def fill(_nodeid: int, _offset: int, buffer: memoryview) -> int:
    buffer[:5] = b"hello"
    return 5


# opcode, name, body, the core's result, the call expected, the reply expected
ROWS: list[tuple[int, str, bytes, Any, tuple[Any, ...] | None, bytes | None]] = [
    (1, "LOOKUP", b"name\0", ENTRY, ("lookup", 7, b"name"), ok(ENTRY_BYTES)),
    (1, "LOOKUP", b"\xff\xfe\0", None, ("lookup", 7, b"\xff\xfe"),
     ok(struct.pack("<QQQQ", 0, 0, VALID, VALID) + bytes(96))),
    (2, "FORGET", struct.pack("<Q", 3), None, ("forget", 7, 3), None),
    (3, "GETATTR", bytes(16), ATTR, ("getattr", 7), ok(ATTR_OUT)),
    (5, "READLINK", b"", b"../target", ("readlink", 7), ok(b"../target")),
    (6, "SYMLINK", b"name\0../target\0", ENTRY, ("symlink", 7, b"name", b"../target", 1000, 100), ok(ENTRY_BYTES)),
    (8, "MKNOD", struct.pack("<IIII", 0o20666, 0x103, 0o22, 0) + b"null\0", ENTRY,
     ("mknod", 7, b"null", 0o20666, 0x103, 0o22, 1000, 100), ok(ENTRY_BYTES)),
    (9, "MKDIR", struct.pack("<II", 0o777, 0o27) + b"d\0", ENTRY, ("mkdir", 7, b"d", 0o777, 0o27, 1000, 100),
     ok(ENTRY_BYTES)),
    (10, "UNLINK", b"name\0", None, ("unlink", 7, b"name"), ok()),
    (11, "RMDIR", b"name\0", None, ("rmdir", 7, b"name"), ok()),
    (12, "RENAME", struct.pack("<Q", 8) + b"old\0new\0", None, ("rename", 7, b"old", 8, b"new", 0), ok()),
    (13, "LINK", struct.pack("<Q", 9) + b"name\0", ENTRY, ("link", 9, 7, b"name"), ok(ENTRY_BYTES)),
    (14, "OPEN", struct.pack("<II", 0o2, 0), None, None, ENOSYS),
    (15, "READ", READ_BODY, fill, ("read", 7, 1 << 33, bytes(4096)), ok(b"hello")),
    (16, "WRITE", struct.pack("<QQIIQII", 0, 1 << 33, 5, 0, 0, 0, 0) + b"hello", 5,
     ("write", 7, 1 << 33, b"hello", False), ok(struct.pack("<II", 5, 0))),
    (16, "WRITE", struct.pack("<QQIIQII", 0, 0, 3, 4, 0, 0, 0) + b"abc", 3, ("write", 7, 0, b"abc", True),
     ok(struct.pack("<II", 3, 0))),
    (17, "STATFS", b"", (1, 2, 3, 4, 5, 4096, 255, 512), ("statfs",),
     ok(struct.pack("<QQQQQIII", 1, 2, 3, 4, 5, 4096, 255, 512) + bytes(28))),
    (18, "RELEASE", struct.pack("<QIIQ", 7, 0, 0, 0), None, ("released", 7), ok()),
    (20, "FSYNC", FSYNC_BODY, None, ("fsync", 7, True), ok()),
    (20, "FSYNC", bytes(16), None, ("fsync", 7, False), ok()),
    (21, "SETXATTR", XATTR_BODY, None, ("setxattr", 7, b"user.a", b"xyz", 1, True), ok()),
    (22, "GETXATTR", struct.pack("<II", 0, 0) + b"user.a\0", b"value", ("getxattr", 7, b"user.a"),
     ok(struct.pack("<II", 5, 0))),
    (22, "GETXATTR", struct.pack("<II", 5, 0) + b"user.a\0", b"value", ("getxattr", 7, b"user.a"), ok(b"value")),
    (22, "GETXATTR", struct.pack("<II", 4, 0) + b"user.a\0", b"value", ("getxattr", 7, b"user.a"),
     failed(errno.ERANGE)),
    (23, "LISTXATTR", struct.pack("<II", 0, 0), [b"user.a", b"user.b"], ("listxattr", 7, 1000),
     ok(struct.pack("<II", 14, 0))),
    (23, "LISTXATTR", struct.pack("<II", 64, 0), [b"user.a", b"user.b"], ("listxattr", 7, 1000),
     ok(b"user.a\0user.b\0")),
    (23, "LISTXATTR", struct.pack("<II", 13, 0), [b"user.a", b"user.b"], ("listxattr", 7, 1000), failed(errno.ERANGE)),
    (24, "REMOVEXATTR", b"user.a\0", None, ("removexattr", 7, b"user.a"), ok()),
    (25, "FLUSH", bytes(24), None, None, ENOSYS),
    (27, "OPENDIR", bytes(8), None, None, ENOSYS),
    (28, "READDIR", struct.pack("<QQIIQII", 0, 2, 4096, 0, 0, 0, 0), [(b"name", 3, 55, 0o40755)],
     ("readdir", 7, 2, 4096, 24), ok(struct.pack("<QQII", 55, 3, 4, 4) + b"name\0\0\0\0")),
    (29, "RELEASEDIR", bytes(24), None, None, ok()),
    (30, "FSYNCDIR", bytes(16), None, ("fsyncdir", 7, False), ok()),
    (31, "GETLK", bytes(48), None, None, ENOSYS),
    (32, "SETLK", bytes(48), None, None, ENOSYS),
    (33, "SETLKW", bytes(48), None, None, ENOSYS),
    (34, "ACCESS", bytes(8), None, None, ENOSYS),
    (35, "CREATE", CREATE_BODY + b"name\0", None, None, ENOSYS),
    (37, "BMAP", bytes(16), None, None, ENOSYS),
    (38, "DESTROY", b"", None, None, ok()),
    (40, "POLL", bytes(24), None, None, ENOSYS),
    (42, "BATCH_FORGET", struct.pack("<II", 1, 0) + struct.pack("<QQ", 8, 2), None, ("forget", 8, 2), None),
    (43, "FALLOCATE", struct.pack("<QQQII", 0, 1 << 40, 4096, 3, 0), None, ("fallocate", 7, 3, 1 << 40, 4096), ok()),
    (44, "READDIRPLUS", struct.pack("<QQIIQII", 0, 5, 8192, 0, 0, 0, 0), [(b"name5678", 6, ENTRY)],
     ("readdirplus", 7, 5, 8192, 152), ok(ENTRY_BYTES + struct.pack("<QQII", 101, 6, 8, 8) + b"name5678")),
    (45, "RENAME2", struct.pack("<QII", 8, 5, 0) + b"old\0new\0", None, ("rename", 7, b"old", 8, b"new", 5), ok()),
    (46, "LSEEK", struct.pack("<QQII", 0, 1 << 40, os.SEEK_HOLE, 0), 1 << 41, ("lseek", 7, 1 << 40, os.SEEK_HOLE),
     ok(struct.pack("<Q", 1 << 41))),
    (47, "COPY_FILE_RANGE", COPY_BODY, 4096, ("copy_file_range", 7, 1 << 40, 9, 5, 1 << 20, 0),
     ok(struct.pack("<II", 4096, 0))),
    (50, "SYNCFS", bytes(8), None, ("syncfs",), ok()),
    (51, "TMPFILE", CREATE_BODY + b"/\0", ENTRY, ("tmpfile", 7, 0o102, 0o100666, 0o22, 1000, 100),
     ok(ENTRY_BYTES + struct.pack("<QIi", 77, 0x80, 3))),
    (53, "COPY_FILE_RANGE_64", COPY_BODY, 4096, ("copy_file_range", 7, 1 << 40, 9, 5, 1 << 20, 0),
     ok(struct.pack("<Q", 4096))),
]  # fmt: skip
# Several calls or a longer story: each has a test of its own below.
ELSEWHERE = {"SETATTR", "IOCTL", "STATX", "INIT", "INTERRUPT", "NOTIFY_REPLY"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[1]}-{ROWS.index(row)}")
def test_opcode(row: tuple[int, str, bytes, Any, tuple[Any, ...] | None, bytes | None]) -> None:
    opcode, name, body, result, call, reply = row
    assert dispatch.NAMES[opcode] == name
    ops = FakeOps(**{call[0]: result} if call else {})
    assert answer(ops, request(opcode, 7, body)) == reply
    assert ops.calls[:1] == ([call] if call else [])


def test_every_opcode_is_tested() -> None:
    assert {row[1] for row in ROWS} | ELSEWHERE == set(dispatch.NAMES.values())
    assert len(dispatch.NAMES) == len(dispatch.OPCODES)


def test_literal_bytes() -> None:
    """One exchange as it is on the wire, without struct: LOOKUP of "a" in node 1, and the answer that there is none."""
    lookup = bytes.fromhex(
        "2a000000" "01000000" "2a00000000000000" "0100000000000000" "e8030000" "64000000" "92100000" "00000000" "6100"
    )  # fmt: skip
    assert lookup == request(1, 1, b"a\0")
    absent = "90000000" "00000000" "2a00000000000000" "0000000000000000" "0000000000000000" + "0000008000000000" * 2
    assert answer(FakeOps(), lookup) == bytes.fromhex(absent) + bytes(96)


def test_negative_entry_is_not_stale() -> None:
    """The negative reply is a shared buffer: it carries the unique of its own request."""
    ops = FakeOps(lookup=None)
    dispatcher = Dispatcher(ops, terms(), FakeOpens(ops), fast=True)
    for unique in (5, 1 << 63 | 6):
        message = request(1, 1, b"x\0", unique)
        dispatcher.load(message)
        reply = dispatcher.answer(1, unique, 1, len(message))
        assert reply is not None and struct.unpack_from("<IiQQ", reply) == (144, 0, unique, 0)


def test_timeout_option() -> None:
    reply = answer(FakeOps(getattr=ATTR), request(3, 1, bytes(16)), timeout=3)
    assert reply == ok(struct.pack("<QII", 3, 0, 0) + ATTR_BYTES)


# --- layers that others change too ------------------------------------------------------------------------------------

CAREFUL = 1 << 12  # FUSE_AUTO_INVAL_DATA


def carefully(ops: FakeOps, message: bytes) -> bytes:
    given = terms(flags=CAREFUL | 1 << 29)
    dispatcher = dispatch.dispatcher(ops, given, FakeOpens(ops), fast=True)
    dispatcher.load(message)
    _, opcode, unique, nodeid = struct.unpack_from("<IIQQ", message)
    reply = dispatcher.answer(opcode, unique, nodeid, len(message))
    assert reply is not None
    return bytes(reply)


@pytest.mark.parametrize("of_parent, of_child", [(True, True), (True, False), (False, True), (False, False)])
def test_what_the_kernel_may_keep(of_parent: bool, of_child: bool) -> None:
    """A name for as long as its directory is watched, attributes for as long as the node is too; asked before the
    operation (of the parent) and after it (of what was found)."""
    ops = FakeOps(watch=of_parent, watched=of_child, lookup=ENTRY, getattr=ATTR)
    name, node = VALID if of_parent else 0, VALID if of_parent and of_child else 0
    assert carefully(ops, request(1, 7, b"n\0")) == ok(struct.pack("<QQQQII", 77, 5, name, node, 0, 0) + ATTR_BYTES)
    assert [call[:2] for call in ops.calls] == [("watch", 7), ("lookup", 7), ("watched", 77)]
    assert carefully(ops, request(3, 7, bytes(16))) == ok(struct.pack("<QII", name, 0, 0) + ATTR_BYTES)


def test_absences_and_listings_of_unwatched_directories() -> None:
    watched, unwatched = FakeOps(watch=True, lookup=None), FakeOps(watch=False, lookup=None)
    assert carefully(unwatched, request(1, 7, b"n\0")) == failed(errno.ENOENT)
    assert struct.unpack_from("<QQQQ", carefully(watched, request(1, 7, b"n\0")), 16) == (0, 0, VALID, VALID)
    cached = 1 << 1 | 1 << 3  # FOPEN_KEEP_CACHE, FOPEN_CACHE_DIR
    assert carefully(watched, request(27, 7, bytes(8))) == ok(struct.pack("<QII", 7, cached, 0))
    assert carefully(unwatched, request(27, 7, bytes(8))) == ok(struct.pack("<QII", 7, 0, 0))


def test_an_error_of_watching_is_no_error() -> None:
    ops = FakeOps(watch=OSError(errno.ESTALE, "gone"), getattr=ATTR)
    assert carefully(ops, request(3, 7, bytes(16))) == ok(bytes(16) + ATTR_BYTES)
    with pytest.raises(WouldBlock):
        carefully(FakeOps(watch=WouldBlock()), request(3, 7, bytes(16)))


# --- SETATTR ----------------------------------------------------------------------------------------------------------


def setattr_body(valid: int, **f: int) -> bytes:
    return struct.pack(
        "<IIQQQqqqIIIIIIII", valid, 0, 0, f.get("size", 0), 0, f.get("atime", 0), f.get("mtime", 0), 0,
        f.get("atime_ns", 0), f.get("mtime_ns", 0), 0, f.get("mode", 0), 0, f.get("uid", 0), f.get("gid", 0), 0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (setattr_body(0), {"kill_suidgid": True}),
        (setattr_body(1 << 11), {"kill_suidgid": True}),
        (setattr_body(1, mode=0o100644), {"mode": 0o100644}),
        (setattr_body(2 | 4 | 1 << 11, uid=1, gid=2), {"uid": 1, "gid": 2, "kill_suidgid": True}),
        (setattr_body(8 | 1 << 6 | 1 << 9, size=1 << 40), {"size": 1 << 40}),
        (setattr_body(8), {"size": 0}),
        (setattr_body(16, atime=-2, atime_ns=5), {"atime_ns": -2 * 10**9 + 5}),
        (setattr_body(32, mtime=1, mtime_ns=999_999_999), {"mtime_ns": 1_999_999_999}),
        (setattr_body(16 | 32 | 1 << 7 | 1 << 8, atime=9, mtime=9), {"atime_ns": -1, "mtime_ns": -1}),
        (setattr_body(16, atime=-1, atime_ns=999_999_999), {"atime_ns": 0}),
        (setattr_body(1 << 10), {}),
    ],
)
def test_setattr(body: bytes, expected: dict[str, Any]) -> None:
    ops = FakeOps(setattr=ATTR)
    assert answer(ops, request(4, 7, body)) == ok(ATTR_OUT)
    name, nodeid, changes = ops.calls[0]
    assert (name, nodeid) == ("setattr", 7)
    nothing = dict.fromkeys(("size", "mode", "uid", "gid", "atime_ns", "mtime_ns")) | {"kill_suidgid": False}
    assert {field: getattr(changes, field) for field in changes.__slots__} == nothing | expected


@pytest.mark.parametrize(
    ("uid", "data", "valid", "kill"),
    [(1000, "passthrough", 1 << 6, True), (0, "passthrough", 0, False), (1000, "cached", 0, True),
     (1000, "passthrough", 1, False)],
)  # fmt: skip
def test_empty_setattr_before_what_drops_privileges(uid: int, data: str, valid: int, kill: bool) -> None:
    ops = FakeOps(setattr=ATTR)
    message = bytearray(request(4, 7, setattr_body(valid)))
    struct.pack_into("<I", message, 24, uid)
    assert answer(ops, bytes(message), data=data) == ok(ATTR_OUT)
    assert ops.calls[0][2].kill_suidgid is kill


# --- STATX, IOCTL, listings -------------------------------------------------------------------------------------------


def test_statx() -> None:
    major, minor = 0xABC, 0x12345
    rdev = minor & 0xFF | major << 8 | (minor & 0xFFF00) << 12
    ops = FakeOps(getattr=(*ATTR[:13], rdev, *ATTR[14:]), birth_time=(11, 12))
    reply = answer(ops, request(52, 7, bytes(24)))
    assert reply is not None and len(reply) == 304 and struct.unpack_from("<Ii", reply) == (304, 0)
    assert struct.unpack_from("<QII", reply, 16) == (VALID, 0, 0)
    stat = reply[48:]
    assert struct.unpack_from("<IIQIIIH", stat) == (0xFFF, 4096, 0, 111, 112, 113, 0o100640)
    assert struct.unpack_from("<QQQQ", stat, 32) == (101, 102, 103, 0)
    times = [struct.unpack_from("<qI", stat, 64 + 16 * index) for index in range(4)]
    assert times == [(104, 107), (11, 12), (106, 109), (105, 108)]  # atime, btime, ctime, mtime
    assert struct.unpack_from("<II", stat, 128) == (major, minor)


def test_statx_without_birth_time() -> None:
    reply = answer(FakeOps(getattr=ATTR, birth_time=None), request(52, 7, bytes(24)))
    assert reply is not None and struct.unpack_from("<I", reply, 48) == (0x7FF,)


def ioctl(command: int, data: bytes = b"", out_size: int = 0, flags: int = 0) -> bytes:
    return request(39, 7, struct.pack("<QIIQII", 0, flags, command, 0, len(data), out_size) + data)


def ioctl_ok(data: bytes = b"") -> bytes:
    return ok(bytes(16) + data)


def test_ioctl() -> None:
    ops = FakeOps(ioctl_getflags=0x80030)
    assert answer(ops, ioctl(0x80086601, out_size=4)) == ioctl_ok(struct.pack("<I", 0x80030))
    assert answer(ops, ioctl(0x80086601, out_size=8)) == ioctl_ok(struct.pack("<Q", 0x80030))
    assert answer(ops, ioctl(0x801C581F, out_size=28)) == ioctl_ok(struct.pack("<I", 0x18) + bytes(24))
    ops.calls.clear()
    assert answer(ops, ioctl(0x40086602, struct.pack("<I", 0x40))) == ioctl_ok()
    assert answer(ops, ioctl(0x401C5820, struct.pack("<IIIII8x", 0x80, 0, 0, 0, 0))) == ioctl_ok()
    assert ops.calls == [("ioctl_setflags", 7, 0x40), ("ioctl_getflags", 7), ("ioctl_setflags", 7, 0x80040)]
    assert answer(ops, ioctl(0x401C5820, struct.pack("<IIIII8x", 0, 0, 0, 5, 0))) == failed(errno.EOPNOTSUPP)
    assert answer(ops, ioctl(0x5401, out_size=60)) == failed(errno.ENOTTY)


def test_listing_from_the_start() -> None:
    def names(_nodeid: int, cookie: int, size: int, overhead: int) -> list[Any]:
        assert (cookie, size, overhead) == (2, 4096 - 2 * 160, 152)
        return [(b"sixteen-byte-nam", 1 << 62, ENTRY), (b"a", 3, ENTRY)]

    ops = FakeOps(getattr=ATTR, readdirplus=names)
    dots = b"".join(
        bytes(128) + struct.pack("<QQII", ino, cookie, len(name), 4) + name.ljust(8, b"\0")
        for ino, cookie, name in ((101, 1, b"."), (0xFFFFFFFF, 2, b".."))
    )
    first = ENTRY_BYTES + struct.pack("<QQII", 101, 1 << 62, 16, 8) + b"sixteen-byte-nam"
    second = ENTRY_BYTES + struct.pack("<QQII", 101, 3, 1, 8) + b"a".ljust(8, b"\0")
    body = struct.pack("<QQIIQII", 0, 0, 4096, 0, 0, 0, 0)
    assert answer(ops, request(44, 7, body)) == ok(dots + first + second)


def test_plain_listing_resumes_between_the_dots() -> None:
    ops = FakeOps(getattr=ATTR, readdir=[(b"n", 3, 9, 0o120777)])
    record = struct.pack("<QQII", 101, 2, 2, 4) + b"..".ljust(8, b"\0")
    name = struct.pack("<QQII", 9, 3, 1, 10) + b"n".ljust(8, b"\0")
    body = struct.pack("<QQIIQII", 0, 1, 512, 0, 0, 0, 0)
    assert answer(ops, request(28, 1, body)) == ok(record + name)
    assert ops.calls[-1] == ("readdir", 1, 2, 512 - 32, 24)


def test_batch_forget() -> None:
    ops = FakeOps()
    pairs = [(8, 1), (9, 1 << 40), (10, 3)]
    body = struct.pack("<II", 3, 0) + b"".join(struct.pack("<QQ", *pair) for pair in pairs)
    assert answer(ops, request(42, 0, body)) is None
    assert ops.calls == [("forget", *pair) for pair in pairs]


# --- data modes, lanes, errors ----------------------------------------------------------------------------------------


def test_open_and_create_in_cached_mode() -> None:
    ops = FakeOps(create=ENTRY)
    opened = ok(struct.pack("<QIi", 7, 0x22, 0))
    assert answer(ops, request(14, 7, struct.pack("<II", 0o1002, 0)), data="cached") == opened
    assert answer(ops, request(35, 7, CREATE_BODY + b"name\0"), data="cached") == ok(
        ENTRY_BYTES + struct.pack("<QIi", 77, 0x80, 3)
    )
    assert ops.calls == [
        ("opened", 7, 0o1002),
        ("create", 7, b"name", 0o102, 0o100666, 0o22, 1000, 100),
        ("created", 77, 0o102),
    ]


def test_setxattr_of_an_old_kernel() -> None:
    ops = FakeOps()
    body = struct.pack("<II", 3, 2) + b"user.a\0xyz"
    assert answer(ops, request(21, 7, body), flags=0) == ok()
    assert ops.calls == [("setxattr", 7, b"user.a", b"xyz", 2, False)]


def test_big_copy_is_for_the_slow_lane() -> None:
    body = struct.pack("<QQQQQQQ", 0, 0, 9, 0, 0, (1 << 63) - 1, 0)
    ops = FakeOps(copy_file_range=1)
    with pytest.raises(WouldBlock):
        answer(ops, request(53, 7, body))
    assert ops.calls == []
    assert answer(ops, request(53, 7, body), fast=False) == ok(struct.pack("<Q", 1))
    assert answer(ops, request(47, 7, body), fast=False) == ok(struct.pack("<II", 1, 0))
    assert [call[5] for call in ops.calls] == [(1 << 63) - 4096, 0xFFFFF000]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "full"), errno.ENOSPC),
        (FileNotFoundError(errno.ENOENT, "gone"), errno.ENOENT),
        (OSError("no errno"), errno.EIO),
        (OSError(5000, "not an errno"), errno.EIO),
    ],
)
def test_oserror_is_its_errno(error: OSError, expected: int, capfd: pytest.CaptureFixture[str]) -> None:
    for opcode, body in ((1, b"x\0"), (16, struct.pack("<QQIIQII", 0, 0, 1, 0, 0, 0, 0) + b"x")):
        assert answer(FakeOps(lookup=error, write=error), request(opcode, 7, body)) == failed(expected)
    assert capfd.readouterr().err == ""


def test_bug_is_a_traceback_and_eio(capfd: pytest.CaptureFixture[str]) -> None:
    assert answer(FakeOps(lookup=KeyError("boom")), request(1, 7, b"x\0")) == failed(errno.EIO)
    said = capfd.readouterr().err
    assert "LOOKUP of node 7" in said and "KeyError: 'boom'" in said and "Traceback" in said


@pytest.mark.parametrize("error", [OSError(errno.ESTALE, "stale"), KeyError(9)])
def test_no_error_is_a_reply_to_forget(error: Exception, capfd: pytest.CaptureFixture[str]) -> None:
    assert answer(FakeOps(forget=error), request(2, 7, struct.pack("<Q", 1))) is None
    assert "FORGET" in capfd.readouterr().err


def test_would_block_reaches_the_session() -> None:
    with pytest.raises(WouldBlock):
        answer(FakeOps(getattr=WouldBlock()), request(3, 7, bytes(16)))


def test_unknown_opcode(capfd: pytest.CaptureFixture[str]) -> None:
    assert answer(FakeOps(), request(4095, 7)) == ENOSYS
    assert capfd.readouterr().err == ""
