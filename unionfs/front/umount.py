"""`unionfs umount`: unmounts and waits until the server has written everything and released its layers."""

from __future__ import annotations

import os
import time

from unionfs.errors import EXIT_BUSY, EXIT_FAILURE, EXIT_NOT_OURS, EXIT_OK, EXIT_USAGE, MountError
from unionfs.front.args import Command, Option, Parsed
from unionfs.front.mounts import Mount, mount_of
from unionfs.session import mount as mounting
from unionfs.session.mount import show

COMMAND = Command(
    "unionfs umount",
    "Unmounts: flushes, waits until the server is gone and its upper directory is free for the next mount.\n"
    "A busy mount stays, and the error names who uses it.",
    [
        Option("-l --lazy", "detach now; the server stays until the last open file is closed"),
        Option("-t --timeout", "wait that long for users of the mount to go, and for the server (default: 0; 60)",
               "SECONDS"),
    ],
    "MOUNTPOINT...",
    1,
    1 << 20,
    "Examples:\n  unionfs umount merged\n  unionfs umount --timeout 10 merged\n  unionfs umount --lazy merged",
)
SERVER_TIMEOUT = 60.0


def run(parsed: Parsed) -> int:
    patience = None
    if "timeout" in parsed:
        try:
            patience = float(parsed.get("timeout"))
        except ValueError:
            raise MountError(f"--timeout {parsed.get('timeout')}: not a number", EXIT_USAGE) from None
    for path in parsed.arguments:
        unmount(path, "lazy" in parsed, patience)
    return EXIT_OK


def unmount(path: str, lazy: bool, patience: float | None) -> None:
    mount, inside = mount_of(path)
    if inside != b"/":
        raise MountError(f"{path} is not a mountpoint, but inside of {show(mount.path)}", EXIT_NOT_OURS)
    server = _server_of(mount)
    try:
        _detach(mount, lazy, 0.0 if patience is None else patience)
        if server is not None and not lazy:
            _wait_for_end(mount, server, SERVER_TIMEOUT if patience is None else max(patience, 1.0))
    finally:
        if server is not None:
            os.close(server)


def _server_of(mount: Mount) -> int | None:
    """A pidfd of the server. None: dead, or in a pid namespace that we can't see."""
    from unionfs.front.control import Connection

    try:
        connection = Connection(mount.device)
    except MountError:
        if mount.fstype not in ("fuse.unionfs", "fuse.fuse-overlayfs"):
            message = f"{show(mount.path)} is a mount of {mount.fstype}, not of unionfs"
            raise MountError(message, EXIT_NOT_OURS) from None
        return None
    try:
        return os.pidfd_open(connection.server_pid) if connection.server_pid else None
    except ProcessLookupError:
        return None
    finally:
        connection.close()


def _detach(mount: Mount, lazy: bool, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        try:
            mounting.detach(mount.path, lazy=lazy)
            return
        except OSError:
            if time.monotonic() >= deadline:
                raise MountError(
                    f"{show(mount.path)} is busy{_users(mount.path)}: close them, or use --timeout or --lazy", EXIT_BUSY
                ) from None
            time.sleep(0.05)


def _wait_for_end(mount: Mount, server: int, timeout: float) -> None:
    import select

    poll = select.poll()
    poll.register(server, select.POLLIN)
    if not poll.poll(timeout * 1000):
        raise MountError(
            f"{show(mount.path)} is unmounted, but its server has not ended after {timeout:g} s: it may still write, "
            "or the mount is held elsewhere (another mount namespace)",
            EXIT_FAILURE,
        )


def _users(mountpoint: bytes) -> str:
    """Part of a message: processes with something open below `mountpoint`, by /proc links: never by touching it."""
    prefix = mountpoint.rstrip(b"/") + b"/"
    found = []
    for pid in filter(bytes.isdigit, os.listdir(b"/proc")):
        base = b"/proc/" + pid
        try:
            links = [base + b"/cwd", base + b"/root", *(base + b"/fd/" + fd for fd in os.listdir(base + b"/fd"))]
        except OSError:
            continue  # gone, or somebody else's
        if any(_link(link).startswith(prefix) for link in links):
            with open(base + b"/comm", "rb") as stream:
                found.append(f"{stream.read().strip().decode('utf-8', 'replace')} ({pid.decode()})")
    return ": used by " + ", ".join(found[:8]) if found else ""


def _link(path: bytes) -> bytes:
    try:
        return os.readlink(path) + b"/"
    except OSError:
        return b""
