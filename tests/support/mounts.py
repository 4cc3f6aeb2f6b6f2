"""`Union`: layers on disk and the merged mount over them, served by the real command in a process of its own.

The command runs in the foreground, so that its log and its end are ours to watch; test_lifecycle.py covers the
background form. After each test `finish` checks what must hold whatever the test did: see its body.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from . import sys as syscalls
from .targets import KERNEL_OPTIONS, OPTIONS, Target
from .trees import Snapshot, Tree, build, differences, snapshot

UNIONFS = os.path.join(os.path.dirname(sys.executable), "unionfs")
COMPARE_LIMIT = 1500  # entries; a bigger merged tree is not compared with the kernel's view by default
KEPT_IN_WORK = {"work", "index"}
WATCHDOG_SECONDS = 150

_modes_checked: set[Target] = set()


def escape(path: str | Path) -> str:
    """A layer path as the options take it."""
    text = str(path)
    for char in "\\:,":
        text = text.replace(char, "\\" + char)
    return text


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    pause = 0.002
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(pause)
        pause = min(pause * 1.5, 0.1)


def is_mounted(path: str | Path) -> bool:
    """By /proc/self/mountinfo: asks no server."""
    wanted = str(path).encode().replace(b"\\", rb"\134").replace(b" ", rb"\040").replace(b"\n", rb"\012")
    with open("/proc/self/mountinfo", "rb") as mounts:
        return any(line.split(b" ")[4] == wanted for line in mounts)


def unionfs(*argv: object, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    """Runs the command; output captured, never raises for its exit code."""
    return subprocess.run([UNIONFS, *map(str, argv)], capture_output=True, text=True, timeout=120, **kwargs)


class Union:
    """Paths and the life of one union. `lowers` is topmost first, as on the command line."""

    def __init__(
        self, base: Path, target: Target, *, options: str = "", compare: bool = True, user: int | None = None
    ) -> None:
        self.base = base
        self.target = target
        self.options = options
        self.compare = compare  # compare the merged tree with the kernel's view of the same layers afterwards
        self.user = user
        self.merged = base / "merged"
        self.lowers: list[Path] = []
        self.upper: Path | None = None
        self.work: Path | None = None
        self.log = base / "server.log"
        self.process: subprocess.Popen[bytes] | None = None
        self._watchdog: threading.Timer | None = None
        self._lowers_before: list[Snapshot] = []
        self._ctimes_before: list[dict[str, int]] = []
        self.merged.mkdir()

    # ---- paths
    @property
    def lower(self) -> Path:
        assert len(self.lowers) == 1
        return self.lowers[0]

    @property
    def up(self) -> Path:
        assert self.upper is not None
        return self.upper

    def __truediv__(self, name: str) -> Path:
        return self.merged / name

    # ---- life
    def remember_lowers(self) -> None:
        self._lowers_before = [snapshot(lower) for lower in self.lowers]
        self._ctimes_before = [_ctimes(lower) for lower in self.lowers]

    def command(self) -> list[str]:
        lowers = ":".join(escape(lower) for lower in self.lowers)
        if self.target.driver == "kernel":
            options = f"lowerdir={lowers}"
            if self.upper:
                options += f",upperdir={escape(self.upper)},workdir={escape(self.work)},{KERNEL_OPTIONS}"
            return ["mount", "-t", "overlay", "overlay", "-o", _join(options, self.options), str(self.merged)]
        if self.target.driver == "fuse-overlayfs":
            options = f"lowerdir={lowers}"
            if self.upper:
                options += f",upperdir={escape(self.upper)},workdir={escape(self.work)}"
            options = _join(options, self.options)
            return ["fuse-overlayfs", "-f", "-o", options + ",allow_other", str(self.merged)]
        argv = [UNIONFS, "mount", "-f", "--driver", self.target.driver, "--session", self.target.session]
        argv += ["--lower", lowers]
        if self.upper:
            argv += ["--upper", str(self.upper), "--work", str(self.work)]
        data = f"data={self.target.data}" if self.target.data else ""
        options = _join(data, OPTIONS.get(self.target.driver, ""), self.options)
        if options:
            argv += ["-o", options]
        return [*argv, str(self.merged)]

    def mount(self) -> None:
        assert not is_mounted(self.merged)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ready:
            ready.bind(f"\0unionfs-test-{os.getpid()}-{self.merged}")
            address = "@" + os.fsdecode(ready.getsockname()[1:])
            with open(self.log, "ab") as log:
                self.process = subprocess.Popen(
                    self.command(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=os.environ | {"NOTIFY_SOCKET": address},
                    **({} if self.user is None else {"user": self.user, "group": self.user, "extra_groups": []}),
                )
            if self.target.driver == "kernel":
                assert self.process.wait() == 0, self.log.read_text()
                self.process = None
                return
            self._wait_until_ready(ready)
        assert self.process.poll() is None, f"mount ended with {self.process.returncode}: {self.log.read_text()}"
        self._watchdog = threading.Timer(WATCHDOG_SECONDS, self._give_up)
        self._watchdog.daemon = True
        self._watchdog.start()

    def _wait_until_ready(self, ready: socket.socket) -> None:
        """Ours tells systemd's way when it answers; of an oracle only the mount table tells."""
        process = self.process
        assert process is not None
        if not self.target.ours:
            wait_for(lambda: process.poll() is not None or is_mounted(self.merged), "the mount")
            return
        ending = os.pidfd_open(process.pid)
        try:
            assert select.select([ready, ending], [], [], 60)[0], "waited 60 s for the mount"
        finally:
            os.close(ending)

    def _give_up(self) -> None:
        """A process that waits for a stuck server can't be interrupted: killing the server fails its call."""
        if self.process is not None:
            with open(self.log, "a") as log:
                log.write(f"\nTEST WATCHDOG: server killed after {WATCHDOG_SECONDS} s\n")
            self.process.kill()

    def umount(self) -> None:
        if os.geteuid():
            done = unionfs("umount", self.merged)
            assert done.returncode == 0, done
        else:
            syscalls.umount(self.merged)
        self.wait_ended()

    def wait_ended(self) -> None:
        if self._watchdog:
            self._watchdog.cancel()
        if self.process is not None:
            try:
                code = self.process.wait(30)
            except subprocess.TimeoutExpired:
                self.process.send_signal(signal.SIGUSR1)  # stacks of all threads to the log
                time.sleep(1)
                raise
            self.process = None
            assert code == 0, f"server ended with {code}: {self.log.read_text()}"
        assert not is_mounted(self.merged)

    def remount(self, options: str | None = None) -> None:
        self.umount()
        if options is not None:
            self.options = options
        self.mount()

    def kill(self) -> None:
        """SIGKILL, then remove the dead mount."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.process = None
        if self._watchdog:
            self._watchdog.cancel()
        wait_for(lambda: not is_mounted(self.merged) or _detach(self.merged), "the dead mount to go")

    def drop_caches(self, what: str = "2") -> None:
        """Makes the kernel forget dentries and inodes, so that the next look asks the server again."""
        with open("/proc/sys/vm/drop_caches", "w") as control:
            control.write(what)

    def server_fds(self) -> int:
        assert self.process is not None
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    # ---- after the test
    def finish(self) -> None:
        """What holds after every test, and how it is seen."""
        mounted = is_mounted(self.merged)
        merged_tree: Snapshot | None = None
        if mounted:
            if self.process is not None:
                assert self.process.poll() is None, f"the server died: {self.process.returncode}"
                self._check_modes()
            if self._comparable():
                try:
                    merged_tree = snapshot(self.merged, COMPARE_LIMIT)
                except OverflowError:
                    merged_tree = None
            self.umount()
        log = self.log.read_text(errors="replace") if self.log.exists() else ""
        assert "Traceback" not in log and "WATCHDOG" not in log, f"server log:\n{log}"
        self.check_lowers()
        self.check_work()
        if merged_tree is not None:
            with self.kernel_view() as view:
                found = differences(merged_tree, snapshot(view))
            assert not found, "the kernel's overlayfs shows another tree:\n" + "\n".join(found)

    def _comparable(self) -> bool:
        return (
            self.compare
            and self.target.driver in ("overlay", "fuse-overlayfs")
            and self.user is None
            and self.upper is not None
            and bool(os.listdir(self.upper))
        )

    def _check_modes(self) -> None:
        """Session and data mode are as asked: asked of the server once per target."""
        if not self.target.ours or self.user is not None or self.target in _modes_checked:
            return
        _modes_checked.add(self.target)
        status = self.status()
        assert status["driver"] == self.target.driver, status
        assert status["session"] == self.target.session, status
        if self.target.data:
            assert status["data"] == self.target.data, status

    def status(self) -> dict[str, Any]:
        done = unionfs("status", "--json", self.merged)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def check_lowers(self) -> None:
        for lower, before, ctimes in zip(self.lowers, self._lowers_before, self._ctimes_before, strict=False):
            found = differences(before, snapshot(lower))
            assert not found, f"{lower} was changed:\n" + "\n".join(found)
            changed = {path for path, ctime in _ctimes(lower).items() if ctimes.get(path) != ctime}
            assert not changed, f"{lower}: touched: {sorted(changed)}"

    def check_work(self) -> None:
        """Work holds nothing but what the format keeps."""
        if self.work is None or not self.work.exists():
            return
        kept = set(os.listdir(self.work))
        assert kept <= KEPT_IN_WORK, f"left in work: {sorted(kept - KEPT_IN_WORK)}"
        inner = self.work / "work"
        if inner.exists():
            left = os.listdir(inner)
            assert not left, f"left in work/work: {left}"

    @contextmanager
    def kernel_view(self, options: str = KERNEL_OPTIONS) -> Iterator[Path]:
        """The same layers as the kernel's overlayfs shows them, while our mount is down."""
        view = self.base / "kernel"
        view.mkdir(exist_ok=True)
        layers = f"lowerdir={':'.join(escape(lower) for lower in self.lowers)}"
        if self.upper:
            layers += f",upperdir={escape(self.upper)},workdir={escape(self.work)}"
        subprocess.run(["mount", "-t", "overlay", "overlay", "-o", _join(layers, options), str(view)], check=True)
        try:
            yield view
        finally:
            syscalls.umount(view)

    def discard(self) -> None:
        """After a failed test: whatever it takes to leave nothing mounted or running."""
        if self._watchdog:
            self._watchdog.cancel()
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait()
        while is_mounted(self.merged):
            _detach(self.merged)

    def describe(self) -> str:
        """Log and layers, for the report of a failed test."""
        parts = [f"$ {' '.join(self.command())}"]
        if self.log.exists():
            parts.append("server log: " + self.log.read_text(errors="replace")[-6000:])
        for name in ("upper", "work", *(lower.name for lower in self.lowers)):
            path = self.base / name
            if path.exists():
                listing = subprocess.run(
                    ["find", str(path), "-printf", "%M %U:%G %s %i %n %p\n"],
                    capture_output=True,
                    text=True,
                    errors="replace",
                )
                parts.append("\n".join(listing.stdout.splitlines()[:60]))
        return "\n".join(parts)


