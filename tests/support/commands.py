"""`Place` and `User`: layers, a mountpoint, and the commands run on them as people and engines run them."""

from __future__ import annotations

import os
import pwd
import re
import shutil
import subprocess
import sys
from pathlib import Path

from . import sys as syscalls

BIN = Path(sys.executable).parent
REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 120


class Place:
    """Directories under `base`; `run` and friends never raise on a failure: the result is what tests look at."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.lower, self.upper, self.work, self.merged = (base / name for name in ("lower", "upper", "work", "merged"))
        for path in (self.lower, self.upper, self.work, self.merged):
            path.mkdir()
        (self.lower / "a").write_text("lower a")

    @property
    def options(self) -> str:
        return f"lowerdir={self.lower},upperdir={self.upper},workdir={self.work}"

    def run(self, *argv: object, **how: object) -> subprocess.CompletedProcess[str]:
        return self._run([BIN / "unionfs", *argv], how)

    def fuse_overlayfs(self, *argv: object, **how: object) -> subprocess.CompletedProcess[str]:
        return self._run([BIN / "unionfs-fuse-overlayfs", *argv], how)

    def helper(self, *argv: object, **how: object) -> subprocess.CompletedProcess[str]:
        return self._run([BIN / "mount.fuse.unionfs", *argv], how)

    def _run(self, argv: list[object], how: dict[str, object]) -> subprocess.CompletedProcess[str]:
        settings = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": self.base}
        return subprocess.run([str(word) for word in argv], text=True, timeout=TIMEOUT, **{**settings, **how})  # type: ignore[call-overload, no-any-return]

    def mount(self, *argv: object, **how: object) -> None:
        layers = ("--lower", self.lower, "--upper", self.upper, "--work", self.work)
        done = self.run("mount", *layers, *argv, self.merged, **how)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def server(self) -> int:
        """Process id of the server of `merged`."""
        import json

        done = self.run("status", "--json", self.merged)
        assert done.returncode == 0, done.stderr
        return int(json.loads(done.stdout)["pid"])

    def umount(self, path: Path | None = None) -> None:
        done = self.run("umount", path or self.merged)
        assert (done.returncode, done.stderr) == (0, "")

    def clean_up(self) -> None:
        """Unmounts whatever a failed test left below `base`; asks no server, for it may be dead."""
        with open("/proc/self/mountinfo", "rb") as mounts:
            paths = [line.split()[4] for line in mounts]
        for path in reversed(paths):
            path = re.sub(rb"\\(\d{3})", lambda octal: bytes([int(octal[1], 8)]), path)
            if path.startswith(os.fsencode(self.base) + b"/"):
                syscalls.umount(path, syscalls.MNT_DETACH)


class User:
    """An ordinary user with an account, as fusermount3 wants one, who runs a copy of the package.

    The interpreter and the checkout may be in a place that only root may enter; Debian's own Python is not.
    """

    def __init__(self, base: Path) -> None:
        account = pwd.getpwnam("daemon")
        self.uid, self.gid = account.pw_uid, account.pw_gid
        self.home = base / "home"
        self.home.mkdir()
        os.chown(self.home, self.uid, self.gid)
        self.code = base / "code"
        self.code.mkdir(mode=0o755)
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(REPOSITORY / "unionfs", self.code / "unionfs", ignore=ignored)
        shutil.copytree(REPOSITORY / "drivers", self.code / "unionfs_drivers", ignore=ignored)

    @property
    def start(self) -> str:
        """What `unionfs` is to this user: Python code."""
        path = str(self.code)
        return f"import sys; sys.path.insert(0, {path!r}); from unionfs.front.cli import main; sys.exit(main())"

    def run(self, *argv: object, **environment: str) -> subprocess.CompletedProcess[str]:
        command = ["/usr/bin/python3", "-B", "-c", self.start, *map(str, argv)]
        variables = {"PATH": "/usr/bin:/bin", "HOME": str(self.home), **environment}
        return subprocess.run(
            command, user=self.uid, group=self.gid, extra_groups=[], env=variables, cwd=self.home, text=True,
            timeout=TIMEOUT, stdin=subprocess.DEVNULL, capture_output=True,
        )  # fmt: skip
