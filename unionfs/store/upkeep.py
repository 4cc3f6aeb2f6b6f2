"""For people, and after crashes: what a store says of itself, garbage, checks and repairs."""

from __future__ import annotations

import json
import os
import sqlite3

from unionfs.store import servers
from unionfs.store.backends import DIFF, MERGED, filesystem_magic
from unionfs.store.base import IMAGE_LAYER, UNPACKING
from unionfs.store.content import Content

_FILESYSTEMS = {
    0xEF53: "extfs", 0x58465342: "xfs", 0x9123683E: "btrfs", 0x01021994: "tmpfs", 0x794C7630: "overlayfs",
    0x65735546: "fuse", 0x6969: "nfs", 0x2FC12FC1: "zfs", 0xF2F52010: "f2fs",
}  # fmt: skip


class Upkeep(Content):
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
        with self.images_lock:
            gone += self._drop_unnamed()
        for row in self.db.rows("SELECT * FROM layers WHERE kind = 'committed'"):  # what a kill kept commit from
            self.backend.freeze(self._path(row))
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

    def _drop_unnamed(self) -> list[str]:
        """Images' layers that no image has: its loading was interrupted."""
        gone: list[str] = []
        while unused := [
            row["id"]
            for row in self.db.rows(
                "SELECT * FROM layers WHERE kind = 'committed' AND num NOT IN (SELECT parent FROM layers WHERE parent)"
                " AND id NOT IN (SELECT layer FROM images)"
            )
            if IMAGE_LAYER in json.loads(row["labels"])
        ]:
            for id in unused:
                self.release(id)
                self.remove(id)
                gone.append(f"layer {id}: no image has it")
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
                expected.append(MERGED)
            missing = [name for name in expected if not os.path.isdir(os.path.join(path, name))]
            if DIFF in missing:
                found.append(f"layer {row['id']}: its content {path}/{DIFF} is gone")
                lost.append(row)
            elif missing:
                found.append(f"layer {row['id']}: {', '.join(missing)} missing in {path}")
                if repair:
                    for name in missing:
                        os.makedirs(os.path.join(path, name), 0o755)
        found += self._dangling(repair)
        garbage = set(os.listdir(self._layers)) - named - self._making
        found += [f"{self._layers}/{name}: belongs to no layer (cleanup removes it)" for name in sorted(garbage)]
        if repair:
            found += [f"removed: layer {row['id']}" for row in lost if self._give_up(row)]
            found += [f"removed: {path}" for path in self.cleanup()]
        return found

    def _dangling(self, repair: bool) -> list[str]:
        """Images and containers whose layer is not there."""
        found = []
        for table, key, noun in (("images", "name", "image"), ("containers", "id", "container")):
            missing = "layer != '' AND layer NOT IN (SELECT id FROM layers)"
            for row in self.db.rows(f"SELECT {key}, layer FROM {table} WHERE {missing}"):
                found.append(f"{noun} {row[0]}: its layer {row['layer']} is gone")
                if repair:
                    with self.db.transaction(durable=True) as db:
                        db.execute(f"DELETE FROM {table} WHERE {key} = ?", (row[0],))
                    found.append(f"removed: {noun} {row[0]}")
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


def _has_d_type(path: str) -> bool:
    with os.scandir(os.path.dirname(path)) as entries:
        return any(entry.is_dir(follow_symlinks=False) for entry in entries)
