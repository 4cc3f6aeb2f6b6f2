"""Between the event loop and calls that block: a request's body as a file, an iterator of bytes as an answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import chain
from typing import Any

import anyio.from_thread
import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse


class BodyReader:
    """A request's body for a worker thread: `read(size)` waits in the loop. Holds one chunk, never the whole."""

    def __init__(self, request: Request) -> None:
        self._chunks = request.stream()
        self._rest = b""

    def read(self, size: int = -1, /) -> bytes:
        if size < 0:
            raise ValueError("a body is read in pieces")
        while not self._rest:
            try:
                self._rest = anyio.from_thread.run(self._next)
            except EOFError:
                return b""
        part, self._rest = self._rest[:size], self._rest[size:]
        return part

    async def _next(self) -> bytes:
        async for chunk in self._chunks:
            return chunk
        raise EOFError


async def download(make: Callable[[], Iterator[bytes]], media_type: str) -> Response:
    """Answers with what an iterator yields; what fails before its first bytes still becomes a status.

    A failure later ends the connection without the last chunk, which every HTTP client notices.
    """

    def begin() -> tuple[bytes, Iterator[bytes]]:
        iterator = iter(make())
        return next(iterator, b""), iterator

    first, rest = await anyio.to_thread.run_sync(begin)
    return StreamingResponse(chain((first,), rest), media_type=media_type)


class AsciiJSON(Response):
    """JSON for names that are not UTF-8: lone surrogates, escaped."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":")).encode("ascii")


async def lines(rows: AsyncIterator[dict[str, Any]]) -> AsyncIterator[bytes]:
    """One JSON text a line."""
    async for row in rows:
        yield json.dumps(row, separators=(",", ":")).encode("ascii") + b"\n"
