"""Whatever happens to a worker or its supervisor: the mount serves, or says clearly that it does not."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from killpoints import FAIL_OPCODE, FAIL_RECOVERY, FAILURES, SIZE, Control
from support.mounts import UNIONFS

from unionfs.wire import abi

HERE = Path(__file__).parent
DEADLINE = 60.0


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    until = time.monotonic() + DEADLINE
    while not (result := condition()):
        assert time.monotonic() < until, f"not within {DEADLINE} s: {what}"
        time.sleep(0.01)
    return result


class Union:
    """A guarded mount whose workers fail on demand."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.lower, self.upper, self.merged = base / "lower", base / "upper", base / "merged"
        for path in (self.lower, self.upper, self.merged):
            path.mkdir()
        (self.lower / "low").write_text("low")
        (base / "control").write_bytes(bytes(SIZE))
        self.words = Control(base / "control").words

    def command(self, *options: str) -> list[str]:
        layers = ["--lower", str(self.lower), "--upper", str(self.upper)]
        program = [sys.executable, str(HERE / "killpoints.py"), str(self.base / "control"), "mount"]
        words = ["-o", ",".join(["guard=on", f"log={self.base}/log", *options])]
        return [*program, *layers, *words, str(self.merged)]

    def mount(self, *options: str) -> Union:
        result = subprocess.run(self.command(*options), capture_output=True, text=True, timeout=30)
        assert result.returncode == 0, result.stderr
        return self

    def status(self) -> dict[str, Any]:
        """Of the worker that answers, as soon as one does."""

        def ask() -> dict[str, Any] | None:
            command = [UNIONFS, "status", str(self.merged), "--json"]
            result = subprocess.run(command, capture_output=True, text=True, timeout=30)
            return dict(json.loads(result.stdout)) if result.returncode == 0 else None

        return dict(wait_for(ask, "status"))

    def pid(self) -> int:
        return int(self.status()["pid"])

    def guard(self) -> dict[str, Any]:
        return dict(self.status()["statistics"]["session"]["guard"])

    def mounted(self) -> bool:
        with open("/proc/self/mountinfo") as table:
            return f" {self.merged} " in table.read()

    def log(self) -> str:
        return (self.base / "log").read_text()

    def unmount(self) -> None:
        if self.mounted():
            subprocess.run(["umount", "-l", str(self.merged)], check=True, timeout=30)


@pytest.fixture
def union(tmp_path: Path) -> Iterator[Union]:
    made = Union(tmp_path)
    try:
        yield made
    finally:
        made.words[FAIL_RECOVERY] = made.words[FAILURES] = 0
        made.unmount()


def supervisor_of(worker: int) -> int:
    return int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def stopped(pid: int) -> bool:
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return all((task / "stat").read_text().rpartition(")")[2].split()[0] in "Tt" for task in tasks)


def test_death_of_the_supervisor_unmounts(union: Union) -> None:
    worker = union.mount().pid()
    supervisor = supervisor_of(worker)
    os.kill(supervisor, signal.SIGKILL)
    wait_for(lambda: not union.mounted(), "unmounted")
    wait_for(lambda: gone(worker), "the worker ends")


def test_unmount_ends_both(union: Union) -> None:
    worker = union.mount().pid()
    supervisor = supervisor_of(worker)
    subprocess.run([UNIONFS, "umount", str(union.merged)], check=True, timeout=60)
    wait_for(lambda: gone(worker) and gone(supervisor), "both end")


def test_sigterm_to_the_supervisor_unmounts(union: Union) -> None:
    supervisor = supervisor_of(union.mount().pid())
    os.kill(supervisor, signal.SIGTERM)
    wait_for(lambda: not union.mounted() and gone(supervisor), "unmounted")


def test_segfault_is_survived(union: Union) -> None:
    os.kill(union.mount().pid(), signal.SIGSEGV)
    assert (union.merged / "low").read_text() == "low"
    assert union.guard()["deaths"] == 1


def test_exception_while_serving_is_survived(union: Union) -> None:
    union.mount()
    union.words[FAIL_OPCODE], union.words[FAILURES] = abi.MKDIR, 1
    os.mkdir(union.merged / "made")
    assert (union.upper / "made").is_dir()
    assert union.guard()["deaths"] == 1
    assert "RuntimeError: asked for" in union.log()


