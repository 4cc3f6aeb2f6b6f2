"""One sample: a peer's fresh union, and the helper process that measures on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from . import procs
from .peers import Peer
from .registry import Scale
from .stage import Stage

HELPER = Path(__file__).with_name("loops.py")


class Run:
    """What a workload function sees: one per peer."""

    def __init__(self, peer: Peer, stage: Stage) -> None:
        self.peer = peer
        self.stage = stage
        self.scale: Scale = stage.scale
        self.ready_s = 0.0  # exec to a mount that answers, of the last union
        self.pids: list[int] = []
        self.messages: dict[str, int] | None = None  # where to add up what the unions were asked, if wanted

    @contextmanager
    def union(self, lowers: list[Path], *, writes: bool = True, copy: bool = True) -> Iterator[Path]:
        """A fresh union of the lowers (topmost first) under an empty upper, or a read-only one.

        `copy=False` lets the native directory change the layer in place (a layer of its own is too big to copy).
        """
        self.stage.warm(lowers)
        if self.peer.key == "native" and not (writes and copy):
            self.pids = []
            yield self.stage.merged(lowers)
            return
        base = Path(tempfile.mkdtemp(prefix="u", dir=self.stage.unions))
        upper, work, mnt = base / "upper", base / "work", base / "mnt"
        for path in (upper, work, mnt):
            path.mkdir()
        native = self.peer.key == "native"
        if native:
            subprocess.run(["cp", "-a", f"{self.stage.merged(lowers)}/.", str(mnt)], check=True)
        else:
            self.ready_s = self.peer.mount(lowers, upper if writes else None, work, mnt, base / "log")
        try:
            # libfuse's own helpers look the process up by the mountpoint; so do we.
            self.pids = procs.servers(mnt) if self.peer.fuse else []
            yield mnt
            if self.messages is not None:
                for name, count in self.peer.messages(mnt).items():
                    self.messages[name] = self.messages.get(name, 0) + count
        finally:
            if not native:
                self.peer.unmount(mnt)
                os.rmdir(mnt)  # refuses, should the union still be there: nothing below may reach a layer through it
            procs.wait_gone(self.pids)
            shutil.rmtree(base)

    def loop(self, name: str, timeout: float = 300, **arguments: Any) -> Any:
        """Run a measuring loop of loops.py in a process of its own."""
        argv = [sys.executable, "-I", "-S", str(HELPER), name, json.dumps(arguments)]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=timeout, cwd="/")
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1] if done.stderr else f"exit {done.returncode}")
        return json.loads(done.stdout)


def timed(argv: Sequence[str | Path], timeout: float = 300, **kw: Any) -> float:
    """Seconds of a whole command that must succeed."""
    import time

    start = time.perf_counter()
    done = subprocess.run(argv, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, **kw)
    took = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(f"{Path(argv[0]).name}: {(done.stderr or done.stdout).strip()[-200:]}")
    return took
