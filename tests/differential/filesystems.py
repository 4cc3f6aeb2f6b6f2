"""The file systems under comparison, each with layers of its own and a worker process that runs sequences on it.

The worker is forked, so that a hanging or dying file system costs one sequence and never the test run: the parent
waits with a deadline, kills the worker and unmounts by force.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .executor import LIBC, Executor, tree
from .layers import LOWERS, SETS, build, copy

KINDS = ("plain", "kernel", "fuse-overlayfs", "unionfs")
DEADLINE = 60.0
REPOSITORY = Path(__file__).resolve().parent.parent.parent
CLONE_NEWNS = 0x20000
MS_REC = 0x4000
MS_PRIVATE = 1 << 18
KERNEL_OPTIONS = "index=on,metacopy=on,redirect_dir=on,xino=on"


class Broken(Exception):
    """The file system hung, died or could not be mounted or unmounted."""


def command(*words: str | Path) -> None:
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=DEADLINE)
    if done.returncode:
        raise Broken(f"{' '.join(map(str, words))}: {done.stderr.strip()}")


def unionfs_command() -> Path:
    beside = Path(sys.executable).parent / "unionfs"
    return beside if beside.exists() else REPOSITORY / ".venv/bin/unionfs"


class Layers:
    """Directories for `count` sequences of every layer set; directories are made before anything is mounted."""

    def __init__(self, base: Path, count: int) -> None:
        self.base = base
        self.names = {name: [f"{name}{n:04}" for n in range(count)] for name in SETS}
        base.mkdir()
        base.chmod(0o755)
        for name in SETS:
            build(base / "template" / name, name)

    def populate(self, target: Path, parts: tuple[str, ...]) -> None:
        for part in parts:
            (target / part).mkdir(parents=True)
            (target / part).chmod(0o755)
            for name, copies in self.names.items():
                for each in copies:
                    copy(self.base / "template" / name / part, target / part / each)


class FileSystem:
    def __init__(self, kind: str, layers: Layers, session: str = "auto", data: str = "auto") -> None:
        self.kind = kind
        self.mounted: str | None = None
        self.session = session
        self.data = data
        self.home = layers.base / f"{kind}-{session}-{data}"
        self.merged = self.home / "merged"
        if kind == "plain":
            layers.populate(self.home, ("flat",))
            self.merged = self.home / "flat"
        else:
            layers.populate(self.home, (*(f"l{n}" for n in range(LOWERS)), "upper"))
            self.merged.mkdir()
            (self.home / "work").mkdir()

    def mount(self, kind: str | None = None) -> None:
        kind = kind or self.kind
        if kind == "plain":
            return
        lowers = [f"{self.home}/l{n}" for n in range(LOWERS)]
        upper, work = f"{self.home}/upper", f"{self.home}/work"
        options = f"lowerdir={':'.join(lowers)},upperdir={upper},workdir={work}"
        if kind == "kernel":
            command("mount", "-t", "overlay", "-o", f"{options},{KERNEL_OPTIONS}", "overlay", self.merged)
        elif kind == "fuse-overlayfs":
            command("fuse-overlayfs", "-o", options, self.merged)
        else:
            command(unionfs_command(), "mount", "--session", self.session, "--lower", ":".join(lowers),
                    "--upper", upper, "--work", work, "-o", f"data={self.data}", self.merged)  # fmt: skip
        self.mounted = kind

    def abandon(self, namespace: int) -> None:
        """Whatever state it is in: off the namespace's mount table."""
        if self.kind != "plain":
            enter = ["nsenter", f"--mount=/proc/self/fd/{namespace}", "umount", "-f", "-l", str(self.merged)]
            subprocess.run(enter, stdin=subprocess.DEVNULL, capture_output=True, pass_fds=[namespace])

    def unmount(self) -> None:
        if self.kind == "plain" or self.mounted is None:
            return
        if self.mounted == "unionfs":
            command(unionfs_command(), "umount", self.merged)
        else:
            command("umount", self.merged)
        self.mounted = None

    def remount(self) -> None:
        kind = self.mounted
        self.unmount()
        self.mount(kind)

    def interchange(self) -> None:
        """The same layers under the other implementation of the format."""
        if self.kind == "plain":
            return
        other = "kernel" if self.kind != "kernel" else "unionfs"
        kind = other if self.mounted == self.kind else self.kind
        self.unmount()
        self.mount(kind)

    def settle(self) -> None:
        """Back to its own implementation after a sequence that ended on the other."""
        if self.mounted != self.kind and self.kind != "plain":
            self.unmount()
            self.mount()

    def lower_trees(self) -> list[dict[str, Any]]:
        if self.kind == "plain":
            return []
        return [tree(f"{self.home}/l{n}", numbers=True) for n in range(LOWERS)]


