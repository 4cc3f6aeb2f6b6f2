"""A unit of systemd that keeps the mount's descriptors: the supervisor's death is survived, too."""

from __future__ import annotations

import array
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_supervisor import DEADLINE, Union, supervisor_of, wait_for


class Manager:
    """Plays systemd for one unit: takes notifications, keeps descriptors, starts the service again with them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(str(path))
        self.kept: dict[str, int] = {}
        self.said: list[str] = []
        self.service: subprocess.Popen[bytes] | None = None

    def start(self, command: list[str], watchdog: float | None = None) -> None:
        names = list(self.kept)
        # As systemd does: the descriptors from 3 on, and the service's own process id among the variables.
        code = (
            "import os, sys\n"
            "fds = [int(word) for word in sys.argv[1].split()]\n"
            "high = [os.dup2(fd, 200 + i) for i, fd in enumerate(fds)]\n"
            "[os.dup2(fd, 3 + i) for i, fd in enumerate(high)]\n"
            "[os.close(fd) for fd in high]\n"
            "os.environ['LISTEN_PID'] = str(os.getpid())\n"
            "os.execv(sys.argv[2], sys.argv[2:])\n"
        )
        environment = {**os.environ, "NOTIFY_SOCKET": str(self.path)}
        if names:
            environment.update(LISTEN_FDS=str(len(names)), LISTEN_FDNAMES=":".join(names))
        if watchdog is not None:
            environment["WATCHDOG_USEC"] = str(int(watchdog * 1e6))
        fds = " ".join(str(self.kept[name]) for name in names)
        self.service = subprocess.Popen(
            [sys.executable, "-c", code, fds, *command], env=environment, pass_fds=list(self.kept.values())
        )

    def wait(self, word: str) -> None:
        """Take what is said until that has been said."""
        until = time.monotonic() + DEADLINE
        while word not in self.said:
            assert select.select([self.socket], [], [], until - time.monotonic())[0], f"never heard {word}"
            room = socket.CMSG_SPACE(16)
            message, control, _, _ = self.socket.recvmsg(4096, room)
            lines = message.decode().splitlines()
            if "FDSTORE=1" in lines:
                name = next(line.partition("=")[2] for line in lines if line.startswith("FDNAME="))
                for _, _, data in control:
                    fds = array.array("i", data)
                    if name in self.kept:
                        os.close(fds[0])
                    else:
                        self.kept[name] = fds[0]
            self.said += lines

    def close(self) -> None:
        for fd in self.kept.values():
            os.close(fd)
        self.socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path / "notify")
    try:
        yield made
    finally:
        if made.service is not None:
            made.service.kill()
            made.service.wait()
        made.close()


@pytest.fixture
def union(tmp_path: Path) -> Iterator[Union]:
    made = Union(tmp_path)
    try:
        yield made
    finally:
        made.unmount()


def test_death_of_the_supervisor_is_survived(union: Union, manager: Manager) -> None:
    command = [*union.command(), "-f"]
    manager.start(command)
    manager.wait("READY=1")
    assert sorted(manager.kept) == ["unionfs-device", "unionfs-journal", "unionfs-state"]
    with open(union.merged / "open", "w+") as held:
        held.write("before")
        held.flush()
        for _ in range(2):
            manager.said.clear()
            supervisor = supervisor_of(union.pid())
            assert manager.service is not None
            assert manager.service.pid == supervisor
            os.kill(supervisor, signal.SIGKILL)
            manager.service.wait()
            manager.start(command)
            manager.wait("READY=1")
            held.seek(0)
            assert held.read() == "before"
            os.mkdir(union.merged / f"made{supervisor}")
    assert (union.merged / "low").read_text() == "low"
    assert manager.service is not None
    manager.service.terminate()
    assert manager.service.wait(DEADLINE) == 0
    assert not union.mounted()


def test_watchdog_is_fed(union: Union, manager: Manager) -> None:
    manager.start([*union.command(), "-f"], watchdog=0.2)
    manager.wait("READY=1")
    manager.wait("WATCHDOG=1")
    manager.said.clear()
    manager.wait("WATCHDOG=1")
    assert manager.service is not None
    manager.service.terminate()
    wait_for(lambda: not union.mounted(), "unmounted")
