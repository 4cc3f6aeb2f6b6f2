"""What happened in the store, for `GET /events`: a bounded memory that any thread adds to and any task follows.

A follower that reads too slowly misses the oldest events and is told how many; nobody ever waits for it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any

import trio

REMEMBERED = 1024


class Events:
    """Made and followed in the trio thread; `add` from any."""

    def __init__(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._lock = threading.Lock()
        self._events: deque[dict[str, Any]] = deque(maxlen=REMEMBERED)
        self._count = 0
        self._changed = trio.Event()
        self._closed = False

    def add(self, action: str, id: str, **attributes: str) -> None:
        with self._lock:
            self._count += 1
            self._events.append(
                {"number": self._count, "time": time.time(), "action": action, "id": id, "attributes": attributes}
            )
        try:
            self._token.run_sync_soon(self._wake, idempotent=True)
        except trio.RunFinishedError:  # a call that ends after the server has
            pass

    def _wake(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    def close(self) -> None:
        """Ends all followers, after what they have not seen yet."""
        self._closed = True
        self._wake()

    @property
    def count(self) -> int:
        return self._count

    async def follow(self, after: int, until: float | None = None) -> AsyncIterator[dict[str, Any]]:
        """Events with a number above `after`, then the new ones as they come, up to the time `until`."""
        while True:
            changed = self._changed
            with self._lock:
                fresh = [event for event in self._events if event["number"] > after]
            if fresh and (missed := fresh[0]["number"] - after - 1):
                yield {
                    "number": fresh[0]["number"] - 1,
                    "action": "missed",
                    "id": "",
                    "attributes": {"count": str(missed)},
                }
            for event in fresh:
                if until is not None and event["time"] > until:
                    return
                after = event["number"]
                yield event
            if self._closed:
                return
            if changed.is_set():
                continue
            if until is None:
                await changed.wait()
                continue
            with trio.move_on_after(max(0.0, until - time.time())) as scope:
                await changed.wait()
            if scope.cancelled_caught:
                return
