"""The measuring loops, run as `python -I -S loops.py LOOP JSON` in a fresh process; the answer is JSON on stdout.

Plain os.* calls on name lists made beforehand, garbage collection off: what is timed is the loop over the system
call and nothing else. The interpreter's own part (0.1-0.3 us per operation) is the same for every peer.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterable

now = time.perf_counter_ns


def per_op(work: Callable[[], object], count: int) -> float:
    """Microseconds per operation of one call to work."""
    start = now()
    work()
    return (now() - start) / 1000 / count


def stat_all(names: list[bytes]) -> None:
    stat = os.stat
    for name in names:
        stat(name)


def miss_all(names: list[bytes]) -> None:
    access = os.access  # returns False where stat would raise: no exception in the timed loop
    for name in names:
        access(name, 0)


def read_all(names: list[bytes]) -> None:
    opened, read, close = os.open, os.read, os.close
    for name in names:
        fd = opened(name, os.O_RDONLY)
        read(fd, 4096)
        close(fd)


def scan_all(dirs: Iterable[bytes]) -> int:
    seen = 0
    for d in dirs:
        with os.scandir(d) as entries:
            for entry in entries:
                entry.stat(follow_symlinks=False)
                seen += 1
    return seen


PASSES = {"stat": stat_all, "miss": miss_all, "read": read_all}


def tree_names(first: int, last: int, files: int, pattern: str = "f%04d") -> list[bytes]:
    return [b"d%04d/" % d + (pattern % f).encode() for d in range(first, last) for f in range(files)]


def passes(kind: str, names: list[bytes], warm: int = 3) -> list[float]:
    """[cold, warm]: the first pass, then the best of a few more."""
    work = PASSES[kind]
    cold = per_op(lambda: work(names), len(names))
    return [cold, min(per_op(lambda: work(names), len(names)) for _ in range(warm))]


def lookups(root: str, dirs: int, files: int) -> dict[str, list[float]]:
    """Thirds of the tree for stat, misses and reads, so that each of them meets names never asked for."""
    os.chdir(root)
    a, b = dirs // 3, 2 * dirs // 3
    plan = {
        "stat": tree_names(0, a, files),
        "miss": tree_names(a, b, files, "none%04d"),
        "read": tree_names(b, dirs, files),
    }
    return {kind: passes(kind, names) for kind, names in plan.items()}


def stat_tree(root: str, dirs: int, files: int, warm: int = 3) -> list[float]:
    os.chdir(root)
    return passes("stat", tree_names(0, dirs, files), warm)


def stat_list(root: str, names: list[str]) -> list[float]:
    os.chdir(root)
    return passes("stat", [n.encode() for n in names])


def scans(root: str, dirs: list[str], warm: int = 2) -> list[float]:
    """Microseconds per entry of scandir and stat, [cold, warm]."""
    os.chdir(root)
    todo = [d.encode() for d in dirs]
    out = []
    for _ in range(1 + warm):
        start = now()
        seen = scan_all(todo)
        out.append((now() - start) / 1000 / seen)
    return [out[0], min(out[1:])]


def create_here(root: str, count: int) -> float:
    """create+write of new files in a directory that many layers have."""
    os.chdir(root)
    names = [b"new%05d" % i for i in range(count)]

    def make() -> None:
        opened, write, close = os.open, os.write, os.close
        for name in names:
            fd = opened(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            write(fd, b"x" * 1024)
            close(fd)

    return per_op(make, count)


def create(root: str, count: int) -> dict[str, float]:
    """create+write, rename and unlink of new files in a new directory."""
    os.chdir(root)
    os.mkdir("made")
    names = [b"made/n%05d" % i for i in range(count)]
    data = b"x" * 1024

    def make() -> None:
        opened, write, close = os.open, os.write, os.close
        for name in names:
            fd = opened(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
            write(fd, data)
            close(fd)

    def move() -> None:
        rename = os.rename
        for name in names:
            rename(name, name + b"r")

    def remove() -> None:
        unlink = os.unlink
        for name in names:
            unlink(name + b"r")

    return {"create": per_op(make, count), "rename": per_op(move, count), "unlink": per_op(remove, count)}


def change_lower(root: str, dirs: int, files: int, count: int) -> dict[str, float]:
    """append (copies up), rename and unlink of files that are in a lower; thirds of the tree."""
    os.chdir(root)
    a, b = dirs // 3, 2 * dirs // 3
    appended = tree_names(0, a, files)[:count]
    renamed = tree_names(a, b, files)[:count]
    unlinked = tree_names(b, dirs, files)[:count]

    def append() -> None:
        opened, write, close = os.open, os.write, os.close
        for name in appended:
            fd = opened(name, os.O_WRONLY | os.O_APPEND)
            write(fd, b"more")
            close(fd)

    def rename() -> None:
        call = os.rename
        for name in renamed:
            call(name, name + b"r")

    def unlink() -> None:
        call = os.unlink
        for name in unlinked:
            call(name)

    return {
        "append": per_op(append, len(appended)),
        "rename": per_op(rename, len(renamed)),
        "unlink": per_op(unlink, len(unlinked)),
    }


def first_write(path: str) -> float:
    """Milliseconds of the first 4 KiB write into the middle of a big lower file: open, write, close."""
    start = now()
    fd = os.open(path, os.O_RDWR)
    os.pwrite(fd, b"y" * 4096, os.fstat(fd).st_size // 2 & ~4095)
    os.close(fd)
    return (now() - start) / 1e6


def sqlite(root: str, transactions: int) -> float:
    """Milliseconds per durable transaction (rollback journal, synchronous=FULL)."""
    import sqlite3

    db = sqlite3.connect(os.path.join(root, "bench.db"), isolation_level=None)
    db.execute("PRAGMA journal_mode=DELETE")
    db.execute("PRAGMA synchronous=FULL")
    db.execute("CREATE TABLE t (id INTEGER PRIMARY KEY, text TEXT)")
    start = now()
    for i in range(transactions):
        db.execute("INSERT INTO t (text) VALUES (?)", ("x" * 200 + str(i),))
    took = (now() - start) / 1e6 / transactions
    db.close()
    return took


def commits(path: str, journal: str, synchronous: str, count: int) -> float:
    """Seconds from opening a database to `count` committed updates all over it; all of them are there afterwards."""
    import sqlite3

    start = now()
    db = sqlite3.connect(path, isolation_level=None)
    db.execute(f"PRAGMA journal_mode={journal}")
    db.execute(f"PRAGMA synchronous={synchronous}")
    rows = 100_000
    for i in range(count):
        db.execute("UPDATE t SET v = ? WHERE id = ?", (f"new {i}", i * 37 % rows + 1))
    took = (now() - start) / 1e9
    seen = db.execute("SELECT count(*) FROM t WHERE id <= ? AND v LIKE 'new %'", (count * 37,)).fetchone()[0]
    db.close()
    if seen != count:
        raise SystemExit(f"{seen} of {count} updates are there")
    return took


def clients(root: str, dirs: int, files: int, count: int) -> float:
    """Microseconds of wall time per cold stat with `count` processes sharing the tree."""
    os.chdir(root)
    share = [tree_names(i * dirs // count, (i + 1) * dirs // count, files) for i in range(count)]
    gate_r, gate_w = os.pipe()
    pids = []
    for names in share:
        pid = os.fork()
        if pid == 0:
            os.close(gate_w)
            os.read(gate_r, 1)  # returns when the parent closes its end: all start at once
            stat_all(names)
            os._exit(0)
        pids.append(pid)
    os.close(gate_r)
    start = now()
    os.close(gate_w)
    bad = [pid for pid in pids if os.waitpid(pid, 0)[1]]
    took = now() - start
    if bad:
        raise RuntimeError("a client failed")
    return took / 1000 / sum(map(len, share))


def stats_during_copyup(root: str, big: str, dirs: int, files: int, plain: bool) -> dict[str, float]:
    """Latency of stats of untouched names, one a millisecond, while another process copies up a big file."""
    os.chdir(root)
    names = tree_names(0, dirs, files)
    pid = os.fork()
    if pid == 0:
        if plain:  # a plain directory has no copy-up: the same bytes are copied by hand
            src, dst = os.open(big, os.O_RDONLY), os.open(big + ".copy", os.O_WRONLY | os.O_CREAT, 0o644)
            while os.sendfile(dst, src, None, 1 << 20):
                pass
        fd = os.open(big, os.O_WRONLY | os.O_APPEND)
        os.write(fd, b"more")
        os._exit(0)
    took: list[float] = []
    begun = now()
    done = 0
    while not done:
        name = names[len(took)] if len(took) < len(names) else b"d0000/none%d" % len(took)
        start = now()
        os.access(name, 0)
        took.append((now() - start) / 1e6)
        time.sleep(0.001)
        done, status = os.waitpid(pid, os.WNOHANG)
    if status:
        raise RuntimeError("the copy-up failed")
    seconds = (now() - begun) / 1e9
    took.sort()
    return {"p50": took[len(took) // 2], "p99": took[int(len(took) * 0.99)], "seconds": seconds, "count": len(took)}


LOOPS: dict[str, Callable[..., object]] = {
    f.__name__: f
    for f in (
        lookups, stat_tree, stat_list, scans, create, create_here, change_lower, first_write, sqlite, commits, clients,
        stats_during_copyup,
    )
}  # fmt: skip

if __name__ == "__main__":
    gc.disable()
    sys.stdout.write(json.dumps(LOOPS[sys.argv[1]](**json.loads(sys.argv[2]))))
