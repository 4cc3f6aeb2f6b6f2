"""Changing attributes and extended attributes. Copies up metadata only, where the driver can."""

from __future__ import annotations

import errno
import os
from stat import S_IFREG

from unionfs import sysio
from unionfs.api import Attr, Changes
from unionfs.core.base import fail
from unionfs.core.data import Data
from unionfs.core.layers import Fd
from unionfs.core.nodes import Dir, Node

_ACLS = (b"system.posix_acl_access", b"system.posix_acl_default")
CAPABILITY = "security.capability"


class Attributes(Data):
    def setattr(self, nodeid: int, changes: Changes) -> Attr:
        node = self._node(nodeid)
        if self.driver.read_only:
            raise fail(errno.EROFS)
        size = changes.size
        is_dir = isinstance(node, Dir)
        if size is not None:
            if is_dir:
                raise fail(errno.EISDIR)
            self.make_writable(node, data=True, size=size)
            f = self.files.get(nodeid)
            if f is None or not f.writable:
                f = self._open_data(node, True)
            if f.plain:
                os.ftruncate(f.n, size)
            else:
                self._park()
                f.truncate(size)
        else:
            self.make_writable(node, data=False)
        f = self.files.get(nodeid)
        if f is not None and f.writable and f.plain:  # as after creating it: half the cost of a path through /proc
            self._change(node, changes, f, f.n, True)
            return self._attr(node, os.fstat(f.n))
        at, path, follow = self._at(node)
        self._change(node, changes, at, path, follow)
        if isinstance(node, Dir):
            node.inherit = None
        return self._attr(node, self._stat(node))

    def _change(self, node: Node, changes: Changes, at: Fd, path: bytes | int, follow: bool) -> None:
        """All but the size. `path`: of the inode, or its descriptor, which is `at` then."""
        if changes.uid is not None or changes.gid is not None:
            self.idmap.chown(path, changes.uid, changes.gid, follow)
        if changes.mode is not None:
            self.idmap.chmod(path, changes.mode & 0o7777, follow)
        if changes.kill_suidgid and changes.mode is None:
            self._kill_suidgid(node)
        if changes.atime_ns is not None or changes.mtime_ns is not None:
            name = path if isinstance(path, bytes) else None
            sysio.set_times(at.n, name, changes.atime_ns, changes.mtime_ns, follow)
        if changes.empty():
            self._drop_capability(path, follow)

    @staticmethod
    def _drop_capability(path: bytes | int, follow: bool) -> None:
        """A SETATTR that changes nothing: the kernel wants the file's capabilities gone (ATTR_KILL_PRIV)."""
        try:
            os.removexattr(path, CAPABILITY, follow_symlinks=follow)
        except OSError as e:
            if e.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise

    # --- extended attributes ---

    def _disk_name(self, name: bytes) -> bytes:
        if self.idmap.noacl and name in _ACLS:
            raise fail(errno.EOPNOTSUPP, name)
        disk = self.driver.xattr_in(name)
        disk = self.idmap.xattr_in(disk) if disk is not None else None
        if disk is None:
            raise fail(errno.EOPNOTSUPP, name)
        return disk

    def getxattr(self, nodeid: int, name: bytes) -> bytes:
        node = self._node(nodeid)
        disk = self._disk_name(name)
        f = self.files.get(nodeid)
        if f is None and name == b"security.capability" and node.kind == S_IFREG and node.more is None:
            # The kernel asks for it before the first write to a file. That needs the descriptor too, and asking by a
            # descriptor costs a fifth of asking by a path through /proc.
            try:
                f = self._open_data(node, False)
            except PermissionError:  # an ordinary user's server: the attribute may be had, the data not
                pass
        if f is not None and (node.more is None or node.more.data is None):
            return os.getxattr(f.n, disk)
        at, path, follow = self._at(node)
        value = os.getxattr(path, disk, follow_symlinks=follow)
        del at
        return value

    def listxattr(self, nodeid: int, uid: int) -> list[bytes]:
        node = self._node(nodeid)
        if self.idmap.noxattrs:
            return []
        at, path, follow = self._at(node)
        try:
            names = os.listxattr(path, follow_symlinks=follow)
        except OSError as e:
            if e.errno == errno.EOPNOTSUPP:
                return []
            raise
        del at
        shown = (self.driver.xattr_out(name) for name in names)
        out = (self.idmap.xattr_out(name) for name in shown if name is not None)
        return [
            name
            for name in out
            if name is not None
            and not (self.idmap.noacl and name in _ACLS)
            and (uid == 0 or not name.startswith(b"trusted."))
        ]

    def setxattr(self, nodeid: int, name: bytes, value: bytes, flags: int, kill_sgid: bool) -> None:
        node = self._node(nodeid)
        disk = self._disk_name(name)
        if self.driver.read_only:
            raise fail(errno.EROFS)
        self.make_writable(node, data=False)
        at, path, follow = self._at(node)
        os.setxattr(path, disk, value, flags & 3, follow_symlinks=follow)
        if kill_sgid:
            mode = os.stat(path, follow_symlinks=follow).st_mode
            if mode & 0o2000:
                os.chmod(path, mode & 0o5777)
        if isinstance(node, Dir):
            node.inherit = None
        del at

    def removexattr(self, nodeid: int, name: bytes) -> None:
        node = self._node(nodeid)
        disk = self._disk_name(name)
        if self.driver.read_only:
            raise fail(errno.EROFS)
        if not isinstance(node, Dir) and node.ldir.layer.writable is False:
            at, path, follow = self._at(node)
            try:
                os.getxattr(path, disk, follow_symlinks=follow)  # ENODATA before any copy-up
            except OSError as e:
                if e.errno == errno.ENODATA and name in _ACLS:
                    return  # as every filesystem with ACLs: there is one always, if only the mode's
                raise
            del at
        self.make_writable(node, data=False)
        at, path, follow = self._at(node)
        os.removexattr(path, disk, follow_symlinks=follow)
        if isinstance(node, Dir):
            node.inherit = None
        del at
