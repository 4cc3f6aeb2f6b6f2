"""For people: which layer a path comes from, what changed against the layers below, counters."""

from __future__ import annotations

import errno
import os
from stat import S_ISDIR, S_ISLNK, S_ISREG

from unionfs.core.attributes import Attributes
from unionfs.core.base import fail
from unionfs.core.layers import LDir
from unionfs.core.nodes import Dir, Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


class Inspect(Attributes):
    def which(self, path: bytes) -> list[dict[str, Any]]:
        """Every layer that has something to say about a path of the merged view, topmost first."""
        parts = [part for part in path.split(b"/") if part]
        if not parts:
            return [
                self._layer_row(ldir, "merged" if i else "shown", "directory", b"/")
                for i, ldir in enumerate(self.root.ldirs)
            ]
        p: Dir = self.root
        held: list[Node] = []
        try:
            for part in parts[:-1]:
                node = self._child(p, part)
                held.append(node)
                if not isinstance(node, Dir):
                    raise fail(errno.ENOTDIR, part)
                p = node
            return self._which_rows(p, parts[-1])
        finally:
            for node in reversed(held):
                self._settle(node)

    def _which_rows(self, p: Dir, name: bytes) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        merging: set[int] = set()
        node = p.children.get(name)
        fresh = node is None
        if node is None:
            try:
                node = self._child(p, name)
            except FileNotFoundError:
                node = None
        if isinstance(node, Dir):
            for i, ldir in enumerate(node.ldirs):
                rows.append(self._layer_row(ldir, "merged" if i else "shown", "directory", ldir.path()))
                merging.add(ldir.layer.index)
        elif node is not None and node.more is not None and node.more.data is not None:
            data, data_name = node.more.data
            rows.append(self._layer_row(data, "data", "file", data.path().rstrip(b"/") + b"/" + data_name))
        for ldir in p.ldirs:
            if ldir.layer.index in merging:
                continue
            st = self.driver.probe(ldir, name)
            if st is None:
                continue
            above = {row["state"] for row in rows}
            state = "shadowed" if node is None or above & {"shown", "whiteout"} else "shown"
            here = ldir.path().rstrip(b"/") + b"/" + name
            rows.append(self._layer_row(ldir, state if st else "whiteout", _kind_name(st) if st else "whiteout", here))
        if fresh and node is not None:
            self._settle(node)
        rows.sort(key=lambda row: (row["layer"], row["state"] == "data"))
        if not rows:
            raise fail(errno.ENOENT, name)
        return rows

    def _layer_row(self, ldir: LDir, state: str, kind: str, path: bytes) -> dict[str, Any]:
        layer = ldir.layer
        return {
            "layer": layer.index,
            "role": "upper"
            if layer.writable or (layer.index == 0 and self.driver.config.upper is not None)
            else "lower",
            "branch": os.fsdecode(layer.path),
            "permission": layer.permission,
            "state": state,
            "kind": kind,
            "path": os.fsdecode(layer.path.rstrip(b"/") + path),
        }

    def _is_upper(self, ldir: LDir) -> bool:
        layer = ldir.layer
        return layer.writable or (layer.index == 0 and self.driver.config.upper is not None)

    def diff(self) -> list[tuple[str, bytes]]:
        """Added, changed and deleted paths of the writable layers against those below."""
        out: list[tuple[str, bytes]] = []
        self._diff_dir(self.root, b"", out)
        out.sort(key=lambda row: row[1])
        return out

    def _diff_dir(self, d: Dir, path: bytes, out: list[tuple[str, bytes]]) -> bool:
        """Append d's changes; True if there were any."""
        before = len(out)
        for ldir in d.ldirs:
            if not self._is_upper(ldir):
                continue
            entries, whiteouts = self.driver.scan(ldir)
            for name in whiteouts:
                if self._below(d, name, ldir.layer.index) is not None:
                    out.append(("D", path + b"/" + name))
            for name, is_dir in entries:
                below = self._below(d, name, ldir.layer.index)
                node = self._child(d, name)
                here = path + b"/" + name
                if isinstance(node, Dir) and is_dir:
                    if below is None or not S_ISDIR(below.st_mode):
                        out.append(("C" if below is not None else "A", here))
                        self._add_all(node, here, out)
                    elif len(node.ldirs) == 1 or node.redirect is not None:
                        out.append(("C", here))
                        self._diff_opaque(d, name, node, here, out)
                    elif self._diff_dir(node, here, out) or self._meta_differs(node, below):
                        out.append(("C", here))
                else:
                    out.append(("A" if below is None else "C", here))
                self._settle(node)
        return len(out) > before

    def _diff_opaque(self, p: Dir, name: bytes, node: Dir, path: bytes, out: list[tuple[str, bytes]]) -> None:
        """A directory that hides the one below: what was in that one and is not here was deleted."""
        top = node.ldir.layer.index
        hidden = next(ldir for ldir in p.ldirs if ldir.layer.index > top and self.driver.probe(ldir, name))
        old = {entry for entry, _ in self.driver.scan(hidden.child(name))[0]}
        self._list(node)
        new = set(self._visible(node))
        out.extend(("D", path + b"/" + entry) for entry in old - new)
        for entry in new:
            child = self._child(node, entry)
            out.append(("C" if entry in old else "A", path + b"/" + entry))
            if isinstance(child, Dir):
                self._add_all(child, path + b"/" + entry, out)
            self._settle(child)

    def _add_all(self, d: Dir, path: bytes, out: list[tuple[str, bytes]]) -> None:
        self._list(d)
        for name in self._visible(d):
            try:
                node = self._child(d, name)
            except FileNotFoundError:
                continue
            out.append(("A", path + b"/" + name))
            if isinstance(node, Dir):
                self._add_all(node, path + b"/" + name, out)
            self._settle(node)

    def _meta_differs(self, node: Dir, below: os.stat_result) -> bool:
        st = self._stat(node)
        return (st.st_mode, st.st_uid, st.st_gid) != (below.st_mode, below.st_uid, below.st_gid)

    def statistics(self) -> dict[str, Any]:
        return {
            "driver": self.driver.name,
            "driver_status": self.driver.status(),
            "read_only": self.driver.read_only,
            "layers": [
                {"index": layer.index, "path": os.fsdecode(layer.path), "permission": layer.permission}
                for layer in self.driver.layers
            ],
            "nodes": self.table.count,
            "open_files": len(self.files),
            "open_directories": len(self.driver.fds),
            "merged_directories": len(self.table.merged),
            "merged_names": self.table.merged_names,
            "copied_up_files": self.copied_files,
            "copied_up_bytes": self.copied_up,
        }

    def control_verbs(self) -> dict[str, Any]:
        return self.driver.control_verbs()


def _kind_name(st: os.stat_result) -> str:
    if S_ISREG(st.st_mode):
        return "file"
    return "directory" if S_ISDIR(st.st_mode) else "symlink" if S_ISLNK(st.st_mode) else "special"