def test_request_that_kills_every_worker_gets_eio(union: Union) -> None:
    union.mount()
    union.words[FAIL_OPCODE], union.words[FAILURES] = abi.MKDIR, 100
    with pytest.raises(OSError) as caught:
        os.mkdir(union.merged / "made")
    assert caught.value.errno == errno.EIO
    union.words[FAILURES] = 0
    os.mkdir(union.merged / "made")
    assert (union.merged / "low").read_text() == "low"
    assert "workers died in MKDIR" in union.log()


def test_crash_loop_ends_in_eio_with_the_reason(union: Union) -> None:
    worker = union.mount().pid()
    union.words[FAIL_RECOVERY] = 1
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(OSError) as caught:
        os.mkdir(union.merged / "made")  # it waits until the mount is given up
    assert caught.value.errno == errno.EIO
    assert "again and again" in union.guard()["failed"]
    assert "given up" in union.log()
    with pytest.raises(OSError) as caught:
        (union.merged / "low").read_text()
    assert caught.value.errno == errno.EIO
    subprocess.run([UNIONFS, "umount", str(union.merged)], check=True, timeout=60)
    assert not union.mounted()


def test_worker_that_hangs_is_replaced(union: Union) -> None:
    worker = union.mount("guard_deadline=0.5").pid()
    os.kill(worker, signal.SIGSTOP)
    wait_for(lambda: stopped(worker), "all its threads stop")
    os.mkdir(union.merged / "made")
    assert gone(worker)
    assert "hangs" in union.log()


def test_idle_worker_is_left_alone(union: Union) -> None:
    worker = union.mount("guard_deadline=0.1").pid()
    time.sleep(0.5)
    assert union.pid() == worker


@pytest.mark.parametrize("word", ["0", "x", "1e9"])
def test_bad_deadline_is_refused(union: Union, word: str) -> None:
    result = subprocess.run(union.command(f"guard_deadline={word}"), capture_output=True, text=True, timeout=30)
    assert result.returncode == 2
    assert f"guard_deadline={word}" in result.stderr


def test_foreground(union: Union) -> None:
    server = subprocess.Popen([*union.command(), "-f"])
    try:
        worker = union.pid()
        assert supervisor_of(worker) == server.pid
        os.kill(worker, signal.SIGKILL)
        assert (union.merged / "low").read_text() == "low"
        server.terminate()
        assert server.wait(DEADLINE) == 0
        assert not union.mounted()
    finally:
        server.kill()
        server.wait()


def test_open_and_locked_files_survive_an_upgrade(union: Union) -> None:
    import fcntl

    worker = union.mount().pid()
    supervisor = supervisor_of(worker)
    (union.merged / "gone").write_text("nameless")
    stop = threading.Event()
    failures: list[BaseException] = []

    def load() -> None:
        number = 0
        try:
            while not stop.is_set():
                number += 1
                (union.merged / f"f{number % 50}").write_text(str(number))
                assert (union.merged / f"f{number % 50}").read_text() == str(number)
        except BaseException as failure:
            failures.append(failure)

    with open(union.merged / "gone", "r+") as nameless, open(union.merged / "low", "r+") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)
        os.unlink(union.merged / "gone")
        thread = threading.Thread(target=load)
        thread.start()
        try:
            for _ in range(3):
                subprocess.run([UNIONFS, "upgrade", str(union.merged)], check=True, timeout=60)
                assert nameless.read() == "nameless"
                nameless.seek(0)
                with open(union.merged / "low") as other, pytest.raises(BlockingIOError):
                    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            stop.set()
            thread.join(DEADLINE)
        assert not failures
        after = union.pid()
        assert after != worker
        assert supervisor_of(after) == supervisor  # the same process, another program
        os.kill(after, signal.SIGKILL)
        assert os.fstat(nameless.fileno()).st_nlink == 0
        nameless.write("!")
    assert union.guard()["deaths"] == 1


def test_upgrade_needs_a_guard(union: Union, tmp_path: Path) -> None:
    subprocess.run([UNIONFS, "mount", "--lower", str(union.lower), str(union.merged)], check=True, timeout=30)
    result = subprocess.run([UNIONFS, "upgrade", str(union.merged)], capture_output=True, text=True, timeout=30)
    assert result.returncode == 2
    assert "guard=on" in result.stderr
