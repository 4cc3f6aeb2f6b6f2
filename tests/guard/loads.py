"""Loads for a guarded mount whose workers are killed: each checks all that it sees, and raises at the first difference.

A load is a function of (union, stop): it works in the mount until `stop` is set, and checks everything at its end.
`scripts/stress` runs them for long, tests/guard/test_loads.py for a short time.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import sysconfig
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support.mounts import UNIONFS

ROOT = Path(__file__).parent.parent.parent
BIG = 300_000  # bytes: the row driver redirects its blocks
DEADLINE = 120.0
PACKAGES = ("json", "email", "logging", "unittest", "concurrent")  # of Python's library: 120 files, 1.5 MB


class Union:
    def __init__(self, base: Path, driver: str, *options: str) -> None:
        self.base, self.driver = base, driver
        self.lower, self.upper, self.merged, self.extra = (
            base / name for name in ("lower", "upper", "merged", "extra")
        )
        for path in (self.lower, self.upper, self.merged, self.extra):
            path.mkdir()
        for i in range(20):
            (self.lower / f"big{i}").write_bytes(b"%d" % (i % 10) * BIG)
        (self.extra / "more").write_text("more")
        words = ",".join(["guard=on", *options])
        layers = ["--lower", str(self.lower), "--upper", str(self.upper)]
        run(UNIONFS, "mount", "--driver", driver, *layers, "-o", words, str(self.merged))

    def status(self) -> dict[str, Any]:
        until = time.monotonic() + DEADLINE
        while True:
            asked = subprocess.run(
                [UNIONFS, "status", str(self.merged), "--json"], capture_output=True, text=True, timeout=DEADLINE
            )
            if asked.returncode == 0:
                return dict(json.loads(asked.stdout))
            assert time.monotonic() < until, asked.stderr
            time.sleep(0.01)

    def kill(self) -> float:
        """Kills the worker; seconds until the mount answers what it was asked right after."""
        worker = int(self.status()["pid"])
        os.kill(worker, signal.SIGKILL)
        began = time.monotonic()
        os.statvfs(self.merged)
        return time.monotonic() - began

    def close(self) -> None:
        """Unmounts, and looks at what is left."""
        run(UNIONFS, "umount", "--timeout", "60", str(self.merged))
        if self.driver == "row":
            # A death may leave a block map that belongs to no file: that is all that may be repaired.
            found = subprocess.run([UNIONFS, "fsck", "--repair", str(self.upper)], capture_output=True, text=True)
            lines = found.stdout.splitlines()
            assert found.returncode in (0, 1), found.stdout + found.stderr
            assert all("belongs to no file" in line for line in lines if "/maps/" in line), found.stdout
            run(UNIONFS, "fsck", str(self.upper))


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stdout}{done.stderr}"
    return done.stdout


def unpack_and_compile(union: Union, stop: threading.Event) -> None:
    """A part of Python's library: unpacked, compared, compiled, imported from there."""
    library = Path(sysconfig.get_path("stdlib"))
    archive = union.base / "library.tar"
    run("tar", "--exclude=__pycache__", "-cf", str(archive), "-C", str(library), *PACKAGES)
    number = 0
    while not stop.is_set():
        number += 1
        home = union.merged / f"library{number % 3}"
        run("rm", "-rf", str(home))
        home.mkdir()
        run("tar", "-xf", str(archive), "-C", str(home))
        run("tar", "-df", str(archive), "-C", str(home))
        run(sys.executable, "-m", "compileall", "-q", "json", "logging", cwd=home)
        run(sys.executable, "-c", "import json, sys; assert json.__file__.startswith(sys.argv[1])", str(home), cwd=home)
    run("tar", "-df", str(archive), "-C", str(home))


def clone_and_check(union: Union, stop: threading.Event) -> None:
    """A git repository: cloned, checked, committed to."""
    origin = union.base / "origin"
    run("git", "init", "-q", "-b", "main", str(origin))
    run("cp", "-r", str(ROOT / "unionfs"), str(origin))
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    run("git", "add", "-A", cwd=origin)
    run("git", *who, "commit", "-qm", "all", cwd=origin)
    number = 0
    while not stop.is_set():
        number += 1
        clone = union.merged / f"clone{number % 2}"
        run("rm", "-rf", str(clone))
        run("git", "clone", "-q", "--no-hardlinks", str(origin), str(clone))
        run("git", "fsck", "--strict", cwd=clone)
        (clone / "new").write_text(str(number))
        run("git", "add", "-A", cwd=clone)
        run("git", *who, "commit", "-qm", "more", cwd=clone)
        run("git", "gc", "-q", cwd=clone)
        assert run("git", "status", "--porcelain", cwd=clone) == ""
    run("git", "fsck", "--strict", cwd=clone)


