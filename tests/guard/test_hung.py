"""A lower layer that stops answering: only who needs it waits, and can be interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.mounts import UNIONFS
from test_supervisor import DEADLINE, Union, wait_for


class Hung(Union):
    """Its lowest layer is another FUSE filesystem, whose server can be stopped."""

    def __init__(self, base: Path) -> None:
        super().__init__(base)
        self.inner = base / "inner"
        self.inner.mkdir()
        (self.inner / "d").mkdir()
        for i in range(20):
            (self.inner / "d" / f"far{i}").write_text("far")
        self.far = base / "far"
        self.far.mkdir()
        subprocess.run([UNIONFS, "mount", "--lower", str(self.inner), str(self.far)], check=True, timeout=30)
        ask = [UNIONFS, "status", str(self.far), "--json"]
        status = subprocess.run(ask, capture_output=True, check=True, timeout=30)
        self.server = int(json.loads(status.stdout)["pid"])

    def command(self, *options: str) -> list[str]:
        command = super().command(*options)
        command[command.index("--lower") + 1] += f":{self.far}"
        return command

    def hang(self) -> None:
        os.kill(self.server, signal.SIGSTOP)

    def stuck(self) -> bool:
        """Whether a thread of ours was left with a request; asking is one more request, that somebody else answers."""
        os.statvfs(self.merged)
        return bool(self.guard()["hand_overs"])

    def go_on(self) -> None:
        os.kill(self.server, signal.SIGCONT)


@pytest.fixture
def union(tmp_path: Path) -> Iterator[Hung]:
    made = Hung(tmp_path)
    try:
        yield made.mount("guard_deadline=2")  # type: ignore[misc]
    finally:
        made.go_on()
        made.unmount()
        subprocess.run([UNIONFS, "umount", str(made.far)], check=True, timeout=60)


def reader(path: Path) -> subprocess.Popen[bytes]:
    """A process that needs the file's attributes, and its content."""
    return subprocess.Popen(
        [sys.executable, "-c", "import sys; print(open(sys.argv[1]).read(), end='')", str(path)], stdout=subprocess.PIPE
    )


def test_others_are_served(union: Hung) -> None:
    (union.merged / "made").mkdir()
    os.stat(union.merged / "d")
    union.hang()
    waiting = [reader(union.merged / "d" / f"far{i}") for i in range(3)]
    try:
        wait_for(union.stuck, "another thread takes over")
        for i in range(20):
            (union.merged / "made" / f"f{i}").write_text("text")
            assert (union.merged / "made" / f"f{i}").read_text() == "text"
        assert (union.merged / "low").read_text() == "low"
        assert all(process.poll() is None for process in waiting)
        union.go_on()
        assert [process.communicate(timeout=DEADLINE)[0] for process in waiting] == [b"far"] * 3
    finally:
        for process in waiting:
            process.kill()
            process.wait()


def test_killed_caller_returns(union: Hung) -> None:
    os.stat(union.merged / "d")
    union.hang()
    process = reader(union.merged / "d" / "far5")
    wait_for(union.stuck, "the request is stuck")
    process.kill()
    assert process.wait(DEADLINE) == -signal.SIGKILL
    union.go_on()
    assert (union.merged / "d" / "far5").read_text() == "far"


def test_interrupted_caller_returns(union: Hung) -> None:
    os.stat(union.merged / "d")
    union.hang()
    code = (
        "import os, signal, sys\n"
        "def late(*_): raise TimeoutError\n"
        "signal.signal(signal.SIGALRM, late); signal.alarm(1)\n"
        "try: os.stat(sys.argv[1])\n"
        "except TimeoutError: sys.exit(7)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(union.merged / "d" / "far6")])
    assert process.wait(DEADLINE) == 7
    union.go_on()


def test_death_while_a_layer_hangs(union: Hung) -> None:
    """The worker is killed with requests stuck in it: the next one answers the others, and those once it can."""
    os.stat(union.merged / "d")
    union.hang()
    process = reader(union.merged / "d" / "far7")
    wait_for(union.stuck, "the request is stuck")
    os.kill(union.pid(), signal.SIGKILL)
    done = threading.Event()

    def read() -> None:
        if (union.merged / "low").read_text() == "low":  # the layer that has it answers, and those above
            done.set()

    threading.Thread(target=read, daemon=True).start()
    assert done.wait(DEADLINE)
    union.go_on()
    assert process.communicate(timeout=DEADLINE)[0] == b"far"
