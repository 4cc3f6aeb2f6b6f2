"""Opening and checking layer directories: what every driver does before it mounts.

All errors are MountError: which path, why, what to do. Nothing is changed on disk before all checks have passed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import time

from unionfs.core.layers import Fd, FdCache, Layer, LDir, fd_path
from unionfs.errors import EXIT_BUSY, EXIT_FORMAT, EXIT_LAYER, EXIT_PERMISSION, EXIT_USAGE, MountError

ROW_STORE = (b".wh..wh.row/maps", b".wh..wh.row/chain")  # the row driver's, in an upper's root
LOCK_WAIT = 3.0  # seconds: a server that was just unmounted needs a moment to go away


def flag(options: dict[str, str], name: str, default: bool) -> bool:
    value = options.get(name)
    if value is None:
        return default
    if value in ("", "on", "1", "yes", "true"):
        return True
    if value in ("off", "0", "no", "false", "nofollow"):
        return False
    raise MountError(f"{name}={value}: must be on or off", EXIT_USAGE)


def show(path: bytes) -> str:
    return os.fsdecode(path)


def fd_budget() -> int:
    """Directory descriptors that a mount may keep open: a third of what the process may have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > 1 << 20:
        hard = 1 << 20
    if soft < hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            soft = hard
        except (OSError, ValueError):
            pass
    return max(16, min(4096, (soft - 64) // 3))


def check_directory(path: bytes, role: str) -> os.stat_result:
    try:
        st = os.stat(path)
    except OSError as e:
        raise MountError(f"{role} {show(path)}: {e.strerror}; give an existing directory", EXIT_LAYER) from None
    if not os.path.isdir(path):
        raise MountError(f"{role} {show(path)}: not a directory", EXIT_LAYER)
    return st


def check_overlap(paths: list[tuple[str, bytes]]) -> None:
    """Layers must not contain each other: a change in one would show through the other."""
    seen: dict[bytes, tuple[str, bytes]] = {}
    real = [(role, path, os.path.realpath(path)) for role, path in paths]
    for role, path, resolved in real:
        if resolved in seen:
            raise MountError(f"{role} {show(path)}: is also {seen[resolved][0]}; name each directory once", EXIT_LAYER)
        seen[resolved] = (role, path)
    for role, path, resolved in real:
        up = os.path.dirname(resolved)
        while True:
            if up in seen and up != resolved:
                other, at = seen[up]
                raise MountError(f"{role} {show(path)}: lies inside {other} {show(at)}; move one of them", EXIT_LAYER)
            if up == os.path.dirname(up):
                break
            up = os.path.dirname(up)


def open_layer(index: int, path: bytes, role: str, writable: bool, cache: FdCache, maps: bool = False) -> Layer:
    """`maps`: the driver can read block maps there."""
    try:
        layer = Layer(index, path, writable, cache)
    except OSError as e:
        raise MountError(f"{role} {show(path)}: can't be opened: {e.strerror}", EXIT_PERMISSION) from None
    root = layer.root.open().n
    if not maps and any(os.access(path, os.F_OK, dir_fd=root, follow_symlinks=False) for path in ROW_STORE):
        raise MountError(
            f"{role} {show(path)}: has block maps or snapshots of the row driver, so some of it is only partly "
            "there: mount it as the upper of --driver row, or make it whole first: unionfs row flatten",
            EXIT_FORMAT,
        )
    return layer


def lock(ldir: LDir, role: str, path: bytes) -> None:
    """Keep other mounts off a writable directory; the lock goes with the last descriptor of this server."""
    deadline = time.monotonic() + LOCK_WAIT
    while True:
        try:
            fcntl.flock(ldir.open().n, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as e:
            if e.errno not in (errno.EAGAIN, errno.EACCES):
                return  # a filesystem without locks: nothing to hold
        if time.monotonic() > deadline:
            raise MountError(
                f"{role} {show(path)}: in use by another mount; unmount that one first (`unionfs list` shows it)",
                EXIT_BUSY,
            )
        time.sleep(0.02)


def open_work(layer: Layer, path: bytes, fresh: bool, cache: FdCache) -> tuple[LDir, LDir]:
    """(work/work, work/) as the kernel's overlayfs lays it out; scratch is emptied of what a dead server left."""
    try:
        os.makedirs(path, 0o700, exist_ok=True)
        holder = LDir(layer, None, b"", cache)
        holder.fd = Fd(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        lock(holder, "work", path)
        try:
            os.mkdir(b"work", 0o700, dir_fd=holder.open().n)
        except FileExistsError:
            pass
    except OSError as e:
        if fresh:
            try:
                os.rmdir(path)
            except OSError:
                pass
        raise MountError(
            f"work {show(path)}: {e.strerror}; give a writable directory beside upper", EXIT_PERMISSION
        ) from None
    scratch = holder.child(b"work")
    empty(scratch)
    return scratch, holder


def empty(ldir: LDir) -> None:
    """Remove everything inside a directory of ours."""
    fd = ldir.open()
    for name in os.listdir(fd_path(fd)):
        try:
            os.unlink(name, dir_fd=fd.n)
        except IsADirectoryError:
            inner = ldir.child(name)
            empty(inner)
            inner.fd = None
            os.rmdir(name, dir_fd=fd.n)
