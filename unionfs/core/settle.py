"""Writing out, soon, what copy-ups have made.

A small copy is published before its data has blocks on disk. Were that left to the filesystem, a crash within the
next half minute could show an empty file where the lower had a full one. Starting the writeback inside the request
keeps the order strict, but binds copy-ups to the disk's rate of requests. So it is started a moment later, by a
thread of its own, for all that has come together until then. The thread exists from the first small copy-up on and
sleeps while there is nothing to do. Safe from any thread.
"""

from __future__ import annotations

import threading
from collections import deque
from time import sleep

from unionfs import sysio

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unionfs.core.base import OpenFile

DELAY = 0.01  # seconds: what a burst of copy-ups does in it is started together
LIMIT = 256  # descriptors held for it; beyond, the request that made the copy starts the writeback itself


class Settler:
    def __init__(self) -> None:
        self._pending: deque[OpenFile] = deque()
        self._some = threading.Event()
        self._thread: threading.Thread | None = None
        self._over = False

    def add(self, f: OpenFile) -> None:
        if len(self._pending) >= LIMIT:
            sysio.start_writeback(f.n)
            return
        self._pending.append(f)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="unionfs-settle", daemon=True)
            self._thread.start()
        self._some.set()

    def stop(self) -> None:
        """Returns when all is on its way to the disk."""
        self._over = True
        self._some.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._over:
            self._some.wait()
            sleep(DELAY)
            self._some.clear()
            self._start()
        self._start()  # what came between the last round and the end

    def _start(self) -> None:
        while self._pending:
            sysio.start_writeback(self._pending.popleft().n)
