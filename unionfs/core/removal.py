"""Removing names: a real unlink in the writable layer, a whiteout where something below would show.

The replacement of an entry by its whiteout is one rename, so no crash brings a deleted file back. What is unlinked
while open stays reachable by a descriptor until the kernel forgets it.
"""

from __future__ import annotations

import errno
import os

from unionfs.core.base import fail
from unionfs.core.create import Create
from unionfs.core.layers import Fd, LDir
from unionfs.core.nodes import Dir, Node


class Removal(Create):
    def unlink(self, parent: int, name: bytes) -> None:
        p = self._dir(parent)
        node = self._child(p, name)
        if isinstance(node, Dir):
            raise fail(errno.EISDIR, name)
        self._await_copy(node)
        self._index_first(node)
        holder = self._holder(p, name, node)
        ldir, covered = self._removal_place(p, name, holder, node)
        self._pin(p, name, node)
        if holder is ldir:
            if covered:
                self.driver.swap_for_whiteout(ldir, name, False)
            else:
                os.unlink(name, dir_fd=ldir.open().n)
        else:
            indexed = node.more is not None and node.more.index is not None
            if indexed:
                links = self._links(node)
                self.table.correcting(node, links, links - 1)
            self.driver.whiteout(ldir, name)
            if indexed:
                self._add_nlink_delta(node, -1)
        self._name_removed(p, name, covered, False)
        self._name_gone(p, name, node)
        self._settle(node)

    def _index_first(self, node: Node) -> None:
        """A lower inode with several names goes to the index before one of them does: its link count has to be kept."""
        if not self.driver.index or node.ldir.layer.writable:
            return
        if (node.more is not None and node.more.index is not None) or self._stat(node).st_nlink > 1:
            self.make_writable(node, data=False)

    def rmdir(self, parent: int, name: bytes) -> None:
        p = self._dir(parent)
        node = self._child(p, name)
        if not isinstance(node, Dir):
            raise fail(errno.ENOTDIR, name)
        self._require_empty(node)
        ldir, covered = self._removal_place(p, name, node.ldir if node.ldir.layer.writable else None, node)
        self._remove_dir(p, name, node, ldir, covered)
        self._name_removed(p, name, covered, True)
        self._dir_gone(node)
        self._settle(node)

    def _remove_dir(self, p: Dir, name: bytes, node: Dir, ldir: LDir, covered: bool) -> None:
        present = node.ldirs[0].layer is ldir.layer
        node.extra().pin = node.ldirs[0].open()
        self.table.leaving(node, p, name)
        if not present:
            self.driver.whiteout(ldir, name)
        elif covered:
            self.driver.swap_for_whiteout(ldir, name, True)
        else:
            try:
                os.rmdir(name, dir_fd=ldir.open().n)
            except OSError as e:
                if e.errno != errno.ENOTEMPTY:
                    raise
                self.driver.remove_dir(ldir, name)

    def _holder(self, p: Dir, name: bytes, node: Node) -> LDir | None:
        """The writable layer directory of p that itself has this name; None: the name is only below."""
        more = node.more
        if more is None or more.index is None:
            for ldir in p.ldirs:
                if ldir.layer is node.ldir.layer:
                    return ldir if ldir.layer.writable else None
            return None
        for ldir in p.ldirs:
            if ldir.layer is node.ldir.layer and self.driver.probe(ldir, name):
                return ldir
        return None

    def _removal_place(self, p: Dir, name: bytes, holder: LDir | None, node: Node) -> tuple[LDir, bool]:
        """Where the removal is recorded, and whether something below would show without a whiteout."""
        if holder is not None:
            place = next(ldir for ldir in p.ldirs if ldir.layer is holder.layer)
            return place, len(p.ldirs) > 1 and self._below(p, name, place.layer.index) is not None
        # the inode of a name that is only below may lie in the index, which is above it
        indexed = node.more is not None and node.more.index is not None
        return self.ensure_dir(p, self._place_whiteout(node.ldir.layer.index + indexed)), True

    def _pin(self, p: Dir, name: bytes, node: Node) -> None:
        """Before a file's last name goes: hold its inode."""
        more = node.more
        known = more is not None and (more.aliases or more.pin is not None)
        if not known and node.ldir.layer.writable:
            pin: Fd | None = self.files.get(node.id)
            if pin is None or (more is not None and more.data is not None):
                at = more.index if more is not None and more.index is not None else node.name
                pin = Fd(os.open(at, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=node.ldir.open().n))
            node.extra().pin = pin
        self.table.leaving(node, p, name)

    def _name_gone(self, p: Dir, name: bytes, node: Node) -> None:
        """One of the node's names is no more; the next one takes its place, or the file lives on without a name."""
        more = node.extra()
        if node.parent is p and node.name == name:
            if not more.aliases:
                self._last_name_gone(node)
                return
            node.parent, node.name = more.aliases.pop()
            if more.index is None and node.ldir.layer.writable:
                node.ldir = self.ensure_dir(node.parent, node.ldir.layer)
            elif more.index is None:
                node.ldir = next(ldir for ldir in node.parent.ldirs if ldir.layer is node.ldir.layer)
            self.table.changed(node)
        elif (p, name) in more.aliases:
            more.aliases.remove((p, name))

    def _last_name_gone(self, node: Node) -> None:
        """No known name is left; unknown ones may be, then the inode is found again by lookup."""
        more = node.extra()
        lower_only = not node.ldir.layer.writable
        if lower_only and more.index is None and more.key is None:
            more.unlinked = True
            return
        st = self._stat(node)
        links = st.st_nlink + more.nlink_delta
        if more.index is not None and links <= 0:
            os.unlink(more.index, dir_fd=node.ldir.open().n)
            self.driver.index_removed(node.ldir, more.index)
            more.index = None
        more.unlinked = lower_only or links <= 0
        if more.unlinked and more.data is not None and not lower_only:
            self.driver.inode_gone(self._at(node)[1])
        if not more.unlinked:
            node.parent, node.name = None, b""  # until another name is looked up
        if more.key is not None and more.unlinked and self.table.links.get(more.key) is node:
            del self.table.links[more.key]
        self.table.changed(node)

    def _dir_gone(self, node: Dir) -> None:
        node.removed = True
        node.order = node.names = node.stacks = None
        node.complete = False
        self.table.merged_names -= self.table.merged.pop(node, 0)
        self.table.changed(node)
