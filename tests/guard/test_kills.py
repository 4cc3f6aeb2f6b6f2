"""Workers killed at random moments under a load that checks what it sees: no error, right content, nothing lost."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.mounts import UNIONFS

KILLS = 8
DEADLINE = 60.0


class Guarded:
    def __init__(self, base: Path) -> None:
        self.merged, self.upper = base / "merged", base / "upper"
        for name in ("lower", "upper", "merged"):
            (base / name).mkdir()
        for i in range(50):
            (base / "lower" / f"low{i}").write_text(str(i))
        self._unionfs("mount", "--lower", base / "lower", "--upper", self.upper, "-o", "guard=on", self.merged)

    @staticmethod
    def _unionfs(*words: str | Path) -> str:
        result = subprocess.run([UNIONFS, *map(str, words)], capture_output=True, text=True, timeout=30)
        assert result.returncode == 0, result.stderr
        return result.stdout

    def pid(self) -> int:
        """The worker's, once it answers."""
        until = time.monotonic() + DEADLINE
        while True:
            try:
                return int(json.loads(self._unionfs("status", self.merged, "--json"))["pid"])
            except AssertionError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.02)

    def kill(self) -> None:
        os.kill(self.pid(), signal.SIGKILL)

    def unmount(self) -> None:
        subprocess.run([UNIONFS, "umount", "--lazy", str(self.merged)], capture_output=True, timeout=30)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    union = Guarded(tmp_path)
    try:
        yield union
    finally:
        union.unmount()


def under_kills(union: Guarded, load: Callable[[int], None]) -> None:
    """`load(round)` again and again until the kills are over."""
    failures: list[BaseException] = []
    over = threading.Event()

    def run() -> None:
        number = 0
        try:
            while not over.is_set():
                load(number)
                number += 1
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    chance = random.Random(load.__name__)
    killed = 0
    while killed < KILLS and not failures:
        time.sleep(chance.uniform(0.15, 0.4))
        union.kill()
        killed += 1
    union.pid()
    over.set()
    thread.join(DEADLINE)
    assert not thread.is_alive(), "the load hangs"
    if failures:
        raise failures[0]
    assert killed == KILLS


def test_names(guarded: Guarded) -> None:
    def names(number: int) -> None:
        d = guarded.merged / f"d{number}"
        d.mkdir()
        for i in range(20):
            with open(d / f"a{i}", "x") as f:
                f.write(f"{number}.{i}")
            os.rename(d / f"a{i}", d / f"b{i}")
            if i % 3 == 0:
                os.link(d / f"b{i}", d / f"h{i}")
            if i % 4 == 0:
                os.unlink(d / f"b{i}")
        want = {f"b{i}" for i in range(20) if i % 4} | {f"h{i}" for i in range(0, 20, 3)}
        assert set(os.listdir(d)) == want
        for name in want:
            assert (d / name).read_text() == f"{number}.{name[1:]}"
        if number % 2:
            subprocess.run(["rm", "-r", str(d)], check=True)
            assert not d.exists()

    under_kills(guarded, names)


def test_copy_up(guarded: Guarded) -> None:
    wanted = {i: str(i) for i in range(50)}

    def appends(number: int) -> None:
        i = number % 50
        with open(guarded.merged / f"low{i}", "a") as f:
            f.write("+")
        wanted[i] += "+"
        assert (guarded.merged / f"low{i}").read_text() == wanted[i]

    under_kills(guarded, appends)
    assert {i: (guarded.merged / f"low{i}").read_text() for i in wanted} == wanted


def test_sqlite(guarded: Guarded) -> None:
    path = guarded.merged / "db"
    done = []

    def transactions(number: int) -> None:
        with sqlite3.connect(path) as db:
            db.execute("create table if not exists t (n integer)")
            db.execute("insert into t values (?)", (number,))
        db.close()
        done.append(number)

    under_kills(guarded, transactions)
    db = sqlite3.connect(path)
    assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    assert [n for (n,) in db.execute("select n from t order by n")] == done
    db.close()


def test_unlinked_file_stays(guarded: Guarded) -> None:
    fd = os.open(guarded.merged / "gone", os.O_RDWR | os.O_CREAT)
    try:
        os.write(fd, b"x" * 9000)
        os.unlink(guarded.merged / "gone")
        for size in (9000, 9001):
            guarded.kill()
            guarded.pid()
            assert os.fstat(fd).st_size == size
            assert os.fstat(fd).st_nlink == 0
            assert os.pwrite(fd, b"y", size) == 1
        assert os.pread(fd, 10, 8999) == b"xyy"
    finally:
        os.close(fd)


def test_inodes_keep_their_numbers(guarded: Guarded) -> None:
    (guarded.merged / "d").mkdir()
    (guarded.merged / "d" / "f").write_text("text")
    fd = os.open(guarded.merged / "d", os.O_RDONLY)
    try:
        before = os.stat("f", dir_fd=fd).st_ino
        guarded.kill()
        os.rename(guarded.merged / "d", guarded.merged / "e")
        assert os.stat("f", dir_fd=fd).st_ino == before
        assert (guarded.merged / "e" / "f").read_text() == "text"
    finally:
        os.close(fd)