def random_io(union: Union, stop: threading.Event) -> None:
    """Writes, cuts, holes and renames in files whose content is known; two at a time."""
    failures: list[BaseException] = []

    def one(which: int) -> None:
        chance = random.Random(which)
        path = union.merged / f"big{which}"
        known = bytearray(path.read_bytes())
        try:
            while not stop.is_set():
                with open(path, "r+b", buffering=0) as f:
                    for _ in range(20):
                        at, action = chance.randrange(BIG), chance.randrange(6)
                        if action < 4:
                            data = os.urandom(chance.randrange(1, 9000))
                            assert os.pwrite(f.fileno(), data, at) == len(data)
                            known.extend(bytes(max(0, at + len(data) - len(known))))
                            known[at : at + len(data)] = data
                        elif action == 4:
                            os.ftruncate(f.fileno(), at)
                            del known[at:]
                            known.extend(bytes(at - len(known)))
                        else:
                            os.fsync(f.fileno())
                        assert os.fstat(f.fileno()).st_size == len(known)
                assert path.read_bytes() == known
                moved = path.with_name(f"moved{which}.{chance.randrange(3)}")
                os.rename(path, moved)
                path = moved
        except BaseException as failure:
            failures.append(failure)
            stop.set()

    threads = [threading.Thread(target=one, args=(which,)) for which in (1, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


def transactions(union: Union, stop: threading.Event) -> None:
    path = union.merged / "database"
    done: list[int] = []
    db = sqlite3.connect(path)
    db.execute("create table t (n integer, h text)")
    while not stop.is_set():
        number = len(done)
        with db:
            db.execute("insert into t values (?, ?)", (number, hashlib.sha256(b"%d" % number).hexdigest()))
        done.append(number)
        if number % 50 == 49:
            db.close()
            db = sqlite3.connect(path)
    db.close()
    db = sqlite3.connect(path)
    assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    assert [n for (n,) in db.execute("select n from t order by n")] == done
    db.close()


def name_storm(union: Union, stop: threading.Event) -> None:
    """Files and directories come, move, are linked, exchanged and go; a model says what has to be there."""
    from unionfs.sysio import AT_FDCWD, RENAME_EXCHANGE, renameat2

    home = union.merged / "names"
    for i in range(4):
        (home / f"d{i}").mkdir(parents=True)
    model: dict[str, str] = {}
    chance = random.Random(3)
    number = 0
    while not stop.is_set():
        number += 1
        name = f"d{chance.randrange(4)}/n{chance.randrange(30)}"
        other = f"d{chance.randrange(4)}/n{chance.randrange(30)}"
        action = chance.randrange(5)
        if name not in model:
            with open(home / name, "x") as f:
                f.write(str(number))
            model[name] = str(number)
        elif action == 0:
            os.unlink(home / name)
            del model[name]
        elif action == 1 and other not in model:
            os.link(home / name, home / other)
            model[other] = model[name]
        elif action == 2 and other in model:
            renameat2(AT_FDCWD, bytes(home / name), AT_FDCWD, bytes(home / other), RENAME_EXCHANGE)
            model[name], model[other] = model[other], model[name]
        elif other not in model:
            os.rename(home / name, home / other)
            model[other] = model.pop(name)
        if number % 100 == 0:
            seen = {f"d{i}/{name}" for i in range(4) for name in os.listdir(home / f"d{i}")}
            assert seen == set(model), seen ^ set(model)
            assert {name: (home / name).read_text() for name in model} == model


def snapshots(union: Union, stop: threading.Event) -> None:
    """Snapshots of a file that is written all the time. One that is cut short was taken or not."""
    known = bytearray((union.merged / "big7").read_bytes())
    number = 0
    while not stop.is_set():
        number += 1
        with open(union.merged / "big7", "r+b") as f:
            at = number * 4999 % BIG
            f.seek(at)
            f.write(b"%8d" % number)
        known[at : at + 8] = b"%8d" % number
        command = [UNIONFS, "snapshot", "create", str(union.merged), f"s{number}"]
        subprocess.run(command, capture_output=True, timeout=DEADLINE)
        if number > 3:
            command = [UNIONFS, "snapshot", "delete", str(union.merged), f"s{number - 3}"]
            subprocess.run(command, capture_output=True, timeout=DEADLINE)
        assert (union.merged / "big7").read_bytes() == known


def branch_changes(union: Union, stop: threading.Event) -> None:
    """A branch comes and goes while files are written. A change that is cut short has happened or not."""
    number, seen = 0, set()
    while not stop.is_set():
        number += 1
        verb, what = ("append", f"{union.extra}=ro") if number % 2 else ("del", str(union.extra))
        command = [UNIONFS, "branch", verb, str(union.merged), what]
        subprocess.run(command, capture_output=True, timeout=DEADLINE)
        seen.add((union.merged / "more").exists())
        (union.merged / "file").write_text(str(number))
        assert (union.merged / "file").read_text() == str(number)
        assert (union.merged / "big4").read_bytes() == b"4" * BIG
    assert seen == {True, False}


LOADS: dict[str, tuple[Callable[[Union, threading.Event], None], tuple[str, ...]]] = {
    "compile": (unpack_and_compile, ("overlay", "aufs", "row")),
    "git": (clone_and_check, ("overlay", "aufs", "row")),
    "io": (random_io, ("overlay", "aufs", "row")),
    "sqlite": (transactions, ("overlay", "aufs", "row")),
    "names": (name_storm, ("overlay", "aufs", "row")),
    "snapshots": (snapshots, ("row",)),
    "branches": (branch_changes, ("aufs",)),
}


def kill_under(base: Path, name: str, driver: str, kills: int, pause: tuple[float, float]) -> list[float]:
    """Runs a load, and kills workers at random times under it. The recoveries, in seconds."""
    union = Union(base, driver)
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            LOADS[name][0](union, stop)
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=work)
    thread.start()
    recoveries: list[float] = []
    chance = random.Random(name)
    try:
        while len(recoveries) < kills and not failures:
            time.sleep(chance.uniform(*pause))
            recoveries.append(union.kill())
    finally:
        stop.set()
        thread.join(4 * DEADLINE)
        if failures:
            subprocess.run(["umount", "-l", str(union.merged)], timeout=DEADLINE)
    if failures:
        raise failures[0]
    assert union.status()["statistics"]["session"]["guard"]["deaths"] >= kills
    union.close()
    return recoveries
