"""Mounts of layers: references counted in the database, servers started by the zygote.

The reference is written before the mount is made, and taken away after it is gone: after a crash there may be a
reference without a mount, which `_forget_lost_mounts` takes back, never a mount that nobody counts.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Mapping

from unionfs.errors import MountError
from unionfs.session.mount import detach_patiently
from unionfs.store import servers
from unionfs.store.api import InUse, StoreError
from unionfs.store.backends import DIFF, MERGED
from unionfs.store.base import Base

_BUSY_WAIT = 2.0  # seconds that an unmount waits for open files before it is lazy
ID_MAPS = frozenset({"uidmapping", "gidmapping"})  # options of a layer that its mounts get as they are


class Mounting(Base):
    def __init__(self, root: str, driver: str, options: Mapping[str, str]) -> None:
        super().__init__(root, driver, options)
        self._forget_lost_mounts()

    def _forget_lost_mounts(self) -> None:
        """References of mounts that are gone, and mounts of references that were never taken."""
        there = servers.mountpoints(self._layers)
        for row in self.db.rows("SELECT * FROM layers WHERE refs > 0"):
            if not self.backend.whole and os.path.join(self._path(row), MERGED) not in there:
                self._set_refs(row, 0)
        held = {os.path.join(self._path(row), MERGED) for row in self.db.rows("SELECT * FROM layers WHERE refs > 0")}
        for path in there - held:
            servers.drop(path)

    def _set_refs(self, row: sqlite3.Row, refs: int) -> None:
        with self.db.transaction() as db:
            db.execute("UPDATE layers SET refs = ? WHERE num = ?", (refs, row["num"]))

    def get(self, id: str) -> str:
        with self._guard(id) as row:
            chain = self._chain(row)
            if self.backend.whole:
                self._set_refs(row, row["refs"] + 1)
                return os.path.join(chain[0], DIFF)
            path = os.path.join(chain[0], MERGED)
            if row["refs"] and os.path.ismount(path) and servers.is_alive(path):
                self._set_refs(row, row["refs"] + 1)
                return path
            if path in servers.mountpoints(chain[0]):  # its server died
                servers.drop(path)
            # The reference first: a mount that nobody has a reference to must not stay after a crash.
            self._set_refs(row, row["refs"] + 1)
            try:
                self._servers.run(self.backend.mount(chain, row["kind"] == "active", self._options_for(row)))
            except BaseException:
                self._set_refs(row, row["refs"])
                raise
            return path

    def mount_options(self, id: str) -> str:
        """What a mount of the layer is to be given with -o."""
        return self._options_for(self._row(id))

    def _options_for(self, row: sqlite3.Row) -> str:
        settings = json.loads(row["options"])
        names = sorted(settings.keys() & (ID_MAPS | {"size"} if row["kind"] == "active" else ID_MAPS))
        words = [self._mount_options, *(f"{name}={settings[name]}" for name in names)]
        return ",".join(word for word in words if word)

    def put(self, id: str) -> None:
        with self._guard(id) as row:
            if row["refs"] > 1:
                self._set_refs(row, row["refs"] - 1)
            elif row["refs"] == 1:
                self._unmount(row)

    def release(self, id: str) -> None:
        with self._guard(id) as row:
            if row["refs"]:
                self._unmount(row)

    def _unmount(self, row: sqlite3.Row) -> None:
        path = os.path.join(self._path(row), MERGED)
        if not self.backend.whole and path in servers.mountpoints(self._path(row)):
            try:
                detach_patiently(os.fsencode(path), _BUSY_WAIT)  # its server ends by itself: see `server_ended`
            except MountError as error:
                if path in servers.mountpoints(self._path(row)):
                    raise StoreError(f"layer {row['id']}: {error}") from None
        self._set_refs(row, 0)

    def unmount_elsewhere(self, path: str) -> None:
        """Ends a mount of a layer that somebody made outside of the store's directories."""
        self._servers.run(["umount", "--timeout", "2", "--", path])

    def mounted(self) -> dict[str, tuple[str, int]]:
        inside = DIFF if self.backend.whole else MERGED
        rows = self.db.rows("SELECT * FROM layers WHERE refs > 0 ORDER BY num")
        return {row["id"]: (os.path.join(self._path(row), inside), row["refs"]) for row in rows}

    def server_ended(self, row: sqlite3.Row, patience: float) -> bool:
        """A server that is unmounted still holds its upper's lock while it writes its last, or while a mount namespace
        that we can't see has the mount. False: it still did after so many seconds."""
        try:
            fd = os.open(os.path.join(self._path(row), DIFF), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            return True  # a view has nothing of its own
        deadline, pause = time.monotonic() + patience, 0.001
        try:
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return True
                except OSError:
                    if time.monotonic() > deadline:
                        return False
                time.sleep(pause)
                pause = min(pause * 2, 0.02)
        finally:
            os.close(fd)

    def branches(self, id: str) -> tuple[list[str], str, str]:
        row = self._row(id)
        return self.backend.branches(self._chain(row), row["kind"] == "active")

    def _refuse_mounted(self, row: sqlite3.Row, what: str) -> None:
        if row["refs"]:
            raise InUse(f"layer {row['id']} is mounted ({row['refs']} references): unmount it to {what} it")
