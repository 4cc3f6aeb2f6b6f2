"""Containers without an engine: a name for a writable layer on an image.

Nothing runs in them: a person mounts one, changes it, looks at the difference, commits it. A container may be mounted
anywhere by `unionfs mount --image` (its mountpoint is noted then), or by `Store.get`. Any thread.
"""

from __future__ import annotations

import os
import re
import sqlite3
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from unionfs.store.api import Change, Exists, InUse, Invalid, NotFound, Usage
from unionfs.store.images import Image, Images, drop_blobs
from unionfs.store.layers import LayerStore
from unionfs.store.servers import all_mounts, drop

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}\Z")


class Container(NamedTuple):
    id: str  # 64 hex digits
    name: str
    image: str
    config: str  # digest of the image's configuration
    layer: str
    created: float
    mountpoint: str  # where it is mounted now, "" if it is not


class Containers:
    def __init__(self, store: LayerStore, images: Images) -> None:
        self.store = store
        self.images = images
        self._db = store.db

    def all(self) -> list[Container]:
        """Newest first."""
        there = all_mounts()
        return [self._container(row, there) for row in self._db.rows("SELECT * FROM containers ORDER BY created DESC")]

    def get(self, name: str) -> Container:
        """By name, by id or by the first 4 or more digits of one."""
        row = self._db.row("SELECT * FROM containers WHERE name = ? OR id = ?", name, name)
        if row is None and re.fullmatch(r"[0-9a-f]{4,63}", name):
            found = self._db.rows("SELECT * FROM containers WHERE id LIKE ?", name + "%")
            if len(found) > 1:
                raise Invalid(f"container {name}: {len(found)} ids begin so: give more digits")
            row = found[0] if found else None
        if row is None:
            raise NotFound(f"no container {name} in {self.store.home} (see unionfs ps)")
        return self._container(row, all_mounts())

    def _container(self, row: sqlite3.Row, there: dict[str, str]) -> Container:
        mountpoint = row["mountpoint"]
        if mountpoint not in there or (there[mountpoint] != row["layer"] and not self.store.backend.whole):
            mountpoint = ""  # not any more, or something else is there now
        if not mountpoint:
            mountpoint = self.store.mounted().get(row["layer"], ("", 0))[0]
        return Container(row["id"], row["name"], row["image"], row["config"], row["layer"], row["created"], mountpoint)

    def create(self, image: str, name: str = "", size: str = "") -> Container:
        """A new one; `size` is a quota ("10g") where the driver can."""
        id = os.urandom(32).hex()
        name = name or id[:12]
        if not _NAME.match(name):
            raise Invalid(f"container name {name!r}: 1 to 64 of A-Z a-z 0-9 _ . - and begin with a letter or digit")
        found = self.images.get(image)
        layer = f"container-{id}"
        if self._db.row("SELECT 1 FROM containers WHERE name = ?", name) is not None:
            raise Exists(f"container {name} exists: unionfs rm {name}, or another name")
        self.store.create(layer, found.layer, options={"size": size} if size else {})
        try:
            with self._db.transaction() as db:
                db.execute(
                    "INSERT INTO containers (id, name, image, config, layer, created) VALUES (?, ?, ?, ?, ?, ?)",
                    (id, name, found.name, found.id, layer, time.time()),
                )
        except BaseException as error:
            self.store.remove(layer)
            if isinstance(error, sqlite3.IntegrityError):
                raise Exists(f"container {name} exists, or image {found.name} was just removed") from None
            raise
        return self.get(id)

    def note_mountpoint(self, name: str, mountpoint: str) -> None:
        """Where it is about to be mounted, with its layer's id as the source (first field of /proc/mounts)."""
        container = self.get(name)
        with self._db.transaction() as db:
            db.execute("UPDATE containers SET mountpoint = '' WHERE mountpoint = ?", (mountpoint,))
            db.execute("UPDATE containers SET mountpoint = ? WHERE id = ?", (mountpoint, container.id))

    def remove(self, name: str, *, force: bool = False) -> None:
        """InUse while it is mounted; `force` unmounts it first."""
        container = self.get(name)
        if container.mountpoint:
            if not force:
                where = container.mountpoint
                raise InUse(f"container {container.name} is mounted at {where}: unmount it, or rm --force")
            self._unmount(container)
        with self._db.transaction(durable=True) as db:
            db.execute("DELETE FROM containers WHERE id = ?", (container.id,))
            drop_blobs(db)
        if self.store.exists(container.layer):
            self.store.remove(container.layer)

    def _unmount(self, container: Container) -> None:
        if container.layer in self.store.mounted():
            self.store.release(container.layer)
        elif self.store.backend.whole:
            drop(container.mountpoint)
        else:
            self.store.unmount_elsewhere(container.mountpoint)

    def changes(self, name: str) -> list[Change]:
        return self.store.changes(self.get(name).layer)

    def usage(self, name: str) -> Usage:
        return self.store.usage(self.get(name).layer)

    def diff(self, name: str) -> Iterator[bytes]:
        """The OCI layer tar of what it changes."""
        return self.store.diff(self.get(name).layer)

    def export(self, name: str) -> Iterator[bytes]:
        """The tar of its whole tree."""
        return self.store.diff(self.get(name).layer, "")

    def commit(self, name: str, image: str, comment: str = "") -> Image:
        """An image of what it is now; it goes on as it was. Programs that write meanwhile are not stopped."""
        container = self.get(name)
        parent = self.store.layer(container.layer).parent
        config = self.images.document(container.config)
        return self.images.add(image, config, _Reader(self.store.diff(container.layer)), parent, comment)


class _Reader:
    """Pieces as a stream."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._left = b""

    def read(self, size: int, /) -> bytes:
        while not self._left:
            piece: Any = next(self._pieces, None)
            if piece is None:
                return b""
            self._left = piece
        data, self._left = self._left[:size], self._left[size:]
        return data
