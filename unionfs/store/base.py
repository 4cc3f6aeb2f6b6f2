"""What all topics of a store share: its directory, lock and options, rows and who works on which layer.

`LayerStore` is one class in several files, a topic each, in a line of inheritance: base, mounting, content, upkeep,
layers. See `layers` for what is on disk and for the rules of locking.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import sqlite3
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from unionfs.errors import nearest
from unionfs.store import servers
from unionfs.store.api import DRIVERS, InUse, Invalid, Layer, NoSpace, NotFound, Store, StoreError, check_id
from unionfs.store.backends import make_backend
from unionfs.store.db import Database
from unionfs.store.unpack import Limits

OWN_ROOT = "own_root"  # in a layer's options: its archive had an entry for the root directory
IMAGE_LAYER = "unionfs.image"  # label of a committed layer that goes with the last image that uses it
UNPACKING = "unionfs.unpacking"  # label of an active layer that whoever opens the store next need not keep

OPTIONS = {
    "sync": "on|off: committed layers are on disk before commit returns (default on)",
    "mountopt": "options for every mount, as `unionfs mount -o` takes them",
    "size": "quota of each new active layer, where the driver can",
    "apply.max_size": "bytes that one archive may have unpacked (default 1t)",
    "apply.max_entries": "entries that one archive may have (default 10000000)",
}

_RESERVE = 256 << 10
_LOCK_WAIT = 30.0  # seconds for a killed process's last mount to be there


class Base(Store):
    def __init__(self, root: str, driver: str, options: Mapping[str, str]) -> None:
        if driver not in DRIVERS:
            hint = nearest(driver, DRIVERS)
            raise Invalid(f"storage driver {driver!r}{hint}: one of {', '.join(DRIVERS)}")
        self.driver = driver
        self.home = os.path.join(os.path.realpath(root), driver)
        self._read_options(options)
        self._layers = os.path.join(self.home, "layers")
        try:
            os.makedirs(self._layers, 0o711, exist_ok=True)
            os.chmod(self.home, 0o711)  # container processes walk through it
            self._lock_fd = self._take_lock()
        except OSError as error:
            raise StoreError(f"data root {self.home}: {error.strerror}: choose another by --data-root") from None
        try:
            self.backend = make_backend(driver, self.home)
            self.db = Database(os.path.join(self.home, "store.db"))
        except BaseException:
            os.close(self._lock_fd)
            raise
        self.make_reserve()
        self._servers = servers.Servers(self._lock_fd)
        self.closed = False
        self._guards: dict[int, threading.RLock] = {}
        self._guards_lock = threading.Lock()
        self._making: set[str] = set()
        self.images_lock = threading.RLock()  # see `images`

    def _read_options(self, options: Mapping[str, str]) -> None:
        for name in options:
            if name not in OPTIONS:
                raise Invalid(f"storage option {name!r}{nearest(name, list(OPTIONS))}: one of {', '.join(OPTIONS)}")
        if options.get("sync", "on") not in ("on", "off"):
            raise Invalid(f"storage option sync={options['sync']}: on or off")
        self.sync = options.get("sync", "on") == "on"
        self._mount_options = options.get("mountopt", "")
        self._size = options.get("size", "")
        if self._size:
            parse_size("size", self._size)
        self.limits = Limits(
            parse_size("apply.max_size", options.get("apply.max_size", "1t")),
            parse_size("apply.max_entries", options.get("apply.max_entries", "10000000")),
        )

    def _take_lock(self) -> int:
        path = os.path.join(self.home, "lock")
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + _LOCK_WAIT
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                holder = os.pread(fd, 64, 0).decode("ascii", "replace").strip()
            # A killed one's zygote may still be busy with a mount, and holds the lock until that is done.
            if os.path.exists(f"/proc/{holder}") or time.monotonic() > deadline:
                os.close(fd)
                raise InUse(
                    f"{self.home} is in use by process {holder or '?'}: if that is the daemon, go through it "
                    "(unionfs -H unix:///run/unionfs.sock ...)"
                ) from None
            time.sleep(0.05)
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        return fd

    def close(self) -> None:
        self.closed = True
        self._servers.close()
        self.db.close()
        os.close(self._lock_fd)

    def make_reserve(self) -> None:
        """Nothing can be removed on a full disk if the removal can't be noted: some room is kept for that."""
        path = os.path.join(self.home, "reserve")
        if os.path.exists(path):
            return
        try:
            with open(path, "xb") as stream:
                os.posix_fallocate(stream.fileno(), 0, _RESERVE)
        except OSError:
            self.use_reserve()  # the disk is full already

    def use_reserve(self) -> None:
        try:
            os.unlink(os.path.join(self.home, "reserve"))
        except FileNotFoundError:
            pass

    # --- rows ---

    def _row(self, id: str) -> sqlite3.Row:
        row = self.db.row("SELECT * FROM layers WHERE id = ?", check_id(id))
        if row is None:
            raise NotFound(f"no layer {id} in {self.home}")
        return row

    def _layer(self, row: sqlite3.Row) -> Layer:
        parent = ""
        if row["parent"] is not None:
            found = self.db.row("SELECT id FROM layers WHERE num = ?", row["parent"])
            parent = found["id"] if found is not None else ""
        return Layer(
            row["id"],
            parent,
            row["kind"],
            row["created"],
            row["updated"],
            json.loads(row["labels"]),
            row["size"],
            row["inodes"],
            row["diff_id"],
        )

    def _path(self, row: sqlite3.Row) -> str:
        return os.path.join(self._layers, row["directory"])

    def _chain(self, row: sqlite3.Row) -> list[str]:
        """Directories of the layer and its ancestors, its own first."""
        found = self.db.rows(
            "WITH RECURSIVE chain (num, parent, directory, depth) AS ("
            " SELECT num, parent, directory, 0 FROM layers WHERE num = ?"
            " UNION ALL SELECT l.num, l.parent, l.directory, depth + 1 FROM layers l, chain WHERE l.num = chain.parent"
            ") SELECT directory FROM chain ORDER BY depth",
            row["num"],
        )
        return [self._path(one) for one in found]

    @contextmanager
    def _guard(self, id: str) -> Iterator[sqlite3.Row]:
        """The layer's row while nobody else works on it. NotFound if it vanished while we waited."""
        num = self._row(id)["num"]
        with self._guards_lock:
            lock = self._guards.setdefault(num, threading.RLock())
        with lock:
            row = self._row(id)
            if row["num"] != num:
                raise NotFound(f"no layer {id} in {self.home}: it was just removed")
            yield row

    def _discard(self, directory: str) -> None:
        """Deletes what no row names any more. What resists is for `cleanup`."""
        try:
            self.backend.delete(os.path.join(self._layers, directory))
        except OSError:
            pass


def parse_size(what: str, text: str) -> int:
    """1024, 10k, 10m, 10g, 10t: bytes. Invalid for anything else."""
    match = re.fullmatch(r"([0-9]{1,18})([kmgt]?)i?b?", text.strip().lower())
    if match is None:
        raise Invalid(f"{what}={text}: not a size: 500m, 10g")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}[match[2]]


def failure(what: str, error: OSError) -> StoreError:
    where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
    text = f"{what}: {error.strerror}{where}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"{text}: make room")
    return StoreError(text)
