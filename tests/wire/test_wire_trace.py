"""Tracing: one line each, for every opcode, whatever the bytes."""

from __future__ import annotations

import errno
import struct

import pytest
from test_wire_dispatch import ROWS
from wire_fakes import ATTR_BYTES, ENTRY_BYTES, VALID, failed, init, ok, request

from unionfs.wire import trace


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (request(1, 7, b"a\nb\xff\0"), r"#42 LOOKUP nodeid=7 uid=1000 gid=100 pid=4242 b'a\nb\xff'"),
        (request(9, 7, struct.pack("<II", 0o755, 0o22) + b"d\0"), "mode=755 umask=22 b'd'"),
        (request(45, 7, struct.pack("<QII", 8, 1, 0) + b"x\0y\0"), "newdir=8 flags=0x1 b'x' b'y'"),
        (request(16, 7, struct.pack("<QQIIQII", 0, 512, 3, 4, 0, 0, 0) + b"abc"), "offset=512 size=3 flags=0x4"),
        (request(1, 7, b"n" * 255 + b"\0"), "'+191"),
        (init(), "#2 INIT nodeid=0 uid=1000 gid=100 pid=4242 major=7 minor=45 max_readahead=131072 flags=0x7fffffff"),
        (request(4000), "#42 opcode 4000 nodeid=1"),
    ],
)
def test_request(message: bytes, line: str) -> None:
    said = trace.request(message)
    assert line in said and "\n" not in said


@pytest.mark.parametrize(
    ("opcode", "message", "line"),
    [
        (1, ok(ENTRY_BYTES), f"#42 LOOKUP -> nodeid=77 mode=100640 nlink=111 for {VALID} s"),
        (1, ok(struct.pack("<QQQ", 0, 0, 9) + bytes(104)), "#42 LOOKUP -> no such entry, for 9 s"),
        (3, ok(bytes(16) + ATTR_BYTES), "#42 GETATTR -> ino=101 size=102 mode=100640 nlink=111"),
        (14, ok(struct.pack("<QIi", 7, 0x80, 3)), "#42 OPEN -> flags=0x80 backing=3"),
        (10, failed(errno.ENOTEMPTY), "#42 UNLINK -> ENOTEMPTY (39)"),
        (15, ok(b"12345"), "#42 READ -> 5 bytes"),
    ],
)
def test_reply(opcode: int, message: bytes, line: str) -> None:
    assert trace.reply(opcode, message) == line


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row[1]}-{ROWS.index(row)}")
def test_every_opcode_can_be_traced(row: tuple[int, str, bytes, object, object, bytes | None]) -> None:
    opcode, name, body, _, _, reply = row
    assert name in trace.request(request(opcode, 7, body))
    if reply is not None:
        assert trace.reply(opcode, reply).startswith(f"#42 {name} -> ")
