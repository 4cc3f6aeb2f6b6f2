"""A scripted core and a scripted kernel for the wire tests: what was called with what, and bytes over a socket."""

from __future__ import annotations

import os
import socket
import struct
import threading
from collections.abc import Callable
from typing import Any

from unionfs.wire.handshake import Negotiated

# Every field its own value, so that two that are swapped show.
ATTR = (101, 102, 103, 104, 105, 106, 107, 108, 109, 0o100640, 111, 112, 113, 0x12345, 4096, 0)
ATTR_BYTES = struct.pack("<QQQqqqIIIIIIIIII", *ATTR)
ENTRY = (77, 5, ATTR)
VALID = 1 << 31
ENTRY_BYTES = struct.pack("<QQQQII", 77, 5, VALID, VALID, 0, 0) + ATTR_BYTES


class FakeOps:
    """Answers every operation by `results[name]` (called if it can be, raised if an exception) and records the call."""

    def __init__(self, **results: Any) -> None:
        self.lanes: Any = threading.local()
        self.calls: list[tuple[Any, ...]] = []
        self.results = results

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(*args: Any) -> Any:
            self.calls.append((name, *(bytes(a) if isinstance(a, memoryview) else a for a in args)))
            result = self.results.get(name)
            if isinstance(result, BaseException):
                raise result
            return result(*args) if callable(result) else result

        return call


def terms(**changes: Any) -> Negotiated:
    """The terms of a connection; by default those of a current kernel in noopen mode."""
    given: dict[str, Any] = {
        "minor": 45, "flags": 1 << 29, "max_readahead": 131072, "max_write": 1 << 20, "data": "noopen",
        "stack_depth": 0, "timeout": VALID,
    }  # fmt: skip
    return Negotiated(**given | changes)


def request(opcode: int, nodeid: int = 1, body: bytes = b"", unique: int = 42) -> bytes:
    """len, opcode, unique, nodeid, uid 1000, gid 100, pid 4242, no extensions; then the body."""
    return struct.pack("<IIQQIIIHH", 40 + len(body), opcode, unique, nodeid, 1000, 100, 4242, 0, 0) + body


def ok(payload: bytes = b"", unique: int = 42) -> bytes:
    return struct.pack("<IiQ", 16 + len(payload), 0, unique) + payload


def failed(error: int, unique: int = 42) -> bytes:
    return struct.pack("<IiQ", 16, -error, unique)


INIT_FLAGS = (1 << 31) - 1  # everything of the first word
INIT_FLAGS2 = 1 << 5 | 1 << 7  # PASSTHROUGH, HAS_RESEND


def init(major: int = 7, minor: int = 45, flags: int = INIT_FLAGS, flags2: int = INIT_FLAGS2, unique: int = 2) -> bytes:
    return request(26, 0, struct.pack("<IIIII44x", major, minor, 131072, flags, flags2), unique)


class Kernel:
    """The other end of a session's "device": a packet socket keeps messages apart, as /dev/fuse does."""

    def __init__(self) -> None:
        self.socket, device = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.settimeout(30)
        self.device = device.detach()

    def send(self, message: bytes) -> None:
        self.socket.send(message)

    def receive(self) -> bytes:
        return self.socket.recv(1 << 21)

    def ask(self, message: bytes) -> bytes:
        self.send(message)
        return self.receive()

    def silent(self) -> bool:
        """Nothing was sent. Exact after an `ask`, for what the dispatcher had to do before it."""
        self.socket.setblocking(False)
        try:
            self.socket.recv(1 << 21)
        except BlockingIOError:
            return True
        finally:
            self.socket.settimeout(30)
        return False

    def unmount(self) -> None:
        self.socket.close()

    def close(self) -> None:
        self.socket.close()
        os.close(self.device)
