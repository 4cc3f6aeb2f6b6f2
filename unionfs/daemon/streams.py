"""Between the event loop and calls that block: a request's body as a file, an iterator of bytes as an answer."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from itertools import chain
from typing import Any, TypeVar

import anyio.to_thread
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from unionfs.engines.graphdriver import Body, coalesced
from unionfs.store.api import Readable

T = TypeVar("T")
TAR = "application/x-tar"
# For OpenAPI: routes that take an archive read it themselves.
TAKES_TAR: dict[str, Any] = {
    "requestBody": {"required": True, "content": {TAR: {"schema": {"type": "string", "format": "binary"}}}}
}


async def upload(request: Request, work: Callable[[Readable], T]) -> T:
    """What `work` makes of a request's body, which it reads in a worker thread as it comes."""
    body = Body(request.stream())
    result = await anyio.to_thread.run_sync(work, body)
    async for _ in body.rest():  # padding after an archive's end: unread it would cut the connection
        pass
    return result


async def download(make: Callable[[], Iterator[bytes]], media_type: str) -> Response:
    """Answers with what an iterator yields; what fails before its first bytes still becomes a status.

    A failure later ends the connection without the last chunk, which every HTTP client notices.
    """

    def begin() -> tuple[bytes, Iterator[bytes]]:
        iterator = coalesced(make())
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