def own_namespace() -> None:
    """Nobody else's mount namespace is to hold a copy of our mounts, which would keep them alive when unmounted."""
    if LIBC.unshare(CLONE_NEWNS) or LIBC.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None):
        raise OSError(ctypes.get_errno(), "mount namespace")


class Worker:
    """A process that runs sequences on one mounted file system, in a mount namespace of its own."""

    def __init__(self, filesystem: FileSystem) -> None:
        self.filesystem = filesystem
        self.pid = 0

    def start(self) -> None:
        requests, self._to = os.pipe()
        self._from, replies = os.pipe()
        self.pid = os.fork()
        if self.pid:
            os.close(requests)
            os.close(replies)
            self._namespace = -1
            return
        code = 1
        try:
            os.close(self._to)
            os.close(self._from)
            self.serve(requests, replies)
            code = 0
        finally:
            os._exit(code)

    def serve(self, requests: int, replies: int) -> None:
        filesystem = self.filesystem
        reader, writer = os.fdopen(requests, "rb"), os.fdopen(replies, "wb")
        reply: Any
        stopped = False
        try:
            own_namespace()
            filesystem.mount()
            reply = None
        except Exception as error:
            reply = Broken(str(error))
        while True:
            pickle.dump(reply, writer)
            writer.flush()
            if stopped:
                break
            request = pickle.load(reader)
            try:
                if isinstance(request, str):
                    reply = getattr(filesystem, "unmount" if request == "stop" else request)()
                    stopped = request == "stop"
                else:
                    directory, operations = request
                    executor = Executor(f"{filesystem.merged}/{directory}", filesystem.remount, filesystem.interchange)
                    reply = executor.run(operations)
            except Exception as error:
                reply = Broken(f"{type(error).__name__}: {error}")

    def send(self, request: Any) -> None:
        try:
            os.write(self._to, pickle.dumps(request))
        except BrokenPipeError:
            pass  # `receive` says what became of it

    def receive(self) -> Any:
        data = b""
        deadline = time.monotonic() + DEADLINE
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._from], [], [], left)[0]:
                self.kill()
                raise Broken(f"{self.filesystem.kind}: no answer in {DEADLINE:.0f} s")
            chunk = os.read(self._from, 1 << 20)
            data += chunk
            if not chunk:
                status = self.kill()
                raise Broken(f"{self.filesystem.kind}: worker died with status {status}")
            try:
                reply = pickle.loads(data)
            except (EOFError, pickle.UnpicklingError):
                continue
            if self._namespace < 0:
                self._namespace = os.open(f"/proc/{self.pid}/ns/mnt", os.O_RDONLY)
            if isinstance(reply, Broken):
                raise reply
            return reply

    def kill(self) -> int:
        os.kill(self.pid, signal.SIGKILL)
        self.filesystem.abandon(self._namespace)  # first: a worker that waits in a hung mount can't die before
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return status

    def stop(self) -> None:
        """Unmounts and ends the worker; by force if need be."""
        if not self.pid:
            return
        try:
            self.send("stop")
            self.receive()
        except Broken:
            if self.pid:
                self.kill()
            raise
        finally:
            os.close(self._to)
            os.close(self._from)
            if self._namespace >= 0:
                os.close(self._namespace)
            if self.pid:
                os.waitpid(self.pid, 0)
                self.pid = 0


def ask_all(workers: list[Worker], request: Any) -> list[Any]:
    """The request is a method of FileSystem, or a directory and a sequence to run in it."""
    for worker in workers:
        worker.send(request)
    return [worker.receive() for worker in workers]
