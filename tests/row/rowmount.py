"""A row mount in a directory of its own, by the command line."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

MIB = 1 << 20
UNIONFS = Path(sys.executable).parent / "unionfs"


class Row:
    def __init__(self, where: Path) -> None:
        self.where = where
        self.driver = "row"
        self.lower, self.upper, self.work, self.merged = (where / n for n in ("lower", "upper", "work", "merged"))
        for path in (self.lower, self.upper, self.merged):
            path.mkdir(exist_ok=True)

    def try_mount(self, *options: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [UNIONFS, "mount", "--driver", self.driver, "--lower", self.lower, "--upper", self.upper,
             "--work", self.work, *options, self.merged], timeout=60, capture_output=True, text=True,
        )  # fmt: skip

    def mount(self, *options: str | Path) -> None:
        done = self.try_mount(*options)
        assert done.returncode == 0, done.stderr

    def umount(self) -> None:
        subprocess.run([UNIONFS, "umount", self.merged], check=True, timeout=60)

    def remount(self, *options: str | Path) -> None:
        self.umount()
        self.mount(*options)

    def fsck(self, *options: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([UNIONFS, "fsck", *options, self.upper], capture_output=True, text=True, timeout=60)

    def kill_server(self) -> None:
        """SIGKILL; the dead mount goes. Not before the server has gone too: it holds the upper's lock."""
        pid = self.pid()
        os.kill(pid, signal.SIGKILL)
        subprocess.run(["umount", "-l", self.merged], check=True)

    def pid(self) -> int:
        out = subprocess.run([UNIONFS, "list", "--json"], capture_output=True, text=True, check=True, timeout=60).stdout
        return next(int(m["pid"]) for m in json.loads(out) if m["mountpoint"] == str(self.merged))


def poke(path: Path, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        assert os.pwrite(fd, data, offset) == len(data)
    finally:
        os.close(fd)


def content(size: int) -> bytearray:
    return bytearray(b"".join(i.to_bytes(8, "little") for i in range(size // 8)))
