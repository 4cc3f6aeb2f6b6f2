"""New entries: files, directories, symlinks, nodes, links, and files without a name.

An entry is made in place where nothing of that name is in the layer's directory; where a whiteout is, it is built in
work/ and takes the whiteout's place in one step (a directory then is opaque: what the whiteout hid stays hidden).
"""

from __future__ import annotations

import errno
import os
from stat import S_IFBLK, S_IFCHR, S_IFDIR, S_IFMT, S_IFREG, S_ISGID

from unionfs.api import Entry
from unionfs.core.base import OpenFile, fail
from unionfs.core.copyup import CopyUp
from unionfs.core.layers import Fd, Layer, LDir
from unionfs.core.nodes import Dir, Node

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

ACL_DEFAULT = "system.posix_acl_default"
_CREATE = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Create(CopyUp):
    def mknod(self, parent: int, name: bytes, mode: int, rdev: int, umask: int, uid: int, gid: int) -> Entry:
        p = self._dir(parent)
        kind = S_IFMT(mode) or S_IFREG
        device = 0
        if kind in (S_IFCHR, S_IFBLK):
            major, minor = rdev >> 8 & 0xFFF, rdev & 0xFF | rdev >> 12 & 0xFFF00
            device = os.makedev(major, minor)
            if kind == S_IFCHR and device == 0:
                return self._nested_whiteout(p, name, uid, gid)
        bits = self._masked(p, mode & 0o7777, umask)

        def make(fd: int, at: bytes) -> OpenFile | None:
            mode = self.idmap.disk_mode(kind, bits)
            if kind == S_IFREG:  # what is made is written next: open at once
                return OpenFile(os.open(at, _CREATE, mode, dir_fd=fd), True)
            os.mknod(at, kind | mode, device, dir_fd=fd)
            return None

        return self._new(p, name, make, kind, bits, device, uid, gid)

    def create(self, parent: int, name: bytes, flags: int, mode: int, umask: int, uid: int, gid: int) -> Entry:
        entry = self.mknod(parent, name, S_IFREG | mode & 0o7777, 0, umask, uid, gid)
        node = self.slots[entry[0]]
        assert node is not None
        node.extra().opens += 1
        return entry

    def mkdir(self, parent: int, name: bytes, mode: int, umask: int, uid: int, gid: int) -> Entry:
        p = self._dir(parent)
        bits = self._masked(p, mode & 0o7777, umask)
        if self._inherit(p)[0] >= 0:
            bits |= S_ISGID

        def make(fd: int, at: bytes) -> None:
            os.mkdir(at, self.idmap.disk_mode(S_IFDIR, bits & 0o1777), dir_fd=fd)

        return self._new(p, name, make, S_IFDIR, bits, 0, uid, gid)

    def symlink(self, parent: int, name: bytes, target: bytes, uid: int, gid: int) -> Entry:
        def make(fd: int, at: bytes) -> None:
            os.symlink(target, at, dir_fd=fd)

        return self._new(self._dir(parent), name, make, 0o120000, 0o777, 0, uid, gid)

    def _new(
        self,
        p: Dir,
        name: bytes,
        make: Callable[[int, bytes], OpenFile | None],
        kind: int,
        bits: int,
        rdev: int,
        uid: int,
        gid: int,
    ) -> Entry:
        self._check_name(p, name)
        while True:
            layer = self._place_new(p, name, kind == S_IFDIR)
            try:
                return self._new_in(p, name, make, kind, bits, rdev, uid, gid, layer)
            except OSError as e:
                if e.errno not in (errno.ENOSPC, errno.EDQUOT) or not self.driver.filled(layer):
                    raise

    def _new_in(
        self, p: Dir, name: bytes, make: Callable[[int, bytes], OpenFile | None], kind: int, bits: int, rdev: int,
        uid: int, gid: int, layer: Layer,
    ) -> Entry:  # fmt: skip
        ldir = self.ensure_dir(p, layer)
        fd = ldir.open()
        try:
            opened = make(fd.n, name)
        except FileExistsError:
            if not self.driver.is_whiteout(ldir, name):
                raise
            opened = self._new_over_whiteout(p, name, make, kind, bits, rdev, uid, gid, layer, ldir)
        else:
            try:
                if kind == S_IFDIR and self.driver.beside_whiteout(ldir, name):
                    self.driver.set_opaque(ldir, name)
                self._own(p, fd, name, kind, bits, rdev, uid, gid, in_place=True)
            except BaseException:
                (os.rmdir if kind == S_IFDIR else os.unlink)(name, dir_fd=fd.n)
                raise
            self._drop_whiteout(p, name, ldir)
        return self._born(p, name, ldir, kind, opened)

    def _drop_whiteout(self, p: Dir, name: bytes, ldir: LDir) -> None:
        """An entry has appeared beside a whiteout of its name (`.wh.` files): that one hides nothing any more."""
        names = p.names
        if len(p.ldirs) > 1 and (names is None or ldir is p.ldirs[-1] or names.get(name, ldir) is None):
            self.driver.drop_whiteout_beside(ldir, name)

    def _new_over_whiteout(
        self, p: Dir, name: bytes, make: Callable[[int, bytes], OpenFile | None], kind: int, bits: int, rdev: int,
        uid: int, gid: int, layer: Layer, ldir: LDir,
    ) -> OpenFile | None:  # fmt: skip
        work = self._work(layer)
        tmp = self._tmp_name()
        scratch: LDir | None = None
        if self._inherit(p)[1] and kind != 0o120000:
            # the filesystem applies a default ACL to what is made in a directory that has it
            os.mkdir(tmp, 0o700, dir_fd=work.open().n)
            scratch = work.child(tmp)
            acl = os.getxattr(ldir.open().n, ACL_DEFAULT)
            os.setxattr(scratch.open().n, ACL_DEFAULT, acl)
        home = scratch or work
        try:
            fd = home.open()
            opened = make(fd.n, tmp)
            self._own(p, fd, tmp, kind, bits, rdev, uid, gid, in_place=False)
            if kind == S_IFDIR:
                self.driver.set_opaque(home, tmp)
            self.driver.publish(home, tmp, ldir, name, kind == S_IFDIR)
            return opened
        except BaseException:
            self._discard(home, tmp, kind == S_IFDIR)
            raise
        finally:
            if scratch is not None:
                self._discard(work, tmp, True)

    def _own(
        self, p: Dir, fd: Fd, name: bytes, kind: int, bits: int, rdev: int, uid: int, gid: int, in_place: bool
    ) -> None:
        """Give a new entry its owner: the caller's, the group by a setgid parent where that is how it goes."""
        if self.idmap.active and self.idmap.created(self, fd, name, kind, bits, rdev, uid, gid, self._inherit(p)[0]):
            return
        inherited = self._inherit(p)[0]
        group = inherited if inherited >= 0 else gid
        if uid != self.fsuid or group != self.fsgid:
            os.chown(name, uid, group, dir_fd=fd.n, follow_symlinks=False)
            if bits & 0o6000 and kind != 0o120000:
                self._chmod_new(p, fd, name, bits)  # chown took the set-id bits
        elif kind == S_IFDIR and bits & 0o7000 and not (in_place and inherited >= 0 and not bits & 0o5000):
            self._chmod_new(p, fd, name, bits)  # mkdir(2) makes neither set-id nor, everywhere, sticky bits

    def _chmod_new(self, p: Dir, fd: Fd, name: bytes, bits: int) -> None:
        if self._inherit(p)[1]:  # the other bits are what the default ACL made of them
            bits = bits & 0o7000 | os.stat(name, dir_fd=fd.n, follow_symlinks=False).st_mode & 0o777
        os.chmod(name, bits, dir_fd=fd.n)

    def _born(self, p: Dir, name: bytes, ldir: LDir, kind: int, opened: OpenFile | None) -> Entry:
        at = ldir.open()
        st = os.fstat(opened.n) if opened is not None else os.stat(name, dir_fd=at.n, follow_symlinks=False)
        node: Node
        if kind == S_IFDIR:
            made = ldir.child(name)
            made.impure = False
            node = d = Dir(p, name, [made], self.ino_of(st))
            d.names, d.stacks, d.complete, d.subdirs = {}, {}, True, 0  # it is empty: no name needs to be asked for
            self._remember(d, 0)
        else:
            node = Node(p, name, ldir, self.ino_of(st), kind)
        self.table.add(node)
        p.children[name] = node
        if opened is not None:
            self._keep_file(node, opened)
        self._name_added(p, name, ldir, kind == S_IFDIR)
        return self._entry(node, st)

    def _nested_whiteout(self, p: Dir, name: bytes, uid: int, gid: int) -> Entry:
        """A char 0:0 made by a user is the whiteout of an overlay stacked on this mount: data to us."""

        def make(fd: int, at: bytes) -> None:
            self.driver.make_nested_whiteout(fd, at)

        ldir = self.ensure_dir(p, self._place_new(p, name))
        if ldir.impure is not True:
            self.driver.mark_impure(ldir)
        entry = self._new(p, name, make, S_IFREG, 0, 0, uid, gid)
        node = self._node(entry[0])
        node.kind = S_IFCHR
        node.extra().nested_whiteout = True
        return entry[0], entry[1], self._attr(node, self._stat(node))

    # --- links and nameless files ---

    def link(self, nodeid: int, parent: int, name: bytes) -> Entry:
        node = self._node(nodeid)
        p = self._dir(parent)
        self._check_name(p, name)
        if isinstance(node, Dir):
            raise fail(errno.EPERM)
        more = node.more
        if more is not None and more.unlinked and not more.orphan:
            raise fail(errno.ENOENT)
        self.make_writable(node, data=False)
        layer = node.ldir.layer
        if not self._shows(p, name, layer):
            raise fail(errno.EXDEV, name)  # something above the inode's layer would hide the new name
        ldir = self.ensure_dir(p, layer)
        fd = ldir.open()
        source, path, follow = self._at(node)
        if ldir.impure is not True and self._has_marks(node):
            self.driver.mark_impure(ldir)
        try:
            os.link(path, name, dst_dir_fd=fd.n, follow_symlinks=follow)
        except FileExistsError:
            if not self.driver.is_whiteout(ldir, name):
                raise
            work = self._work(layer)
            tmp = self._tmp_name()
            os.link(path, tmp, dst_dir_fd=work.open().n, follow_symlinks=follow)
            try:
                self.driver.publish(work, tmp, ldir, name, False)
            except BaseException:
                self._discard(work, tmp, False)
                raise
        else:
            self._drop_whiteout(p, name, ldir)
        del source
        st = os.stat(name, dir_fd=fd.n, follow_symlinks=False)
        more = node.extra()
        if more.orphan:
            more.orphan = more.unlinked = False
            pin, more.pin = more.pin, None
            node.parent, node.name, node.ldir = p, name, ldir
            self.table.changed(node)
            del pin  # not earlier: what is written down must be open
        else:
            more.aliases.append((p, name))
        if more.key is None:
            self._register_link(node, st)
        p.children[name] = node
        self._name_added(p, name, ldir, False)
        return self._entry(node, st)

    def _has_marks(self, node: Node) -> bool:
        """The inode carries marks (origin, metacopy) that a lookup in its new directory must read."""
        more = node.more
        return (more is not None and (more.data is not None or more.index is not None)) or (
            node.ldir.impure is not False
        )

    def tmpfile(self, parent: int, flags: int, mode: int, umask: int, uid: int, gid: int) -> Entry:
        p = self._dir(parent)
        layer = self._place_new(p, b"")
        ldir = self.ensure_dir(p, layer)
        bits = self._masked(p, mode & 0o7777, umask)
        disk_bits = self.idmap.disk_mode(S_IFREG, bits)
        try:
            n = os.open(b".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, disk_bits, dir_fd=ldir.open().n)
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL):
                raise
            work, tmp = self._work(layer), self._tmp_name()
            n = os.open(tmp, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, disk_bits, dir_fd=work.open().n)
            os.unlink(tmp, dir_fd=work.open().n)
        pin = Fd(n)
        inherited = self._inherit(p)[0]
        group = inherited if inherited >= 0 else gid
        if self.idmap.active and self.idmap.created(self, pin, b"", S_IFREG, bits, 0, uid, gid, inherited):
            pass
        elif uid != self.fsuid or group != self.fsgid:
            os.fchown(n, uid, group)
            os.fchmod(n, bits)
        st = os.fstat(n)
        node = Node(None, b"", ldir, self.ino_of(st), S_IFREG)
        more = node.extra()
        more.pin, more.orphan, more.unlinked = pin, not flags & os.O_EXCL, True
        more.opens = 1
        self.table.add(node)
        return self._entry(node, st)

    # --- what a directory gives to its new entries ---

    def _inherit(self, p: Dir) -> tuple[int, bool]:
        """(group of new entries or -1, has a default ACL); remembered until p's attributes change."""
        known = p.inherit
        if known is None:
            fd = p.ldirs[0].open()
            st = os.fstat(fd.n)
            try:
                acl = bool(os.getxattr(fd.n, ACL_DEFAULT)) and not self.idmap.noacl
            except OSError:
                acl = False
            known = p.inherit = (st.st_gid if st.st_mode & S_ISGID else -1, acl)
        return known

    def _masked(self, p: Dir, bits: int, umask: int) -> int:
        return bits if self._inherit(p)[1] else bits & ~umask

    def _check_name(self, p: Dir, name: bytes) -> None:
        if self.driver.reserved(name):
            raise fail(errno.EPERM, name)
        if len(name) > self.driver.name_limit:
            raise fail(errno.ENAMETOOLONG, name)
        if p.removed:
            raise fail(errno.ENOENT, name)
