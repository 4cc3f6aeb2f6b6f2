"""Finding names: one stat in the layer that has it.

Directories are merged once and remembered: the layers above the bottom are listed at the first lookup (`Dir.names`),
so a lookup costs the same with 1 lower and with 500. The bottom layer is asked per name.
"""

from __future__ import annotations

import errno
import os
from stat import S_ISDIR

from unionfs.api import Entry
from unionfs.core.base import KINDS, LAYER_GONE, Base, fail
from unionfs.core.layers import LDir, fd_path
from unionfs.core.nodes import Dir, Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

NAMES_LIMIT = 1_000_000  # names remembered over all directories


class Lookup(Base):
    def lookup(self, parent: int, name: bytes) -> Entry | None:
        p = self._dir(parent)
        table = self.table
        node = p.children.get(name)
        if node is not None:
            nodeid = node.id
            table.counts[nodeid] += 1
            if nodeid:
                try:
                    return nodeid, table.generations[nodeid], self._attr(node, self._stat(node))
                except OSError as e:
                    self.forget(nodeid, 1)
                    if e.errno == errno.ENOENT:
                        return None
                    raise
        found = self._find(p, name)
        if found is None:
            return None
        ldir, st = found
        node = self._adopt(p, name, ldir, st)
        return self._entry(node, st if node.more is None else self._stat(node))

    def _find(self, p: Dir, name: bytes) -> tuple[LDir, os.stat_result] | None:
        """The topmost layer directory of p that has name, and its attributes there."""
        if p.removed:
            return None
        names = p.names
        if names is None and len(p.ldirs) > 1:
            if len(name) > 255:
                raise fail(errno.ENAMETOOLONG, name)
            names = self._merge(p, name)
        ldir = names.get(name) if names is not None else None
        if ldir is None:
            if names is not None:
                if len(name) > 255:
                    raise fail(errno.ENAMETOOLONG, name)
                if p.complete or name in names:
                    return None
            if self.driver.reserved(name):
                return None
            ldir = p.ldirs[-1]
        st = self.driver.probe(ldir, name)
        return (ldir, st) if st else None

    def _merge(self, p: Dir, wanted: bytes | None = None) -> dict[bytes, LDir | None]:
        """List the layers above the bottom: who has which name first.

        Where one of them is gone (a dead server), those above it are enough if they know `wanted`; that is not kept.
        """
        names: dict[bytes, LDir | None] = {}
        stacks: dict[bytes, list[LDir | None]] = {}
        for ldir in p.ldirs[:-1]:
            try:
                self._merge_layer(names, stacks, ldir)
            except OSError as e:
                if e.errno not in LAYER_GONE or wanted not in names:
                    raise
                return names
        p.names, p.stacks, p.complete = names, stacks, False
        self._remember(p, len(names))
        return names

    def _merge_layer(self, names: dict[bytes, LDir | None], stacks: dict[bytes, list[LDir | None]], ldir: LDir) -> None:
        entries, whiteouts = self.driver.scan(ldir)
        for name, is_dir in entries:
            if name not in names:
                names[name] = ldir
                if is_dir:
                    stacks[name] = [ldir]
            else:
                stack = stacks.get(name)
                if stack is not None and stack[-1] is not None:
                    stack.append(ldir if is_dir else None)
        for name in whiteouts:
            if name not in names:
                names[name] = None
            else:
                stack = stacks.get(name)
                if stack is not None and stack[-1] is not None:
                    stack.append(None)  # also beside its own entry: that stands, nothing below joins

    def _remember(self, p: Dir, count: int) -> None:
        """Bound the names that are remembered: the directories merged longest ago are merged again when needed."""
        table = self.table
        kept = table.merged
        old = kept.pop(p, 0)
        kept[p] = count
        table.merged_names += count - old
        while table.merged_names > NAMES_LIMIT and len(kept) > 1:
            victim = next(iter(kept))
            table.merged_names -= kept.pop(victim)
            victim.names = victim.stacks = victim.order = None
            victim.complete = False

    # --- new nodes ---

    def _adopt(self, p: Dir, name: bytes, ldir: LDir, st: os.stat_result) -> Node:
        """A node for what was found: an existing one where the inode is known under another name."""
        kind = KINDS[st.st_mode & 0o170000]
        if kind == 0o040000:
            return self._add(p, name, self._new_dir(p, name, ldir, st))
        if st.st_nlink > 1:
            known = self._linked(p, name, ldir, st)
            if known is not None:
                return known
        ino = st.st_ino if self.ino_base.get(st.st_dev) == 0 else self.ino_of(st)
        node = Node(p, name, ldir, ino, kind)
        if ldir.impure is not False and ldir.layer.index < self.bottom:
            self._read_file_marks(node, st)
        if st.st_nlink > 1:
            self._register_link(node, st)
        return self._add(p, name, node)

    def _add(self, p: Dir, name: bytes, node: Node) -> Node:
        self.table.add(node)
        known = p.children.setdefault(name, node)
        if known is not node:
            if known.id:  # another thread was faster
                self.table.drop(node)
                return known
            p.children[name] = node
        return node

    def _read_file_marks(self, node: Node, st: os.stat_result) -> None:
        marks = self.driver.file_marks(node.ldir, node.name)
        if marks is None:
            return
        if marks.ino is not None:
            node.ino = marks.ino
        if marks.index_delta is not None or marks.lower_delta is not None:
            more = node.extra()
            more.nlink_delta = marks.index_delta or 0
            path = fd_path(node.ldir.open(), node.name)
            index = self.driver.index_dir(node.ldir.layer)
            if marks.index is not None and index is not None:
                more.index = marks.index
                node.ldir = index
            if marks.lower_delta is not None:
                self._end_in_flight(node, path, self._lower_links(node) + marks.lower_delta - st.st_nlink)
        if marks.nested_whiteout:
            node.extra().nested_whiteout = True
            node.kind = 0o020000
        if marks.metacopy:
            assert node.parent is not None
            path = marks.redirect or node.name
            if not path.startswith(b"/"):
                path = self._path_below(node.parent) + b"/" + path
            found = self._resolve_below(path, node.ldir.layer.index)
            if found is None:
                raise fail(errno.EIO, node.name)  # the lower that holds the data is gone
            node.extra().data = found

    def _end_in_flight(self, node: Node, path: bytes, delta: int) -> None:
        """The link count was noted by the lower inode's, so that a copy-up could be cut short, and that was so."""
        node.extra().nlink_delta = delta
        if not self.driver.read_only and node.ldir.layer.writable:
            self.driver.set_nlink_delta(path, delta)

    def _lower_links(self, node: Node) -> int:
        """How many links the inode has that this one was copied from: its first name is the one below it."""
        assert node.parent is not None
        path = self._path_below(node.parent) + b"/" + node.name
        found = self._resolve_below(path, node.ldir.layer.index)
        if found is None:
            return 1
        return os.stat(found[1], dir_fd=found[0].open().n, follow_symlinks=False).st_nlink

    # --- hard links ---

    def _linked(self, p: Dir, name: bytes, ldir: LDir, st: os.stat_result) -> Node | None:
        """The node of an inode with several names, when it is known already or was copied up under another name."""
        links = self.table.links
        node = links.get((st.st_dev, st.st_ino))
        if node is None and self.driver.index and not ldir.layer.writable:
            indexed = self.driver.index_find(ldir, name, st)
            if indexed is not None:
                node = self._indexed(p, name, ldir, st, *indexed)
        if node is None:
            return None
        if node.parent is None:  # all names that were known are gone: this one is the first again
            node.parent, node.name = p, name
            if node.more is None or node.more.index is None:
                node.ldir = ldir
            self.table.changed(node)
        elif not (node.parent is p and node.name == name):
            node.extra().aliases.append((p, name))
        p.children[name] = node
        return node

    def _indexed(self, p: Dir, name: bytes, ldir: LDir, st: os.stat_result, index: LDir, entry: bytes) -> Node:
        """A lower hard link whose inode was copied up: the node sits in the index."""
        upper = os.stat(entry, dir_fd=index.open().n, follow_symlinks=False)
        known = self.table.links.get((upper.st_dev, upper.st_ino))
        if known is not None:
            more = known.extra()
            if more.index is None:  # found by a name in the upper layer first
                more.index, known.ldir = entry, index
            return known
        node = self._new_indexed(p, name, ldir, st, index, entry, upper)
        self._register_link(node, upper)
        self.table.add(node)
        return node

    def _new_indexed(
        self, p: Dir, name: bytes, ldir: LDir, st: os.stat_result, index: LDir, entry: bytes, upper: os.stat_result
    ) -> Node:
        node = Node(p, name, index, self.ino_of(st), KINDS[st.st_mode & 0o170000])
        more = node.extra()
        more.index = entry
        marks = self.driver.file_marks(index, entry)
        if marks is not None:
            if marks.ino is not None:
                node.ino = marks.ino  # the lower name's own may be a copy too, with a number from further down
            more.nlink_delta = marks.index_delta or 0
            if marks.lower_delta is not None:
                path = fd_path(index.open(), entry)
                self._end_in_flight(node, path, st.st_nlink + marks.lower_delta - upper.st_nlink)
            if marks.metacopy:
                more.data = (ldir, name)
        return node

    def _register_link(self, node: Node, st: os.stat_result) -> None:
        more = node.extra()
        more.key = (st.st_dev, st.st_ino)
        self.table.links[more.key] = node
        self.table.changed(node)

    # --- directories ---

    def _new_dir(self, p: Dir, name: bytes, ldir: LDir, st: os.stat_result) -> Dir:
        """A directory found in ldir: which layers below merge with it."""
        at = p.ldirs.index(ldir)
        first = ldir.child(name)
        if ldir.layer.index == self.bottom:
            return Dir(p, name, [first], self.ino_of(st))
        stack = [first]
        redirect: bytes | None = None
        candidates = self._candidates(p, name, at)
        current = first
        while True:
            if current.layer.index == self.bottom:
                break
            try:
                marks = self.driver.marks(current)
            except OSError as e:
                if e.errno not in LAYER_GONE or current is first:
                    raise
                break
            if marks.redirect is not None:
                if current is first and ldir.layer.writable:
                    redirect = self._absolute(p, marks.redirect)
                if not marks.opaque:
                    self._follow(stack, p, marks.redirect, current.layer.index)
                break
            if marks.opaque:
                break
            following = next(candidates, None)
            if following is None:
                break
            stack.append(following)
            current = following
        d = Dir(p, name, stack, self.ino_of(st if len(stack) == 1 else self._lowest(stack, st)))
        d.redirect = redirect
        return d

    @staticmethod
    def _lowest(stack: list[LDir], st: os.stat_result) -> os.stat_result:
        """Attributes of the lowest directory of a stack, whose number the merged one shows; st: of the topmost."""
        try:
            return os.fstat(stack[-1].open().n)
        except OSError as e:
            if e.errno not in LAYER_GONE:
                raise
            return st

    def _candidates(self, p: Dir, name: bytes, at: int) -> Iterator[LDir]:
        """The layer directories below p.ldirs[at] that have `name` as a directory, until something cuts them off."""
        known = p.stacks.get(name) if p.stacks is not None else None
        if known is not None and known[0] is p.ldirs[at]:
            for ldir in known[1:]:
                if ldir is None:
                    return
                yield ldir.child(name)
            rest = [p.ldirs[-1]] if known[-1] is not p.ldirs[-1] else []
        else:
            rest = p.ldirs[at + 1 :] if not self.driver.cut_off(p.ldirs[at], name) else []
        for ldir in rest:
            try:
                st = self.driver.probe(ldir, name)
            except OSError as e:
                if e.errno not in LAYER_GONE:
                    raise
                yield ldir.child(name)  # as if it were there: what is not found above it is its error
                return
            if st is None:
                continue
            if not st or not S_ISDIR(st.st_mode):
                return
            yield ldir.child(name)
            if self.driver.cut_off(ldir, name):
                return

    def _absolute(self, p: Dir, redirect: bytes) -> bytes:
        return redirect if redirect.startswith(b"/") else self._path_below(p) + b"/" + redirect

    def _follow(self, stack: list[LDir], p: Dir, redirect: bytes, above: int) -> None:
        """Add the layers below `above` that have the redirected directory (kernel: ovl_lookup_layer)."""
        path = self._absolute(p, redirect)
        for layer in self.driver.layers[above + 1 :]:
            found, path, stop = self._walk(layer.root, path, layer.index == self.bottom)
            if found is not None:
                stack.append(found)
            if stop:
                return

    def _walk(self, root: LDir, path: bytes, last_layer: bool) -> tuple[LDir | None, bytes, bool]:
        """Walk a redirect in one layer: (directory or None, the path for the layers below, look no further)."""
        parts = [part for part in path.split(b"/") if part]
        if any(part in (b".", b"..") or len(part) > 255 for part in parts) or b"\0" in path:
            raise fail(errno.EIO, path)  # a layer that tries to lead outside
        here = root
        stop = False
        for i, part in enumerate(parts):
            st = self.driver.probe(here, part)
            if st is None:
                return None, path, stop
            if not st or not S_ISDIR(st.st_mode):
                return None, path, True
            here = here.child(part)
            if last_layer:
                continue
            marks = self.driver.marks(here)
            if marks.opaque:
                stop = True
            if marks.redirect is not None:
                tail = b"".join(b"/" + rest for rest in parts[i + 1 :])
                if marks.redirect.startswith(b"/"):
                    path = marks.redirect + tail
                else:
                    path = b"".join(b"/" + up for up in parts[:i]) + b"/" + marks.redirect + tail
        return here, path, stop

    def _resolve_below(self, path: bytes, above: int) -> tuple[LDir, bytes] | None:
        """The regular file at `path` in the layers below `above`, skipping metacopies: where the data is."""
        head, _, name = path.rpartition(b"/")
        for layer in self.driver.layers[above + 1 :]:
            last = layer.index == self.bottom
            here, head, stop = self._walk(layer.root, head, last)
            if here is not None:
                st = self.driver.probe(here, name)
                if st is False:
                    return None
                if st:
                    marks = None if last else self.driver.file_marks(here, name)
                    if marks is None or not marks.metacopy or marks.mapped:
                        return here, name
                    if marks.redirect is not None:
                        target = marks.redirect
                        head, _, name = (target if target.startswith(b"/") else head + b"/" + target).rpartition(b"/")
            if stop:
                return None
        return None

    def _path_below(self, d: Dir) -> bytes:
        """Where the layers below look for d: its merged path, the nearest redirect in place of what leads to it."""
        parts: list[bytes] = []
        here: Dir | None = d
        while here is not None and here.parent is not None:
            if here.redirect is not None and here.ldir.layer.writable:  # else a snapshot froze it at its place
                return here.redirect + b"".join(b"/" + part for part in reversed(parts))
            parts.append(here.name)
            here = here.parent
        return b"".join(b"/" + part for part in reversed(parts))

    # --- for operations by name ---

    def _child(self, p: Dir, name: bytes) -> Node:
        """The node that p has under name. ENOENT. It may be new to the kernel: the caller lets `_settle` drop it."""
        node = p.children.get(name)
        if node is not None and node.id:
            return node
        found = self._find(p, name)
        if found is None:
            raise fail(errno.ENOENT, name)
        return self._adopt(p, name, *found)

    def _settle(self, node: Node) -> None:
        """Drop a node that only this operation needed."""
        if node.id and not self.table.counts[node.id]:
            self.forget(node.id, 0)

    def _below(self, p: Dir, name: bytes, layer_index: int) -> os.stat_result | None:
        """What would show under name if the layers down to layer_index did not have it."""
        for ldir in p.ldirs:
            if ldir.layer.index <= layer_index:
                continue
            st = self.driver.probe(ldir, name)
            if st is not None:
                return st or None
        return None
