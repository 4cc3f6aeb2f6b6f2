"""Rows about changing a little of what is big and lies in a lower: what redirect-on-write is for."""

from __future__ import annotations

import os
from pathlib import Path

from .peers import need_cow
from .registry import Skip, workload
from .rows_data import fio
from .run import Run

MIB = 1 << 20
MODES = {"db.delete": ("delete", "full"), "db.wal": ("wal", "full"), "db.walnormal": ("wal", "normal")}


def drop(path: Path) -> None:
    """Out of the page cache."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


@workload("redirect", [
    ("firstwrite.cold", "first 4 KiB write into a big lower file that is not in memory", "ms"),
    ("firstwrite.space", "what that write allocates", "KiB"),
])  # fmt: skip
def first_write_cold(run: Run) -> dict[str, float]:
    need_cow(run.peer)
    if run.peer.key == "native":
        raise Skip("has no lower")
    layer = run.stage.file(run.scale.big_mib)
    with run.union([layer]) as mnt:
        drop(layer / "big")
        took = run.loop("first_write", path=str(mnt / "big"))
        upper = mnt.parent / "upper"
        space = sum(path.lstat().st_blocks * 512 for path in upper.rglob("*") if path.is_file())
    return {"firstwrite.cold": took, "firstwrite.space": space / 1024}


@workload("redirect", [("big.randwrite", "random 4 KiB writes into a big lower file", "kIOPS", "higher")])
def random_writes(run: Run) -> dict[str, float]:
    need_cow(run.peer)
    with run.union([run.stage.file(run.scale.big_mib)]) as mnt:
        run.loop("first_write", path=str(mnt / "big"))
        got = fio(mnt / "big", "randwrite", "psync", "4k", f"{run.scale.random_ops * 4}k")
    return {"big.randwrite": got["kiops"]}


@workload("redirect", [
    ("half.plain", "sequential read of a big lower file", "MiB/s", "higher"),
    ("half.seqread", "the same, after every other MiB of it was written", "MiB/s", "higher"),
])  # fmt: skip
def half_redirected(run: Run) -> dict[str, float]:
    need_cow(run.peer)
    with run.union([run.stage.file(run.scale.data_mib)]) as mnt:
        big, size = mnt / "big", run.scale.data_mib
        plain = fio(big, "read", "psync", "128k", f"{size}m")["mib"]
        fd = os.open(big, os.O_WRONLY)
        block = os.urandom(MIB)
        for at in range(0, size * MIB, 2 * MIB):
            os.pwrite(fd, block, at)
        os.fsync(fd)
        os.close(fd)
        drop(big)
        half = fio(big, "read", "psync", "128k", f"{size}m")["mib"]
    return {"half.plain": plain, "half.seqread": half}


@workload("redirect", [
    ("db.delete", "sqlite, from its first open: 1,000 commits on a big database in a lower, rollback journal", "s"),
    ("db.wal", "the same, write-ahead log", "s"),
    ("db.walnormal", "the same, write-ahead log, synchronous=NORMAL", "s"),
])  # fmt: skip
def commits(run: Run) -> dict[str, float]:
    """The native directory has a copy of the database already: its time is the floor, what the syncs alone take."""
    need_cow(run.peer)
    layer = run.stage.database(run.scale.big_mib)
    out = {}
    for row, (journal, synchronous) in MODES.items():
        with run.union([layer]) as mnt:
            out[row] = run.loop("commits", path=str(mnt / "db"), journal=journal, synchronous=synchronous, count=1000)
    return out