def _join(*options: str) -> str:
    return ",".join(option for option in options if option)


def _detach(path: Path) -> bool:
    try:
        syscalls.umount(path, syscalls.MNT_DETACH)
    except OSError:
        return False
    return True


def _ctimes(root: Path) -> dict[str, int]:
    found = {}
    for folder, dirs, files, fd in os.fwalk(os.fsencode(root)):
        for name in [b".", *dirs, *files]:
            key = os.fsdecode(os.path.join(folder, name))
            found[key] = os.stat(name, dir_fd=fd, follow_symlinks=False).st_ctime_ns
    return found


class Maker:
    """Makes unions below one directory; `finish` or `discard` all of them when the test ends."""

    def __init__(self, base: Path, target: Target) -> None:
        self.base = base
        self.target = target
        self.unions: list[Union] = []

    def __call__(
        self,
        lowers: list[Tree] | None = None,
        upper: Tree | None = None,
        *,
        read_only: bool = False,
        options: str = "",
        compare: bool = True,
        mount: bool = True,
        user: int | None = None,
        upper_on: Path | None = None,
    ) -> Union:
        """`upper_on`: a directory on another filesystem that takes upper and work."""
        base = self.base / f"u{len(self.unions)}"
        base.mkdir()
        union = Union(base, self.target, options=options, compare=compare, user=user)
        self.unions.append(union)
        for i, tree in enumerate([{}] if lowers is None else lowers):
            path = base / f"lower{i}"
            build(path, self.target.spelled(tree))
            union.lowers.append(path)
        if not read_only:
            union.upper, union.work = (upper_on or base) / "upper", (upper_on or base) / "work"
            build(union.upper, self.target.spelled(upper or {}))
            union.work.mkdir()
        if user is not None:
            for path in (base, *union.lowers, union.upper, union.work, union.merged):
                if path is not None:
                    subprocess.run(["chown", "-R", f"{user}:{user}", str(path)], check=True)
        union.remember_lowers()
        if mount:
            union.mount()
        return union

    def require(self, *features: str) -> None:
        """Skips the test, with the reason, on a target that lacks one of the features."""
        for feature in features:
            if reason := self.target.lacks(feature):
                pytest.skip(reason)

    def finish(self) -> None:
        for union in reversed(self.unions):
            union.finish()

    def discard(self) -> None:
        for union in reversed(self.unions):
            union.discard()
        shutil.rmtree(self.base, ignore_errors=True)
