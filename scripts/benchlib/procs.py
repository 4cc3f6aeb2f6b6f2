"""What a union's server processes cost: found by the mountpoint in their command line, read from /proc."""

from __future__ import annotations

import os
import time
from pathlib import Path


def servers(mnt: Path) -> list[int]:
    """Processes that hold /dev/fuse and name the mountpoint in their arguments."""
    found = []
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            if str(mnt).encode() in Path(f"/proc/{entry}/cmdline").read_bytes() and _holds_fuse(entry):
                found.append(int(entry))
        except OSError:
            continue  # gone meanwhile
    return found


def _holds_fuse(pid: str) -> bool:
    return any(_target(f"/proc/{pid}/fd/{fd}") == "/dev/fuse" for fd in os.listdir(f"/proc/{pid}/fd"))


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def rss_kib(pids: list[int]) -> int:
    return sum(_status(f"/proc/{pid}/status", "VmRSS") for pid in pids)


def fds(pids: list[int]) -> int:
    return sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in pids)


def switches(pids: list[int]) -> int:
    """Context switches of all threads so far: what moves while nothing is asked is a wake-up."""
    total = 0
    for pid in pids:
        for tid in os.listdir(f"/proc/{pid}/task"):
            status = f"/proc/{pid}/task/{tid}/status"
            total += _status(status, "voluntary_ctxt_switches") + _status(status, "nonvoluntary_ctxt_switches")
    return total


def _status(path: str, field: str) -> int:
    for line in Path(path).read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise KeyError(field)


def wait_gone(pids: list[int], timeout: float = 10) -> None:
    """Until the servers have ended: they still flush after umount has returned."""
    end = time.monotonic() + timeout
    while time.monotonic() < end and any(map(_alive, pids)):
        time.sleep(0.005)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"  # init may reap late
    except OSError:
        return False
