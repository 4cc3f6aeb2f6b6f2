"""Long work as an answer: JSON lines that tell how far it is, then its result or why it failed.

The status is 200 once the work has begun; the last line decides: `{"result": ...}` or `{"message", "status"}`.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from typing import Any

import anyio.to_thread
import trio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from unionfs.daemon.logs import LOG
from unionfs.store.api import StoreError
from unionfs.store.images import Progress

LINES = "application/x-ndjson"
_INTERVAL = 0.2  # seconds between two lines about the same thing


class WorkResponse(Response):
    """Runs `work(progress)` in a worker thread while it answers; a client that leaves does not stop it."""

    media_type = LINES

    def __init__(self, work: Callable[[Progress], Any]) -> None:
        super().__init__()
        del self.headers["content-length"]
        self._work = work
        self._lock = threading.Lock()
        self._news: dict[str, tuple[int, int]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        done = trio.Event()
        last: dict[str, Any] = {}

        async def work() -> None:
            nonlocal last
            last = await anyio.to_thread.run_sync(self._run)
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(work)
            while not done.is_set():
                with trio.move_on_after(_INTERVAL):
                    await done.wait()
                with self._lock:
                    news, self._news = self._news, {}
                for what, (count, total) in news.items():
                    await self._line(send, {"what": what, "done": count, "total": total})
        await self._line(send, last)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _run(self) -> dict[str, Any]:
        try:
            return {"result": self._work(self._note)}
        except StoreError as error:
            return {"message": str(error), "status": error.status}
        except Exception as error:
            LOG.exception("unexpected")
            return {"message": f"unexpected {type(error).__name__}: see the daemon's log", "status": 500}

    def _note(self, what: str, done: int, total: int) -> None:
        with self._lock:
            self._news[what] = (done, total)

    @staticmethod
    async def _line(send: Send, row: dict[str, Any]) -> None:
        body = json.dumps(row, separators=(",", ":")).encode("ascii") + b"\n"
        await send({"type": "http.response.body", "body": body, "more_body": True})
