"""What is in a layer: archives unpacked into it, its difference to its parent, its size."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

from unionfs import sysio
from unionfs.errors import MountError
from unionfs.store.api import Applied, Change, Precondition, Readable, StoreError, Usage
from unionfs.store.backends import DIFF, MERGED, opened
from unionfs.store.base import OWN_ROOT, failure
from unionfs.store.layertar import layer_tar, tar_size
from unionfs.store.mounting import Mounting
from unionfs.store.tree import Row, Tree
from unionfs.store.unpack import Missing, unpack

_KINDS = {"C": 0, "A": 1, "D": 2}


class Content(Mounting):
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
                raise failure(f"layer {id}", error) from None
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
        if not self.backend.whole and row["kind"] == "active":
            if row["refs"]:
                self._flush(os.path.join(chain[0], MERGED))
            else:
                self.server_ended(row, 1.0)
        return chain, self.backend.rows(chain, base)

    @staticmethod
    def _flush(path: str) -> None:
        """What the kernel still keeps for the mount (-o writeback=1) has to be on disk to be read beside it."""
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
            raise failure(f"layer {id}", error) from None

    def _explained(self, id: str, parent: str | None) -> tuple[list[str], list[Row]]:
        try:
            return self._rows_of(id, parent)
        except OSError as error:
            raise failure(f"layer {id}", error) from None
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
