"""`LayerStore`: the store behind the seam of `api`, for every driver; the driver's part is a `Backend`.

On disk, below DATA_ROOT/DRIVER:
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

from unionfs import sysio
from unionfs.errors import MountError, nearest
from unionfs.store import servers
from unionfs.store.api import (
    DRIVERS,
    Applied,
    Change,
    Exists,
    InUse,
    Invalid,
    Kind,
    Layer,
    NoSpace,
    NotFound,
    Precondition,
    Readable,
    Store,
    StoreError,
    Unsupported,
    Usage,
    check_id,
)
from unionfs.store.backends import DIFF, MERGED, WORK, filesystem_magic, make_backend, opened
from unionfs.store.db import Database
from unionfs.store.layertar import layer_tar, tar_size
from unionfs.store.tree import Row, Tree
from unionfs.store.unpack import Limits, Missing, unpack

OWN_ROOT = "own_root"  # in a layer's options: its archive had an entry for the root directory
UNPACKING = "unionfs.unpacking"  # label of an active layer that whoever opens the store next need not keep

OPTIONS = {
    "sync": "on|off: committed layers are on disk before commit returns (default on)",
    "mountopt": "options for every mount, as `unionfs mount -o` takes them",
    "size": "quota of each new active layer, where the driver can",
    "apply.max_size": "bytes that one archive may have unpacked (default 1t)",
    "apply.max_entries": "entries that one archive may have (default 10000000)",
}
_KINDS = {"C": 0, "A": 1, "D": 2}
_FILESYSTEMS = {
    0xEF53: "extfs", 0x58465342: "xfs", 0x9123683E: "btrfs", 0x01021994: "tmpfs", 0x794C7630: "overlayfs",
    0x65735546: "fuse", 0x6969: "nfs", 0x2FC12FC1: "zfs", 0xF2F52010: "f2fs",
}  # fmt: skip


class LayerStore(Store):
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
        self._servers = servers.Servers()
        self._guards: dict[int, threading.RLock] = {}
        self._guards_lock = threading.Lock()
        self._making: set[str] = set()
        self.images_lock = threading.RLock()  # see `images`
        self._forget_lost_mounts()

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
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(fd, 64, 0).decode("ascii", "replace").strip()
            os.close(fd)
            raise InUse(
                f"{self.home} is in use by process {holder or '?'}: if that is the daemon, go through it "
                "(unionfs -H unix:///run/unionfs.sock ...)"
            ) from None
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
        return fd

    def close(self) -> None:
        self._servers.close()
        self.db.close()
        os.close(self._lock_fd)

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

    # --- layers ---

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
        unknown = set(settings) - {"size"}
        if unknown:
            raise Invalid(f"layer {id}: unknown option {min(unknown)!r}: the one known is size")
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
                raise _failure(f"new layer in {self._layers}", error) from None
            raise
        return name

    def _discard(self, directory: str) -> None:
        """Deletes what no row names any more. What resists is for `cleanup`."""
        try:
            self.backend.delete(os.path.join(self._layers, directory))
        except OSError:
            pass

    def commit(self, id: str, new_id: str, *, labels: Mapping[str, str] | None = None, parent: str = "") -> Layer:
        check_id(new_id)
        with self._guard(id) as row:
            if row["kind"] != "active":
                raise Precondition(f"layer {id} is {row['kind']}, only an active one can be committed")
            if new_id != id and self.db.row("SELECT 1 FROM layers WHERE id = ?", new_id) is not None:
                raise Exists(f"layer {new_id} exists")
            path = self._path(row)
            self._refuse_mounted(row, "commit")
            base = self._new_parent(row, parent) if parent else None
            try:
                if base is not None and not json.loads(row["options"]).get(OWN_ROOT):
                    self.backend.inherit_root(path, self._path(base))
                if flatten := self.backend.flatten(self._chain(row)):
                    self._servers.run(flatten)
                self.backend.freeze(path)
                if self.sync:
                    self._sync()
            except OSError as error:
                raise _failure(f"layer {id}", error) from None
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
                with self.db.transaction(durable=self.sync) as db:
                    db.execute("DELETE FROM layers WHERE num = ?", (row["num"],))
            except sqlite3.IntegrityError:
                child = self.db.row("SELECT id FROM layers WHERE parent = ?", row["num"])
                raise InUse(f"layer {id} is the parent of {child['id'] if child else 'others'}") from None
            path = self._path(row)
            if os.path.ismount(os.path.join(path, MERGED)):  # a busy one that was let go
                servers.drop(os.path.join(path, MERGED))
            self._discard(row["directory"])
        with self._guards_lock:
            self._guards.pop(row["num"], None)

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

    # --- mounts ---

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

    def _options_for(self, row: sqlite3.Row) -> str:
        size = json.loads(row["options"]).get("size")
        words = [self._mount_options, f"size={size}" if size and row["kind"] == "active" else ""]
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
                self._servers.run(["umount", "--timeout", "2", "--", path])
            except StoreError:  # busy, or its server is dead or not ours to see
                if path in servers.mountpoints(self._path(row)):
                    servers.drop(path)
        self._set_refs(row, 0)

    def unmount_elsewhere(self, path: str) -> None:
        """Ends a mount of a layer that somebody made outside of the store's directories."""
        self._servers.run(["umount", "--timeout", "2", "--", path])

    def mounted(self) -> dict[str, tuple[str, int]]:
        inside = DIFF if self.backend.whole else MERGED
        rows = self.db.rows("SELECT * FROM layers WHERE refs > 0 ORDER BY num")
        return {row["id"]: (os.path.join(self._path(row), inside), row["refs"]) for row in rows}

    def _refuse_mounted(self, row: sqlite3.Row, what: str) -> None:
        if row["refs"]:
            raise InUse(f"layer {row['id']} is mounted ({row['refs']} references): unmount it to {what} it")

    def branches(self, id: str) -> tuple[list[str], str, str]:
        row = self._row(id)
        return self.backend.branches(self._chain(row), row["kind"] == "active")

    # --- content ---

    def apply(self, id: str, stream: Readable, *, alone: bool = False) -> Applied:
        """`alone`: the layer will be put onto a parent later; NeedsParent if the archive can't be unpacked before."""
        with self._guard(id) as row:
            if row["kind"] != "active":
                raise Precondition(f"layer {id} is {row['kind']}: only an active one takes an archive")
            self._refuse_mounted(row, "unpack into")
            chain = self._chain(row)
            target = os.path.join(chain[0], DIFF)
            try:
                below: Tree | None = Missing() if alone else None
                if len(chain) > 1 and self.backend.format.hides:
                    below = self.backend.tree(chain[1:])
                applied, own_root = unpack(target, stream, self.backend.format, below, self.limits)
            except OSError as error:
                raise _failure(f"layer {id}", error) from None
            except MountError as error:
                raise StoreError(f"layer {id}: {error}") from None
            settings = json.loads(row["options"])
            if own_root:
                settings[OWN_ROOT] = True
            with self.db.transaction() as db:
                db.execute(
                    "UPDATE layers SET diff_id = ?, options = ? WHERE num = ?",
                    (applied.diff_id, json.dumps(settings), row["num"]),
                )
            return applied

    def _rows_of(self, id: str, parent: str | None) -> tuple[list[str], list[Row]]:
        row = self._row(id)
        chain = self._chain(row)
        base = chain[1:] if parent is None else self._chain(self._row(parent)) if parent else []
        if row["refs"] and not self.backend.whole:
            self._flush(os.path.join(chain[0], MERGED))
        return chain, self.backend.rows(chain, base)

    @staticmethod
    def _flush(path: str) -> None:
        """What the mount's server still keeps to itself (row's block maps) has to be on disk to be read beside it."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return  # its server is dead: the disk is all there is
        try:
            sysio.syncfs(fd)
        finally:
            os.close(fd)

    def diff(self, id: str, parent: str | None = None) -> Iterator[bytes]:
        chain, rows = self._explained(id, parent)
        return self._tar(id, chain, rows)

    def _tar(self, id: str, chain: list[str], rows: list[Row]) -> Iterator[bytes]:
        try:
            with opened(self.backend.tree(chain)) as tree:
                yield from layer_tar(tree, rows)
        except OSError as error:
            raise _failure(f"layer {id}", error) from None

    def _explained(self, id: str, parent: str | None) -> tuple[list[str], list[Row]]:
        try:
            return self._rows_of(id, parent)
        except OSError as error:
            raise _failure(f"layer {id}", error) from None
        except MountError as error:
            raise StoreError(f"layer {id}: {error}") from None
        except RecursionError:
            raise StoreError(f"layer {id}: its directories are nested too deep to compare") from None

    def changes(self, id: str, parent: str | None = None) -> list[Change]:
        _, rows = self._explained(id, parent)
        return [Change(path.decode("utf-8", "surrogateescape"), _KINDS[kind]) for kind, path in rows]

    def diff_size(self, id: str, parent: str | None = None) -> int:
        chain, rows = self._explained(id, parent)
        with opened(self.backend.tree(chain)) as tree:
            return tar_size(tree, rows)

    def usage(self, id: str) -> Usage:
        row = self._row(id)
        if row["size"] >= 0:
            return Usage(row["size"], row["inodes"])
        return self.backend.usage(self._chain(row))

    # --- people and upkeep ---

    def metadata(self, id: str) -> dict[str, str]:
        row = self._row(id)
        lowers, upper, work = self.backend.branches(self._chain(row), row["kind"] == "active")
        merged = upper or (lowers[0] if lowers else "") if self.backend.whole else os.path.join(self._path(row), MERGED)
        found = {"LowerDir": ":".join(lowers), "UpperDir": upper, "WorkDir": work, "MergedDir": merged}
        return {key: value for key, value in found.items() if value}

    def status(self) -> list[tuple[str, str]]:
        magic = filesystem_magic(self.home)
        (count,) = self.db.rows("SELECT count(*) FROM layers")[0]
        return [
            ("Backing Filesystem", _FILESYSTEMS.get(magic, hex(magic))),
            ("Supports d_type", "true" if _has_d_type(self._layers) else "false"),
            ("Native Diff", "false" if self.backend.whole else "true"),
            ("Layers", str(count)),
            ("Mounted", str(len(self.mounted()))),
            ("Sync", "on" if self.sync else "off"),
            *self.backend.status(),
        ]

    def cleanup(self) -> list[str]:
        gone = []
        for row in self.db.rows("SELECT * FROM layers WHERE kind = 'active' ORDER BY num DESC"):
            if json.loads(row["labels"]).get(UNPACKING, str(os.getpid())) != str(os.getpid()):
                self.release(row["id"])
                self.remove(row["id"])
                gone.append(f"layer {row['id']}: its unpacking was interrupted")
        making = set(self._making)  # before the database is asked: a name leaves it after its row is there
        named = {row["directory"] for row in self.db.rows("SELECT directory FROM layers")}
        there = servers.mountpoints(self._layers)
        for name in sorted(os.listdir(self._layers)):
            path = os.path.join(self._layers, name)
            if name in named or name in making or name in self._making:
                continue
            if os.path.join(path, MERGED) in there:
                servers.drop(os.path.join(path, MERGED))
            if os.path.isdir(path):
                self.backend.delete(path)
            else:
                os.unlink(path)
            gone.append(path)
        return gone

    def fsck(self, repair: bool = False) -> list[str]:
        found = [f"{self.home}/store.db: {text}" for text in self.db.problems()]
        lost: list[sqlite3.Row] = []
        named = set()
        for row in self.db.rows("SELECT * FROM layers ORDER BY num DESC"):
            named.add(row["directory"])
            path = self._path(row)
            expected = [DIFF] if row["kind"] != "view" or self.backend.whole else []
            if not self.backend.whole:
                expected += [MERGED] if row["kind"] != "active" else [MERGED, WORK]
            missing = [name for name in expected if not os.path.isdir(os.path.join(path, name))]
            if DIFF in missing:
                found.append(f"layer {row['id']}: its content {path}/{DIFF} is gone")
                lost.append(row)
            elif missing:
                found.append(f"layer {row['id']}: {', '.join(missing)} missing in {path}")
                if repair:
                    for name in missing:
                        os.makedirs(os.path.join(path, name), 0o700 if name == WORK else 0o755)
        garbage = set(os.listdir(self._layers)) - named - self._making
        found += [f"{self._layers}/{name}: belongs to no layer (cleanup removes it)" for name in sorted(garbage)]
        if repair:
            found += [f"removed: layer {row['id']}" for row in lost if self._give_up(row)]
            found += [f"removed: {path}" for path in self.cleanup()]
        return found

    def _give_up(self, row: sqlite3.Row) -> bool:
        """A layer without content goes, unless others stand on it."""
        try:
            with self.db.transaction(durable=True) as db:
                db.execute("DELETE FROM layers WHERE num = ?", (row["num"],))
        except sqlite3.IntegrityError:
            return False
        self._discard(row["directory"])
        return True


def parse_size(what: str, text: str) -> int:
    """1024, 10k, 10m, 10g, 10t: bytes. Invalid for anything else."""
    match = re.fullmatch(r"([0-9]{1,18})([kmgt]?)i?b?", text.strip().lower())
    if match is None:
        raise Invalid(f"{what}={text}: not a size: 500m, 10g")
    return int(match[1]) << {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}[match[2]]


def _has_d_type(path: str) -> bool:
    with os.scandir(os.path.dirname(path)) as entries:
        return any(entry.is_dir(follow_symlinks=False) for entry in entries)


def _failure(what: str, error: OSError) -> StoreError:
    where = f" ({os.fsdecode(error.filename)})" if error.filename else ""
    text = f"{what}: {error.strerror}{where}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace(f"{text}: make room")
    return StoreError(text)
