"""rename, with all its flags, within one writable layer.

The source is copied up (metadata only where the driver can), directories that merge with lower ones get a redirect
that says where the layers below know them, and what stays behind is a whiteout where something below would show
(in the same step, by RENAME_WHITEOUT, where the filesystem can).
"""

from __future__ import annotations

import errno

from unionfs.core.base import fail
from unionfs.core.layers import Layer, LDir
from unionfs.core.nodes import Dir, Node
from unionfs.core.removal import Removal
from unionfs.sysio import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT


class Rename(Removal):
    def rename(self, parent: int, name: bytes, newparent: int, newname: bytes, flags: int) -> None:
        if flags & ~(RENAME_NOREPLACE | RENAME_EXCHANGE | RENAME_WHITEOUT):
            raise fail(errno.EINVAL)
        p, q = self._dir(parent), self._dir(newparent)
        self._check_name(q, newname)
        node = self._child(p, name)
        try:
            target: Node | None = self._child(q, newname)
        except FileNotFoundError:
            target = None
        if target is node:
            return
        if flags & RENAME_EXCHANGE:
            if target is None:
                raise fail(errno.ENOENT, newname)
            self._exchange(p, name, node, q, newname, target)
            return
        if target is not None:
            if flags & RENAME_NOREPLACE:
                raise fail(errno.EEXIST, newname)
            if isinstance(target, Dir):
                if not isinstance(node, Dir):
                    raise fail(errno.EISDIR, newname)
                self._require_empty(target)
            elif isinstance(node, Dir):
                raise fail(errno.ENOTDIR, newname)
        self._move(p, name, node, q, newname, target, bool(flags & RENAME_WHITEOUT))

    def _move(
        self, p: Dir, name: bytes, node: Node, q: Dir, newname: bytes, target: Node | None, nested_whiteout: bool
    ) -> None:
        origin = node.ldir.layer
        layer = self._lift(p, name, node)
        if not self._shows(q, newname, layer):
            layer = self._lift_above(p, name, node, q, newname)
        src = self.ensure_dir(p, layer)
        dst = self.ensure_dir(q, layer)
        if isinstance(node, Dir):
            self._prepare_dir(node, src, name, self._below(q, newname, layer.index) is not None)
            covered_src = self._below(p, name, layer.index) is not None
        else:  # what was copied up just now is still there
            covered_src = not origin.writable or self._below(p, name, layer.index) is not None
        only_below = False
        if target is not None:
            self._index_first(target)
            indexed = target.more is not None and target.more.index is not None
            only_below = indexed and self._holder(q, newname, target) is None
            self._clear_target(q, newname, target, dst)
        if dst.impure is not True and not isinstance(node, Dir) and self._has_marks(node):
            self.driver.mark_impure(dst)
        if only_below:
            assert target is not None
            links = self._links(target)
            self.table.correcting(target, links, links - 1)
        self.driver.move(src, name, dst, newname, covered_src, isinstance(node, Dir))
        self._drop_whiteout(q, newname, dst)
        is_dir = isinstance(node, Dir)
        self._name_removed(p, name, covered_src, is_dir)
        if target is not None:
            if only_below:
                self._add_nlink_delta(target, -1)
            self._target_gone(q, newname, target)
        self._arrived(node, p, name, q, newname, dst, new=target is None or (isinstance(target, Dir) and is_dir))
        if nested_whiteout:
            entry = self._nested_whiteout(p, name, self.fsuid, self.fsgid)
            self.forget(entry[0], 1)
        if target is not None:
            self._settle(target)
        self._settle(node)

    def _lift(self, p: Dir, name: bytes, node: Node) -> Layer:
        """The writable layer that the node can be renamed in; it is there afterwards."""
        if isinstance(node, Dir):
            return self._lift_dir(node)
        self.make_writable(node, data=False)
        layer = node.ldir.layer
        self._ensure_alias(p, name, node, layer)
        return layer

    def _lift_above(self, p: Dir, name: bytes, node: Node, q: Dir, newname: bytes) -> Layer:
        """Take a file to the nearest layer above its own where it would be seen under its new name."""
        above = [layer for layer in self.driver.writable if layer.index < node.ldir.layer.index]
        fit = [layer for layer in above if self._shows(q, newname, layer)]
        if not fit or isinstance(node, Dir):
            raise fail(errno.EXDEV if above else errno.EROFS, newname)
        self.relocate(node, fit[-1])
        return fit[-1]

    def _prepare_dir(self, node: Dir, src: LDir, name: bytes, covered: bool) -> None:
        """Before a directory moves: what it merges with below must come along, what is below its new name must not."""
        if len(node.ldirs) > 1:
            if node.redirect is None or not node.ldir.layer.writable:
                path = self._path_below(node)
                self.driver.set_redirect(src, name, path)
                node.redirect = path
        elif covered:
            self.driver.set_opaque(src, name)

    def _clear_target(self, q: Dir, newname: bytes, target: Node, dst: LDir) -> None:
        """A directory to be replaced must be empty on disk too; a file's inode may be open."""
        if not isinstance(target, Dir):
            self._await_copy(target)
            self._pin(q, newname, target)
            return
        target.extra().pin = target.ldirs[0].open()
        self.table.leaving(target, q, newname)
        if any(ldir.layer is dst.layer for ldir in target.ldirs):
            if len(target.ldirs) > 1:
                self.driver.set_opaque(dst, newname)  # it stays empty while its whiteouts go
            self.driver.clear_dir(dst, newname)

    def _target_gone(self, q: Dir, newname: bytes, target: Node) -> None:
        q.children.pop(newname, None)
        if isinstance(target, Dir):
            self._dir_gone(target)
            if q.subdirs >= 0:
                q.subdirs -= 1
            return
        self._name_gone(q, newname, target)

    def _arrived(self, node: Node, p: Dir, name: bytes, q: Dir, newname: bytes, dst: LDir, new: bool) -> None:
        """The node's new place, in memory."""
        if isinstance(node, Dir):
            node.parent, node.name = q, newname
            node.ldir.parent, node.ldir.name = dst, newname
            q.children[newname] = node
            self._name_added(q, newname, dst, True, new=new)
            self.table.changed(node)
            return
        more = node.more
        if node.parent is p and node.name == name:
            node.parent, node.name = q, newname
            if more is None or more.index is None:
                node.ldir = dst
        elif more is not None and (p, name) in more.aliases:
            more.aliases.remove((p, name))
            more.aliases.append((q, newname))
        q.children[newname] = node
        self._name_added(q, newname, dst, False, new=new)
        self.table.changed(node)

    def _exchange(self, p: Dir, name: bytes, node: Node, q: Dir, newname: bytes, target: Node) -> None:
        layer = self._lift(p, name, node)
        if self._lift(q, newname, target) is not layer:
            raise fail(errno.EXDEV)
        src = self.ensure_dir(p, layer)
        dst = self.ensure_dir(q, layer)
        if isinstance(node, Dir):
            self._prepare_dir(node, src, name, self._below(q, newname, layer.index) is not None)
        if isinstance(target, Dir):
            self._prepare_dir(target, dst, newname, self._below(p, name, layer.index) is not None)
        for side, ldir in ((node, dst), (target, src)):
            if ldir.impure is not True and not isinstance(side, Dir) and self._has_marks(side):
                self.driver.mark_impure(ldir)
        self.driver.exchange(src, name, dst, newname)
        node_dir, target_dir = isinstance(node, Dir), isinstance(target, Dir)
        for d, gone, came in ((p, node_dir, target_dir), (q, target_dir, node_dir)):
            if d.subdirs >= 0:
                d.subdirs += came - gone
        self._arrived(node, p, name, q, newname, dst, new=False)
        self._arrived(target, q, newname, p, name, src, new=False)
        self._settle(node)
        self._settle(target)
