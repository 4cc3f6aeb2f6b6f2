"""The daemon's hold on its data root: the lock, the store, a directory for things in passing; and the check alone.

Nothing here needs the packages of the extra `daemon`.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import ExitStack

from unionfs.daemon.choice import Choice, choose, instead
from unionfs.daemon.config import Config
from unionfs.errors import EXIT_BUSY, EXIT_FAILURE, EXIT_PERMISSION, MountError
from unionfs.store.api import InUse, Store, StoreError, Unsupported, open_store


def lock(root: str, stack: ExitStack) -> None:
    """One daemon for a data root; the kernel lets go of the lock whatever becomes of us."""
    path = os.path.join(root, "daemon.lock")
    try:
        os.makedirs(root, mode=0o711, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        code = EXIT_PERMISSION if isinstance(error, PermissionError) else EXIT_FAILURE
        raise MountError(
            f"daemon: --data-root {root}: {error.strerror} (it must be a directory of yours, or one that can be made)",
            code,
        ) from None
    stack.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
        raise MountError(
            f"daemon: {root} is in use by another daemon (process {holder}): stop it or choose another --data-root",
            EXIT_BUSY,
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, b"%d\n" % os.getpid(), 0)


def scratch(root: str) -> str:
    """An empty directory: what a killed daemon left in it goes."""
    path = os.path.join(root, "tmp")
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path, 0o700, exist_ok=True)
    return path


def opened(config: Config, choice: Choice) -> Store:
    try:
        return open_store(config.data_root, choice.driver, config.storage_options)
    except Unsupported as error:
        raise MountError(f"daemon: storage driver {choice.driver}: {error}. {instead(config.data_root)}") from None
    except InUse as error:
        raise MountError(f"daemon: {error}", EXIT_BUSY) from None
    except StoreError as error:
        raise MountError(f"daemon: {config.data_root}: {error}") from None


def check(config: Config, repair: bool) -> list[str]:
    """What is wrong with the store, in words. MountError while a daemon has it."""
    with ExitStack() as stack:
        lock(config.data_root, stack)
        store = opened(config, choose(config.data_root, config.driver, config.driver_from))
        stack.callback(store.close)
        return store.fsck(repair)
