"""A lane of threads for what may wait: made when first needed, asleep in a queue when not.

Jobs are bytes under a number (a request and its `unique`). A job that no thread has begun can be taken back.
"""

from __future__ import annotations

import threading
from _queue import SimpleQueue  # the module `queue` costs more to import than a mount has time for

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable


class Lane:
    """`make_worker` is called once in each new thread and gives what runs that thread's jobs."""

    def __init__(self, name: str, max_threads: int, make_worker: Callable[[], Callable[[bytes], None]]) -> None:
        self.name = name
        self.max_threads = max_threads
        self.submitted = 0
        self._make_worker = make_worker
        self._queue: SimpleQueue[int | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: dict[int, bytes] = {}  # lock: self._lock
        self._unfinished = 0  # jobs submitted and neither done nor taken back; lock: self._lock
        self._threads: list[threading.Thread] = []

    def submit(self, number: int, job: bytes) -> None:
        with self._lock:
            self._waiting[number] = job
            self.submitted += 1
            self._unfinished += 1
            grow = self._unfinished > len(self._threads) < self.max_threads
            if grow:
                thread = threading.Thread(target=self._run, name=f"{self.name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
        if grow:
            thread.start()
        self._queue.put(number)

    def take_back(self, number: int) -> bool:
        """Whether the job had not begun; then it never will."""
        with self._lock:
            if self._waiting.pop(number, None) is None:
                return False
            self._unfinished -= 1
            return True

    def _run(self) -> None:
        work = self._make_worker()
        while (number := self._queue.get()) is not None:
            with self._lock:
                job = self._waiting.pop(number, None)
            if job is None:  # taken back
                continue
            try:
                work(job)
            finally:
                del job
                with self._lock:
                    self._unfinished -= 1

    def close(self, timeout: float) -> bool:
        """Let begun and waiting jobs finish, then end the threads; False where some still run after `timeout`."""
        from time import monotonic

        for _ in self._threads:
            self._queue.put(None)
        until = monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, until - monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    @property
    def threads(self) -> int:
        return len(self._threads)
