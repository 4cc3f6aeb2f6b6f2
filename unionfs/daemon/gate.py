"""What every request passes before a route sees it: the version in its path, browsers, and the size of its body.

Pure ASGI. The socket has decided who may ask; here is decided what is no request of a client of this API at all.
"""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from unionfs.daemon.logs import LOG

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

VERSION = "v1"
LARGEST_BODY = 1 << 20  # bytes of a JSON body
# Bodies that are streamed to the store, whose limits are the store's.
_STREAMED = re.compile(r"/(images|images/import|layers/[^/]+/content)")
_VERSIONED = re.compile(r"/(v[0-9]+)(/.*)?")


class Gate:
    """`count(method, status)` is called with every answer."""

    def __init__(self, app: Application, count: Callable[[str, int], None]) -> None:
        self._app = app
        self._count = count

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # a websocket: nothing here speaks that
            await send({"type": "websocket.close", "code": 1003})
            return
        status = 500

        async def watch(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = _refusal(scope)
            if refusal is not None:
                await refusal(scope, receive, watch)
            elif _STREAMED.fullmatch(scope["path"]):
                await self._app(scope, receive, watch)
            else:
                await self._app(scope, _limited(receive), watch)
        finally:
            self._count(scope["method"], status)
            LOG.debug("%s %s: %d", scope["method"], scope["path"], status)


def _refusal(scope: Scope) -> JSONResponse | None:
    """Also takes the version off the path."""
    headers = dict(scope["headers"])
    if b"origin" in headers or b"sec-fetch-site" in headers:
        return JSONResponse({"message": "requests of web pages are not answered"}, 403)
    if match := _VERSIONED.fullmatch(scope["path"]):
        if match[1] != VERSION:
            return JSONResponse({"message": f"API version {match[1]}: this daemon speaks {VERSION}"}, 404)
        scope["path"] = match[2] or "/"
        scope["raw_path"] = scope["path"].encode()
    declared = headers.get(b"content-length", b"0")
    if not _STREAMED.fullmatch(scope["path"]) and int(declared) > LARGEST_BODY:
        return JSONResponse({"message": f"body of {int(declared)} bytes: {LARGEST_BODY} are taken"}, 413)
    return None


def _limited(receive: Receive) -> Receive:
    seen = 0

    async def counted() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > LARGEST_BODY:
            raise HTTPException(413, f"body larger than the {LARGEST_BODY} bytes that are taken")
        return message

    return counted
