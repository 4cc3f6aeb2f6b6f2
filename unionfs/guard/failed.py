"""A mount that has been given up: every request is answered EIO, at once, until it is unmounted."""

from __future__ import annotations

import errno

from unionfs.session import channel as wire_channel
from unionfs.wire import abi, dispatch

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any


class FailedSession:
    """Implements api.Session. Knows nothing of the layers."""

    def __init__(self, fd: int, reason: str, deaths: int) -> None:
        self._channel = wire_channel.Channel(fd)
        self._guard = {"deaths": deaths, "failed": reason}

    def serve(self, on_ready: Callable[[], None]) -> None:
        on_ready()
        self._channel.notify(wire_channel.resend())
        request = bytearray(2 << 20)
        while self._channel.receive([request]):
            _, opcode, unique, _ = abi.IN_HEAD.unpack_from(request)
            if opcode not in dispatch.NO_REPLY:
                failure = 0 if opcode == abi.DESTROY else errno.EIO
                self._channel.send(abi.OUT_HEADER.pack(16, -failure, unique))

    def stop(self) -> None:
        self._channel.stop()

    def statistics(self) -> dict[str, Any]:
        return {"session": "failed", "guard": self._guard}
