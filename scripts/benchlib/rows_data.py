"""Rows about file contents (fio, sqlite, first writes), and about one slow operation among quick ones."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

from .peers import need_cow
from .registry import Skip, workload
from .run import Run


def fio(file: Path, rw: str, engine: str, block: str, amount: str, *extra: str) -> dict[str, float]:
    """One fio job of `amount` bytes on a file; MiB/s and thousands of requests a second.

    From the mean latency of its one thread: the job's run time is in whole milliseconds, too coarse for us. A job
    that calls fsync is taken by its run time, as fsync is not in the latency.
    """
    if not shutil.which("fio"):
        raise Skip("fio is not installed")
    argv = [
        "fio", "--name=b", f"--filename={file}", f"--rw={rw}", f"--ioengine={engine}", f"--bs={block}",
        f"--size={file.stat().st_size}", f"--io_size={amount}", "--thread", "--invalidate=0", "--randseed=7",
        "--norandommap", "--output-format=json", "--overwrite=1", *extra,
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, cwd="/")
    if done.returncode:
        raise RuntimeError(f"fio: {(done.stderr or done.stdout).strip()[-200:]}")
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    part = job["read" if "read" in rw else "write"]
    synced = any(option.startswith("--fsync") for option in extra)
    seconds = part["runtime"] / 1e3 if synced else part["lat_ns"]["mean"] * part["total_ios"] / 1e9
    return {"mib": part["io_bytes"] / (1 << 20) / seconds, "kiops": part["total_ios"] / 1000 / seconds}


@workload("data", [
    ("seqread.cold", "sequential read of a lower file, first pass", "MiB/s", "higher"),
    ("seqread.warm", "sequential read of a lower file, again", "MiB/s", "higher"),
    ("randread", "random 4 KiB read of a lower file", "kIOPS", "higher"),
    ("seqread.mmap", "sequential read through mmap", "MiB/s", "higher"),
    ("randread.mmap", "random 4 KiB read through mmap", "kIOPS", "higher"),
])  # fmt: skip
def read_lower(run: Run) -> dict[str, float]:
    size = run.scale.data_mib
    amount = f"{run.scale.random_ops * 4}k"
    with run.union([run.stage.file(size)], copy=False) as mnt:
        big = mnt / "big"
        cold = fio(big, "read", "psync", "128k", f"{size}m")["mib"]
        warm = fio(big, "read", "psync", "128k", f"{size}m")["mib"]
        rand = fio(big, "randread", "psync", "4k", amount)["kiops"]
        mapped = fio(big, "read", "mmap", "128k", f"{size}m")["mib"]
        mapped_rand = fio(big, "randread", "mmap", "4k", amount)["kiops"]
    return {
        "seqread.cold": cold, "seqread.warm": warm, "randread": rand, "seqread.mmap": mapped,
        "randread.mmap": mapped_rand,
    }  # fmt: skip


@workload("data", [
    ("up.seqread", "sequential read of a copied-up file", "MiB/s", "higher"),
    ("up.randread", "random 4 KiB read of a copied-up file", "kIOPS", "higher"),
    ("up.seqwrite", "sequential 128 KiB write of a copied-up file", "MiB/s", "higher"),
    ("up.randwrite", "random 4 KiB write of a copied-up file", "kIOPS", "higher"),
    ("up.seqwrite.mmap", "sequential write through mmap", "MiB/s", "higher"),
    ("up.randwrite.mmap", "random 4 KiB write through mmap", "kIOPS", "higher"),
    ("up.fsync", "random 4 KiB write, fsync after every 8", "kIOPS", "higher"),
])  # fmt: skip
def write_copied_up(run: Run) -> dict[str, float]:
    need_cow(run.peer)
    size = run.scale.data_mib
    amount = f"{run.scale.random_ops * 4}k"
    with run.union([run.stage.file(size)], copy=True) as mnt:
        big = mnt / "big"
        run.loop("first_write", path=str(big))  # the copy-up itself has a row of its own
        return {
            "up.seqread": fio(big, "read", "psync", "128k", f"{size}m")["mib"],
            "up.randread": fio(big, "randread", "psync", "4k", amount)["kiops"],
            "up.seqwrite": fio(big, "write", "psync", "128k", f"{size}m")["mib"],
            "up.randwrite": fio(big, "randwrite", "psync", "4k", amount)["kiops"],
            "up.seqwrite.mmap": fio(big, "write", "mmap", "128k", f"{size}m")["mib"],
            "up.randwrite.mmap": fio(big, "randwrite", "mmap", "4k", amount)["kiops"],
            "up.fsync": fio(big, "randwrite", "psync", "4k", f"{run.scale.transactions * 16}k", "--fsync=8")["kiops"],
        }


@workload("data", [("randread.direct", "random 4 KiB read, O_DIRECT (or from memory)", "kIOPS", "higher")])
def direct_read(run: Run) -> dict[str, float]:
    with run.union([run.stage.file(run.scale.data_mib)], copy=False) as mnt:
        got = fio(mnt / "big", "randread", "psync", "4k", f"{run.scale.random_ops}k", "--direct=1")
    return {"randread.direct": got["kiops"]}


@workload("data", [("up.randwrite.direct", "random 4 KiB write, O_DIRECT (or to memory)", "kIOPS", "higher")])
def direct_write(run: Run) -> dict[str, float]:
    need_cow(run.peer)
    with run.union([run.stage.file(run.scale.data_mib)]) as mnt:
        run.loop("first_write", path=str(mnt / "big"))
        got = fio(mnt / "big", "randwrite", "psync", "4k", f"{run.scale.random_ops}k", "--direct=1")
    return {"up.randwrite.direct": got["kiops"]}


@workload("data", [("sqlite", "sqlite transaction, rollback journal, synchronous=FULL", "ms")])
def sqlite(run: Run) -> dict[str, float]:
    with run.union([run.stage.empty]) as mnt:
        return {"sqlite": run.loop("sqlite", root=str(mnt), transactions=run.scale.transactions)}


@workload("data", [("firstwrite", "first 4 KiB write into a big lower file", "ms")])
def first_write(run: Run) -> dict[str, float]:
    need_cow(run.peer)
    with run.union([run.stage.file(run.scale.big_mib)], copy=False) as mnt:
        return {"firstwrite": run.loop("first_write", path=str(mnt / "big"))}


@workload("data", [
    ("copyup.p99", "p99 of stats of other files during a big copy-up", "ms"),
    ("copyup.rate", "the copy-up meanwhile", "MiB/s", "higher"),
])  # fmt: skip
def stats_during_copyup(run: Run) -> dict[str, float]:
    need_cow(run.peer)
    lowers = [run.stage.small, run.stage.file(run.scale.copyup_mib)]
    native = run.peer.key == "native"
    with run.union(lowers, copy=True) as mnt:
        got = run.loop(
            "stats_during_copyup", root=str(mnt), big="big", dirs=run.scale.dirs, files=run.scale.files, plain=native
        )
    return {"copyup.p99": got["p99"], "copyup.rate": run.scale.copyup_mib / got["seconds"]}
