"""Sees to it that some thread always takes up requests, whatever the one before it waits for.

A system call on a layer that does not answer (a FUSE filesystem whose server hangs, a dead network) can't be left. The
requests behind it can: when nothing was taken up for TICK seconds although there is something to read, `relieve` lets
another thread go on. A thread watches, and only while the dispatcher is at work: an idle mount has no timer running.
"""

from __future__ import annotations

import select
import threading
from time import sleep

from unionfs.guard.journal import BEAT
from unionfs.session.channel import Channel

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

TICK = 0.1  # seconds


class WatchedChannel(Channel):
    __slots__ = ("asleep", "on_wake")

    def __init__(self, fd: int) -> None:
        super().__init__(fd)
        self.asleep = False
        self.on_wake: Callable[[], None] | None = None  # called once, by who wakes from the next sleep

    def _sleep(self, spun: float) -> None:
        self.asleep = True
        super()._sleep(spun)
        self.asleep = False
        call = self.on_wake
        if call is not None:
            self.on_wake = None
            call()


class HandOver:
    """`relieve`: put another thread in the dispatcher's place, False where none is left. `later`: do what is due, and
    say whether there is more to come."""

    def __init__(
        self, channel: WatchedChannel, words: memoryview, relieve: Callable[[], bool], later: Callable[[], bool]
    ) -> None:
        self._channel = channel
        self._words = words
        self._relieve = relieve
        self._later = later
        self._awake = threading.Event()
        self._over = False

    def start(self) -> None:
        self.wake()
        threading.Thread(target=self._run, name="unionfs-watch", daemon=True).start()

    def wake(self) -> None:
        self._awake.set()

    def stop(self) -> None:
        self._over = True
        self.wake()

    def _run(self) -> None:
        waiting = select.poll()
        waiting.register(self._channel.fd, select.POLLIN)
        while not self._over:
            self._awake.wait()
            beat = self._words[BEAT]
            sleep(TICK)
            more = self._later()
            if self._words[BEAT] != beat or self._over:
                continue
            if waiting.poll(0):
                self._relieve()
            elif self._channel.asleep and not more:
                self._awake.clear()
                self._channel.on_wake = self.wake
                if not self._channel.asleep or waiting.poll(0):
                    self.wake()
