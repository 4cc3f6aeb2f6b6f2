"""The dispatcher of a worker that can be replaced: it notes in its lane what the disk alone would not tell a successor.

For an xattr: whether it was there before. For a swap of two names: what was at the first. For an open file in the
passthrough mode: how often it was open. One dispatcher belongs to one thread.
"""

from __future__ import annotations

from unionfs.sysio import RENAME_EXCHANGE
from unionfs.wire import abi, dispatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from unionfs.core.ops import UnionOperations
    from unionfs.guard.journal import LaneBuffers
    from unionfs.wire.handshake import Negotiated

XATTRS = frozenset((abi.SETXATTR, abi.REMOVEXATTR))
NUMBER = abi.UNIQUE_RESEND - 1  # the bits of a request's number that stay when it is sent again
ABSENT, PRESENT = 1, 2  # what a lane notes of an xattr


class GuardedDispatcher(dispatch.Dispatcher):
    """Notes in its lane what decides whether a request has happened, where the disk alone would not tell."""

    __slots__ = ("_core", "lane", "setxattr_start")

    def __init__(self, core: UnionOperations, ops: Any, terms: Negotiated, opens: Any, lane: LaneBuffers, fast: bool):
        super().__init__(ops, terms, opens, fast=fast)
        self._core = core
        self.lane = lane
        self.setxattr_start = 56 if terms.has("SETXATTR_EXT") else 48
        for opcode in (*XATTRS, abi.RENAME2):
            self.handlers[opcode] = self._noting(opcode, self.handlers[opcode])
        if terms.data == "passthrough":
            for opcode in (abi.OPEN, abi.RELEASE):
                self.handlers[opcode] = self._counting(opcode, self.handlers[opcode])

    def _noting(self, opcode: int, handler: Callable[[int, int, int], Any]) -> Callable[[int, int, int], Any]:
        def run(unique: int, nodeid: int, size: int) -> Any:
            prior = self._prior(opcode, nodeid, size)
            if prior is not None:
                self.lane.note(unique & NUMBER, prior)
            return handler(unique, nodeid, size)

        return run

    def _counting(self, opcode: int, handler: Callable[[int, int, int], Any]) -> Callable[[int, int, int], Any]:
        def run(unique: int, nodeid: int, size: int) -> Any:
            self.lane.note(unique & NUMBER, self.opens.count(nodeid))  # type: ignore[attr-defined]
            return handler(unique, nodeid, size)

        return run

    def _prior(self, opcode: int, nodeid: int, size: int) -> int | None:
        if opcode == abi.RENAME2:
            _, flags, name, _ = rename_words(opcode, self.view[:size])
            return self._core._child(self._core._dir(nodeid), name).ino if flags & RENAME_EXCHANGE else None
        if opcode == abi.SETXATTR:
            if not abi.U32.unpack_from(self.request, 44)[0]:
                return None
            start = self.setxattr_start
        else:
            start = 40
        name = self.view[start:size].tobytes().partition(b"\0")[0]
        return PRESENT if has_xattr(self._core, nodeid, name) else ABSENT


def rename_words(opcode: int, request: bytes | memoryview) -> tuple[int, int, bytes, bytes]:
    """(new parent, flags, name, new name)."""
    if opcode == abi.RENAME:
        (newparent,), flags, start = abi.U64.unpack_from(request, 40), 0, 48
    else:
        (newparent, flags, _), start = abi.RENAME2_IN.unpack_from(request, 40), 56
    name, newname, _ = bytes(request[start:]).split(b"\0", 2)
    return newparent, flags, name, newname


def has_xattr(ops: UnionOperations, nodeid: int, name: bytes) -> bool:
    try:
        ops.getxattr(nodeid, name)
    except OSError:
        return False
    return True
