"""Rows about what a mount costs by being there: start-up, memory, wake-ups, descriptors."""

from __future__ import annotations

import time

from . import procs
from .registry import Skip, workload
from .run import Run


def need_server(run: Run) -> None:
    if not run.peer.fuse:
        raise Skip("no server process")
    if not run.pids:
        raise RuntimeError("no server process found by its mountpoint")


@workload("being there", [
    ("ready", "mount: from exec to ready", "ms"),
    ("rss.idle", "resident memory, idle", "MiB"),
    ("fds.idle", "file descriptors held, idle", ""),
    ("wakeups", "context switches per second, idle", "1/s"),
])  # fmt: skip
def being_there(run: Run) -> dict[str, float]:
    if run.peer.key == "native":
        raise Skip("nothing to mount")
    with run.union([run.stage.small]):
        out = {"ready": run.ready_s * 1000}
        if run.peer.fuse:
            need_server(run)
            time.sleep(0.3)
            before = procs.switches(run.pids)
            time.sleep(run.scale.idle_s)
            out["wakeups"] = (procs.switches(run.pids) - before) / run.scale.idle_s
            out["rss.idle"] = procs.rss_kib(run.pids) / 1024
            out["fds.idle"] = procs.fds(run.pids)
    return out


@workload("being there", [
    ("rss.inode", "memory per known inode, one big directory", "bytes"),
    ("fds.known", "file descriptors held with all of it known", ""),
])  # fmt: skip
def known_inodes(run: Run) -> dict[str, float]:
    if not run.peer.fuse:
        raise Skip("no server process")
    count = run.scale.wide
    with run.union([run.stage.wide(count)]) as mnt:
        need_server(run)
        before = procs.rss_kib(run.pids)
        run.loop("scans", root=str(mnt), dirs=["wide"], warm=1)
        return {
            "rss.inode": (procs.rss_kib(run.pids) - before) * 1024 / count,
            "fds.known": procs.fds(run.pids),
        }


@workload("being there", [("rss.million", "memory with 1,000,000 known inodes", "MiB")], long=True)
def million_inodes(run: Run) -> dict[str, float]:
    if not run.peer.fuse:
        raise Skip("no server process")
    with run.union([run.stage.million()]) as mnt:
        need_server(run)
        run.loop("scans", timeout=900, root=str(mnt), dirs=[f"m{i}" for i in range(10)], warm=1)
        return {"rss.million": procs.rss_kib(run.pids) / 1024}
