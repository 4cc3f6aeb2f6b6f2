"""`LayerStore`: the store behind the seam of `api`, for every driver; the driver's part is a `Backend`.

On disk, below DATA_ROOT/DRIVER:
    reserve     room for the database to write a removal when the disk is full
    lock        flock(2) of the one process that has the store open; holds its pid
    store.db    what there is (see `db`)
    layers/X/   one directory a layer, named at random; see `backends`

Crash safety: a directory is made first and then named in the database; removal deletes the row first. So a directory
without a row is garbage, always, and `cleanup` needs no other rule. A layer is committed by one durable transaction
after its data has been synced.

Threads: any. `_guard(num)` serialises what happens to one layer; the database's lock is only held for single
statements and short transactions, never while waiting for a guard.
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import time
from collections.abc import Mapping

from unionfs import sysio
from unionfs.store import servers
from unionfs.store.api import (
    Exists,
    InUse,
    Invalid,
    Kind,
    Layer,
    NoSpace,
    NotFound,
    Precondition,
    Unsupported,
    check_id,
)
from unionfs.store.backends import MERGED
from unionfs.store.base import OWN_ROOT, UNPACKING, failure, parse_size
from unionfs.store.mounting import ID_MAPS
from unionfs.store.upkeep import Upkeep

SERVER_WAIT = 10.0  # seconds for a server that is unmounted to write its last


class LayerStore(Upkeep):
    def create(
        self,
        id: str,
        parent: str = "",
        *,
        kind: Kind = "active",
        labels: Mapping[str, str] | None = None,
        options: Mapping[str, str] | None = None,
    ) -> Layer:
        if kind not in ("active", "view"):
            raise Invalid(f"layer {id}: kind {kind!r}: active or view")
        if self.db.row("SELECT 1 FROM layers WHERE id = ?", check_id(id)) is not None:
            raise Exists(f"layer {id} exists")
        above = None
        if parent:
            above = self._row(parent)
            if above["kind"] != "committed":
                raise Precondition(f"layer {id}: its parent {parent} is {above['kind']}: commit that first")
        elif kind == "view":
            raise Invalid(f"layer {id}: a view needs a parent to look at")
        settings = self._check_settings(id, kind, dict(options or {}))
        directory = self._make_directory(above, kind)
        now = time.time()
        try:
            with self.db.transaction() as db:
                if above is not None and not db.execute(
                    "SELECT 1 FROM layers WHERE num = ?", (above["num"],)
                ).fetchone():
                    raise NotFound(f"no layer {parent} in {self.home}: it was just removed")
                db.execute(
                    "INSERT INTO layers (id, parent, kind, directory, created, updated, labels, options)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (
                        id,
                        above["num"] if above is not None else None,
                        kind,
                        directory,
                        now,
                        now,
                        json.dumps(dict(labels or {})),
                        json.dumps(settings),
                    ),
                )
        except sqlite3.IntegrityError:
            self._discard(directory)
            raise Exists(f"layer {id} exists") from None
        except BaseException:
            self._discard(directory)
            raise
        finally:
            self._making.discard(directory)
        return self.layer(id)

    def _check_settings(self, id: str, kind: Kind, settings: dict[str, str]) -> dict[str, str]:
        known = {"size", *ID_MAPS}
        if unknown := set(settings) - known:
            raise Invalid(f"layer {id}: unknown option {min(unknown)!r}: one of {', '.join(sorted(known))}")
        for option in settings.keys() & ID_MAPS:
            if not re.fullmatch(r"\d{1,10}(:\d{1,10}){2}((:\d{1,10}){3}){0,339}", settings[option]):
                raise Invalid(f"layer {id}: {option}={settings[option]!r}: must be groups of ID:DISK_ID:LENGTH")
            if self.backend.whole:
                raise Unsupported(f"layer {id}: driver {self.driver} can't show other owners ({option}): use overlay")
        if self._size and kind == "active":
            settings.setdefault("size", self._size)
        if "size" in settings:
            parse_size("size", settings["size"])
            if not self._has_quota():
                raise Unsupported(f"layer {id}: driver {self.driver} has no quota (size): use the driver row")
        return settings

    def _has_quota(self) -> bool:
        if self.backend.whole:
            return False
        from unionfs.assemble import load_driver

        return "size" in load_driver(self.driver).options

    def _make_directory(self, above: sqlite3.Row | None, kind: Kind) -> str:
        while True:
            name = os.urandom(6).hex()
            self._making.add(name)  # first: cleanup must not take it
            path = os.path.join(self._layers, name)
            try:
                os.mkdir(path, 0o711)
                break
            except FileExistsError:
                self._making.discard(name)
        try:
            os.chmod(path, 0o711)
            self.backend.make(path, None if above is None else self._path(above), readonly=kind == "view")
        except BaseException as error:
            self._discard(name)
            self._making.discard(name)
            if isinstance(error, OSError):
                raise failure(f"new layer in {self._layers}", error) from None
            raise
        return name

    def commit(self, id: str, new_id: str, *, labels: Mapping[str, str] | None = None, parent: str = "") -> Layer:
        check_id(new_id)
        with self._guard(id) as row:
            if row["kind"] != "active":
                raise Precondition(f"layer {id} is {row['kind']}, only an active one can be committed")
            if new_id != id and self.db.row("SELECT 1 FROM layers WHERE id = ?", new_id) is not None:
                raise Exists(f"layer {new_id} exists")
            path = self._path(row)
            self._refuse_mounted(row, "commit")
            if not self.server_ended(row, SERVER_WAIT):
                raise InUse(f"layer {id}: a server of it is still at work: is it mounted elsewhere?")
            base = self._new_parent(row, parent) if parent else None
            try:
                if base is not None and not json.loads(row["options"]).get(OWN_ROOT):
                    self.backend.inherit_root(path, self._path(base))
                if flatten := self.backend.flatten(self._chain(row)):
                    self._servers.run(flatten)
                if self.sync:
                    self._sync()
            except OSError as error:
                raise failure(f"layer {id}", error) from None
            usage = self.backend.usage(self._chain(row))
            kept = json.loads(row["labels"]) if new_id == id and labels is None else dict(labels or {})
            kept.pop(UNPACKING, None)
            now = time.time()
            try:
                with self.db.transaction(durable=self.sync) as db:
                    db.execute(
                        "UPDATE layers SET id = ?, kind = 'committed', created = ?, updated = ?, labels = ?,"
                        " size = ?, inodes = ?, refs = 0, parent = ? WHERE num = ?",
                        (
                            new_id,
                            now,
                            now,
                            json.dumps(kept),
                            usage.size,
                            usage.inodes,
                            row["parent"] if base is None else base["num"],
                            row["num"],
                        ),
                    )
            except sqlite3.IntegrityError as error:
                if "FOREIGN KEY" in str(error):
                    raise NotFound(f"no layer {parent} in {self.home}: it was just removed") from None
                raise Exists(f"layer {new_id} exists") from None
            self.backend.freeze(path)  # not before: a kill in between would leave an active layer that is frozen
            return self.layer(new_id)

    def _new_parent(self, row: sqlite3.Row, parent: str) -> sqlite3.Row | None:
        found = self._row(parent)
        if row["parent"] == found["num"]:
            return None
        if row["parent"] is not None:
            raise Precondition(f"layer {row['id']} stands on another parent already, not on {parent}")
        if self.backend.whole:
            raise Unsupported(f"layer {row['id']}: driver {self.driver} can't put a layer onto another parent")
        if found["kind"] != "committed":
            raise Precondition(f"layer {parent} is {found['kind']}: only a committed one can be a parent")
        return found

    def _sync(self) -> None:
        fd = os.open(self._layers, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            sysio.syncfs(fd)
        finally:
            os.close(fd)

    def remove(self, id: str) -> None:
        with self._guard(id) as row:
            self._refuse_mounted(row, "remove")
            try:
                self._forget(row)
            except NoSpace:
                self.use_reserve()
                self._forget(row)
            except sqlite3.IntegrityError:
                child = self.db.row("SELECT id FROM layers WHERE parent = ?", row["num"])
                raise InUse(f"layer {id} is the parent of {child['id'] if child else 'others'}") from None
            path = self._path(row)
            if os.path.ismount(os.path.join(path, MERGED)):  # a busy one that was let go
                servers.drop(os.path.join(path, MERGED))
            self.server_ended(row, 0.25)  # what one still writes could be in the way
            self._discard(row["directory"])
        with self._guards_lock:
            self._guards.pop(row["num"], None)
        self.make_reserve()

    def _forget(self, row: sqlite3.Row) -> None:
        with self.db.transaction(durable=self.sync) as db:
            db.execute("DELETE FROM layers WHERE num = ?", (row["num"],))

    def exists(self, id: str) -> bool:
        return self.db.row("SELECT 1 FROM layers WHERE id = ?", check_id(id)) is not None

    def layer(self, id: str) -> Layer:
        return self._layer(self._row(id))

    def layers(self) -> list[Layer]:
        rows = self.db.rows("SELECT * FROM layers ORDER BY num")
        names = {row["num"]: row["id"] for row in rows}
        return [
            Layer(
                row["id"], names.get(row["parent"], ""), row["kind"], row["created"], row["updated"],
                json.loads(row["labels"]), row["size"], row["inodes"], row["diff_id"],
            )
            for row in rows
        ]  # fmt: skip

    def set_labels(self, id: str, labels: Mapping[str, str], *, replace: bool) -> Layer:
        with self._guard(id) as row:
            merged = {**({} if replace else json.loads(row["labels"])), **labels}
            kept = {key: value for key, value in merged.items() if value}
            with self.db.transaction() as db:
                db.execute(
                    "UPDATE layers SET labels = ?, updated = ? WHERE num = ?",
                    (json.dumps(kept), time.time(), row["num"]),
                )
            return self.layer(id)
