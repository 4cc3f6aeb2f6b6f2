"""Starting and ending the servers of a store's mounts, through a zygote (`unionfs.front.zygote`), and finding them.

The zygote is a process of its own, started with the first mount: servers outlive the store's process, and a process
with threads must not fork. What is mounted is read from /proc/self/mountinfo, never remembered. Any thread.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence

from unionfs.session.mount import detach
from unionfs.store.api import StoreError

ZYGOTE = "unionfs.front.zygote"
_MAX_REQUEST = 1 << 20


class Servers:
    def __init__(self, held: int) -> None:
        """`held`: a descriptor that the zygote holds too, until all that it was asked for is done."""
        self._held = held
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, argv: Sequence[str]) -> None:
        """Runs one `unionfs` command line to its end; StoreError with what it said."""
        reader, writer = os.pipe()
        with open(reader, "rb") as stream:
            try:
                self._send(json.dumps(list(argv)).encode(), writer)
            finally:
                os.close(writer)
            answer = stream.read().decode("utf-8", "surrogateescape")
        code, _, said = answer.partition(" ")
        if code != "0":
            raise StoreError(said or f"unionfs {argv[0]}: its process was killed")

    def _send(self, message: bytes, pipe: int) -> None:
        with self._lock:
            for last in (False, True):
                if self._socket is None:
                    self._start()
                assert self._socket is not None
                try:
                    socket.send_fds(self._socket, [message], [pipe])
                    return
                except (BrokenPipeError, ConnectionResetError):  # somebody killed it: a new one does as well
                    self._stop()
                    if last:
                        raise StoreError("the process that starts mounts dies at once: see its messages") from None

    def _start(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _MAX_REQUEST)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", ZYGOTE, str(theirs.fileno()), str(self._held)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno(), self._held],
                cwd="/",
            )
        self._socket = ours

    def _stop(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.wait()
            self._process = None

    def close(self) -> None:
        with self._lock:
            self._stop()


def all_mounts() -> dict[str, str]:
    """Mountpoint → first field of /proc/mounts, of what is uppermost there."""
    found = {}
    with open("/proc/self/mountinfo", "rb") as stream:
        for line in stream:
            fields = line.split(b" ")
            source = fields[fields.index(b"-", 6) + 2]
            found[os.fsdecode(_decoded(fields[4]))] = os.fsdecode(_decoded(source))
    return found


def mountpoints(below: str) -> set[str]:
    """Mountpoints below a directory, whatever is mounted there."""
    prefix = os.path.realpath(below).rstrip("/") + "/"
    return {path for path in all_mounts() if path.startswith(prefix)}


def _decoded(field: bytes) -> bytes:
    """mountinfo's octal escapes."""
    return field.decode("unicode_escape").encode("latin-1") if b"\\" in field else field


def is_alive(path: str) -> bool:
    """False for a mount whose server died."""
    try:
        os.statvfs(path)
    except OSError as error:
        return error.errno not in (errno.ENOTCONN, errno.ECONNABORTED)
    return True


def drop(path: str) -> None:
    """Unmounts lazily whatever is there."""
    try:
        detach(os.fsencode(path), lazy=True)
    except Exception as error:
        if os.path.ismount(path):
            raise StoreError(f"{path} can't be unmounted: {error}") from None
