"""`unionfs`, with a worker that kills itself at a point that was asked for: the n-th of a request of one kind.

    killpoints.py CONTROL_FILE ARGUMENTS OF UNIONFS...

Points are where something has just become true that was not before: after each system call that changes something, at
each line of the journal and its table, when a node is counted, when the request is answered. With EVERY_LINE: at every
line of the product. What to do stands in the words of CONTROL_FILE, which all processes map; nothing in the product
knows of it.
"""

from __future__ import annotations

import mmap
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any

# Words: the point to die at (0: none) of the next request with that opcode; points of the last request; deaths so far;
# every line is a point; the point of the successor's recovery to die at; the line of the last death. And of exceptions:
# how many requests with FAIL_OPCODE fail outside of any handler; every worker fails in its recovery.
ARM, OPCODE, COUNT, DEATHS, EVERY_LINE, AGAIN, LINE, FAILURES, FAIL_OPCODE, FAIL_RECOVERY = range(10)
SIZE = 4096
RECOVERY = -1  # in place of an opcode

CHANGES = frozenset((
    "open", "mkdir", "mknod", "symlink", "link", "unlink", "rmdir", "rename", "chmod", "chown", "fchmod", "fchown",
    "utime", "ftruncate", "pwrite", "write", "setxattr", "removexattr", "copy_file_range", "close", "dup",
))  # fmt: skip


# Functions whose end is a point.
STEPS = frozenset(("_entry", "answer", "settle", "write", "rewrite", "keep", "begin", "note", "set_pin", "_settle"))


class Control:
    def __init__(self, path: str | Path) -> None:
        with open(path, "r+b") as file:
            self.map = mmap.mmap(file.fileno(), SIZE)
        self.words = memoryview(self.map).cast("q")

    def arm(self, point: int, opcode: int, again: int = 0) -> None:
        self.words[COUNT] = 0
        self.words[OPCODE] = opcode
        self.words[AGAIN] = again
        self.words[ARM] = point


class Points:
    """Counts, and dies. Only the thread that answers the armed request is traced."""

    def __init__(self, control: Control) -> None:
        self._words = control.words

    def begin(self, opcode: int) -> None:
        words = self._words
        if words[ARM] and words[OPCODE] == opcode and sys.getprofile() is None:
            words[COUNT] = 0
            if opcode != RECOVERY:  # which reads the journal in loops; where it writes there is a system call near
                sys.settrace(self._trace)
            sys.setprofile(self._profile)

    def fail(self, opcode: int) -> None:
        words = self._words
        if opcode == RECOVERY:
            if words[FAIL_RECOVERY]:
                raise RuntimeError("asked for")
        elif words[FAILURES] and words[FAIL_OPCODE] == opcode:
            words[FAILURES] -= 1
            raise RuntimeError("asked for")

    @staticmethod
    def end() -> None:
        sys.settrace(None)
        sys.setprofile(None)

    def _reached(self, frame: FrameType) -> None:
        words = self._words
        words[COUNT] += 1
        if words[ARM] and words[COUNT] >= words[ARM]:
            words[LINE] = frame.f_lineno
            words[DEATHS] += 1
            words[ARM], words[OPCODE], words[AGAIN] = words[AGAIN], RECOVERY, 0
            os.kill(os.getpid(), signal.SIGKILL)

    def _trace(self, frame: FrameType, event: str, arg: Any) -> Any:
        path = frame.f_code.co_filename
        if path.endswith(("guard/journal.py", "guard/table.py")):
            return self._line
        if self._words[EVERY_LINE] and ("/unionfs/" in path or "/drivers/" in path):
            return self._line
        return None

    def _line(self, frame: FrameType, event: str, arg: Any) -> Any:
        if event == "line":
            self._reached(frame)
        return self._line

    def _profile(self, frame: FrameType, event: str, arg: Any) -> None:
        if event == "c_return":
            if getattr(arg, "__module__", "") == "posix" and arg.__name__ in CHANGES:
                self._reached(frame)
        elif event == "return":
            code = frame.f_code
            if code.co_filename.endswith("unionfs/sysio.py") or code.co_name in STEPS:
                self._reached(frame)


def install(points: Points) -> None:
    from unionfs.guard.redo import Redo
    from unionfs.session.channel import Channel
    from unionfs.wire.dispatch import Dispatcher

    answer, receive, settle = Dispatcher.answer, Channel.receive, Redo.settle

    def traced_answer(self: Any, opcode: int, unique: int, nodeid: int, size: int) -> Any:
        points.fail(opcode)
        points.begin(opcode)
        return answer(self, opcode, unique, nodeid, size)

    def traced_receive(self: Any, buffers: Any) -> int:
        points.end()
        return receive(self, buffers)

    def traced_settle(self: Any) -> None:
        points.fail(RECOVERY)
        points.begin(RECOVERY)
        settle(self)

    Dispatcher.answer = traced_answer  # type: ignore[method-assign]
    Channel.receive = traced_receive  # type: ignore[method-assign]
    Redo.settle = traced_settle  # type: ignore[method-assign]


def main() -> int:
    from unionfs.front import cli

    install(Points(Control(sys.argv[1])))
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
