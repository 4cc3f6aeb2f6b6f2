"""A progress bar on standard error; lines instead of a bar where that is no terminal."""

from __future__ import annotations

import sys
import time


class Bar:
    def __init__(self, total: int) -> None:
        self.total = total
        self.done = 0
        self.begun = time.monotonic()
        self.live = sys.stderr.isatty()
        self._said = ""

    def say(self, text: str) -> None:
        """What is running now."""
        if self.live:
            filled = 24 * self.done // max(self.total, 1)
            spent = time.monotonic() - self.begun
            left = f"{spent / self.done * (self.total - self.done):4.0f} s left" if self.done > 9 else ""
            line = f"[{'#' * filled}{'.' * (24 - filled)}] {self.done}/{self.total} {left}  {text}"
            sys.stderr.write("\r\x1b[K" + line[:110])
            sys.stderr.flush()
        elif text.split(" ")[0] != self._said:
            self._said = text.split(" ")[0]
            sys.stderr.write(f"{time.monotonic() - self.begun:5.0f} s  {self.done}/{self.total}  {self._said}\n")

    def step(self) -> None:
        self.done += 1

    def note(self, text: str) -> None:
        """A line that stays."""
        sys.stderr.write(("\r\x1b[K" if self.live else "") + text + "\n")

    def close(self) -> None:
        if self.live:
            sys.stderr.write("\r\x1b[K")
