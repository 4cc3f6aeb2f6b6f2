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

KILLS = 4
BIG = 300_000  # bytes: the row driver redirects its blocks
DEADLINE = 60.0


class Guarded:
    def __init__(self, base: Path, driver: str = "overlay", *options: str) -> None:
        self.merged, self.upper = base / "merged", base / "upper"
        for name in ("lower", "upper", "merged"):
            (base / name).mkdir()
        for i in range(50):
            (base / "lower" / f"low{i}").write_text(str(i))
            (base / "lower" / f"big{i}").write_bytes(b"%d" % (i % 10) * BIG)
        words = ",".join(["guard=on", *options])
        layers = ["--lower", base / "lower", "--upper", self.upper]
        self._unionfs("mount", "--driver", driver, *layers, "-o", words, self.merged)

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


@pytest.fixture(params=["overlay", "aufs", "row", "overlay-passthrough"])
def guarded(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Guarded]:
    driver, _, data = request.param.partition("-")
    union = Guarded(tmp_path, driver, *([f"data={data}"] if data else []))
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


def test_blocks(guarded: Guarded) -> None:
    """Writes here and there into big lower files."""
    wanted = {i: bytearray(b"%d" % (i % 10) * BIG) for i in range(50)}
    chance = random.Random(1)

    def writes(number: int) -> None:
        i = number % 50
        with open(guarded.merged / f"big{i}", "r+b", buffering=0) as f:
            for _ in range(5):
                at, data = chance.randrange(BIG - 5000), os.urandom(chance.randrange(5000))
                assert os.pwrite(f.fileno(), data, at) == len(data)
                wanted[i][at : at + len(data)] = data
            os.fsync(f.fileno())
        assert (guarded.merged / f"big{i}").read_bytes() == wanted[i]

    under_kills(guarded, writes)
    for i in wanted:
        assert (guarded.merged / f"big{i}").read_bytes() == wanted[i]


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


def test_branches_come_and_go(tmp_path: Path) -> None:
    union = Guarded(tmp_path, "aufs")
    extra = tmp_path / "extra"
    extra.mkdir()
    (extra / "more").write_text("more")
    seen: set[bool] = set()
    try:

        def changes(number: int) -> None:
            """A change that is cut short has happened or not, and its caller is told that it was cut short."""
            verb, what = ("append", f"{extra}=ro") if number % 2 else ("del", str(extra))
            subprocess.run([UNIONFS, "branch", verb, str(union.merged), what], capture_output=True, timeout=30)
            there = (union.merged / "more").exists()
            seen.add(there)
            if there:
                assert (union.merged / "more").read_text() == "more"
            (union.merged / "file").write_text(str(number))
            assert (union.merged / "file").read_text() == str(number)
            assert (union.merged / "low7").read_text() == "7"

        under_kills(union, changes)
        assert seen == {True, False}
    finally:
        union.unmount()


def test_snapshots_are_taken(tmp_path: Path) -> None:
    union = Guarded(tmp_path, "row")
    try:
        content = {}

        def snapshots(number: int) -> None:
            with open(union.merged / "big3", "r+b") as f:
                f.seek(number * 5000 % BIG)
                f.write(b"%5d" % number)
            content[number] = (union.merged / "big3").read_bytes()
            subprocess.run(
                [UNIONFS, "snapshot", "create", str(union.merged), f"s{number}"], capture_output=True, timeout=30
            )
            assert (union.merged / "big3").read_bytes() == content[number]
            assert (union.merged / "low7").read_text() == "7"

        under_kills(union, snapshots)
        last = max(content)
        assert (union.merged / "big3").read_bytes() == content[last]
        subprocess.run([UNIONFS, "umount", str(union.merged)], check=True, timeout=60)
        # a death may leave a block map that belongs to no file
        subprocess.run([UNIONFS, "fsck", "--repair", str(union.upper)], capture_output=True, timeout=60)
        found = subprocess.run([UNIONFS, "fsck", str(union.upper)], capture_output=True, text=True, timeout=60)
        assert found.returncode == 0, found.stdout + found.stderr
    finally:
        union.unmount()
