"""Bytes: read, write, and what else works on data descriptors.

Data is reached by node id; descriptors are opened at the first use and kept, the longest unused closing first. In the
fast lane a read takes only what is in the page cache (RWF_NOWAIT): what the disk must bring goes to a slow thread.
"""

from __future__ import annotations

import errno
import os
from stat import S_ISREG

from unionfs import sysio
from unionfs.core.base import OpenFile, fail
from unionfs.core.nodes import Dir, Node
from unionfs.core.rename import Rename

_WRITING = os.O_WRONLY | os.O_RDWR


class Data(Rename):
    def read(self, nodeid: int, offset: int, buffer: memoryview) -> int:
        f = self.files.get(nodeid)
        if f is None:
            f = self._open_data(self._node(nodeid), False)
        if not f.plain:
            return f.read_at(offset, buffer, getattr(self.lanes, "fast", False))
        if not getattr(self.lanes, "fast", False):
            return os.preadv(f.n, (buffer,), offset)
        n = 0
        if self.nowait:
            try:
                n = os.preadv(f.n, (buffer,), offset, os.RWF_NOWAIT)
            except BlockingIOError:
                self._park()
            except OSError as e:
                if e.errno != errno.EOPNOTSUPP:
                    raise
                self.nowait = False
            if n == len(buffer):
                return n
        # short: the end of the file, or the end of what is cached
        return n + os.preadv(f.n, (buffer[n:],), offset + n)

    def write(self, nodeid: int, offset: int, data: memoryview, kill_suidgid: bool) -> int:
        f = self.files.get(nodeid)
        if f is None or not f.writable:
            f = self._open_data(self._node(nodeid), True)
        try:
            if f.plain:
                n = os.pwrite(f.n, data, offset)
            else:
                n = f.write_at(offset, data, getattr(self.lanes, "fast", False))
        except OSError as e:
            if e.errno not in (errno.ENOSPC, errno.EDQUOT) or not self._move_from_full(self._node(nodeid)):
                raise
            n = os.pwrite(self._open_data(self._node(nodeid), True).n, data, offset)
        if kill_suidgid:
            self._kill_suidgid(self._node(nodeid))
        return n

    def open(self, nodeid: int, flags: int) -> None:
        node = self._node(nodeid)
        if flags & _WRITING:
            if node.kind == 0o100000:
                self._open_data(node, True)
        elif node.kind == 0o100000:
            self._open_data(node, False)
        node.extra().opens += 1

    def release(self, nodeid: int) -> None:
        node = self.slots[nodeid]
        if node is not None and node.more is not None:
            node.more.opens -= 1
            if node.more.opens <= 0:
                node.more.backed = False

    def backing_fd(self, nodeid: int, write: bool) -> int | None:
        node = self._node(nodeid)
        if not node.ldir.layer.writable and not self.driver.read_only:
            return None  # a copy-up would change the file behind an open inode
        if node.more is not None and node.more.data is not None:
            return None
        f = self.files.get(nodeid)
        if f is None or (not f.writable and not self.driver.read_only):
            try:
                f = self._open_data(node, not self.driver.read_only)
            except PermissionError:
                return None
        node.extra().backed = True
        return os.dup(f.n)

    def _open_data(self, node: Node, write: bool) -> OpenFile:
        """The node's data descriptor; for writing, after copy-up."""
        if isinstance(node, Dir):
            raise fail(errno.EISDIR)
        if write:
            if self.driver.read_only:
                raise fail(errno.EROFS)
            self.make_writable(node, data=True)
        f = self.files.get(node.id)
        if f is not None and (f.writable or not write):
            return f
        more = node.more
        if more is not None and more.data is not None:
            f = self.driver.open_redirected(self, node, write)
            if f is None:
                f = OpenFile(self._open_quiet(more.data[1], more.data[0]), False)
        elif node.ldir.layer.writable or (more is not None and more.pin is not None):
            f = self._open_upper(node, write)
        else:
            f = OpenFile(self._open_quiet(node.disk_name(), node.ldir), False)
        self._keep_file(node, f)
        return f

    def _open_upper(self, node: Node, write: bool) -> OpenFile:
        if self.driver.read_only:
            return OpenFile(self._open_inode(node, os.O_RDONLY), False)
        try:
            return OpenFile(self._open_inode(node, os.O_RDWR), True)
        except OSError as e:
            if e.errno in (errno.EROFS, errno.ETXTBSY) and not write:
                return OpenFile(self._open_inode(node, os.O_RDONLY), False)
            if e.errno not in (errno.EACCES, errno.EPERM):
                raise
            # an ordinary user's own file without the bits: the kernel has checked the caller's rights already
            at, path, follow = self._at(node)
            st = os.stat(path, follow_symlinks=follow)
            if st.st_uid != self.fsuid or not S_ISREG(st.st_mode):
                if write:
                    raise
                return OpenFile(self._open_inode(node, os.O_RDONLY), False)
            os.chmod(path, st.st_mode & 0o7777 | 0o600)
            try:
                return OpenFile(self._open_inode(node, os.O_RDWR), True)
            finally:
                os.chmod(path, st.st_mode & 0o7777)
                del at

    # --- syncing ---

    def fsync(self, nodeid: int, datasync: bool) -> None:
        node = self._node(nodeid)
        layer = node.ldir.layer
        if self.driver.volatile or not (layer.writable or layer.frozen) or isinstance(node, Dir):
            return
        f = self.files.get(nodeid) or self._open_data(node, False)
        if f.plain:
            (os.fdatasync if datasync else os.fsync)(f.n)
            return
        f.sync(datasync)
        whole = self.driver.settle(self, node, f) if layer.writable else None
        if whole is not None:
            self.files[nodeid] = whole

    def make_whole(self, path: bytes) -> bool:
        """Copy up what a file still takes from below, though nobody writes it. False: it shows from another place."""
        node: Node = self.root
        known: list[Node] = []
        for part in path.split(b"/"):
            if part and isinstance(node, Dir):
                node = self._child(node, part)
                known.append(node)
        self.table.counts[node.id] += 1  # as if the kernel knew it
        try:
            if node.ldir.layer.writable and node.more is not None and node.more.data is not None:
                f = self._open_data(node, True)
                if not f.plain:
                    f.absorb()
                    self.fsync(node.id, False)
            return node.ldir.layer.writable and (node.more is None or node.more.data is None)
        finally:
            self.forget(node.id, 1)
            for one in reversed(known):
                self._settle(one)

    def fsyncdir(self, nodeid: int, datasync: bool) -> None:
        d = self._dir(nodeid)
        if self.driver.volatile or d.removed:
            return
        for ldir in d.ldirs:
            if ldir.layer.writable or ldir.layer.frozen:
                os.fsync(ldir.open().n)

    def syncfs(self) -> None:
        if self.driver.volatile:
            return
        self.driver.flush()
        for layer in self.driver.layers:
            if layer.writable:
                sysio.syncfs(layer.root.open().n)

    # --- the rest of a data descriptor's life ---

    def fallocate(self, nodeid: int, mode: int, offset: int, length: int) -> None:
        f = self.files.get(nodeid)
        if f is None or not f.writable:
            f = self._open_data(self._node(nodeid), True)
        if f.plain:
            sysio.fallocate(f.n, mode, offset, length)
        else:
            self._park()
            f.fallocate(mode, offset, length)

    def lseek(self, nodeid: int, offset: int, whence: int) -> int:
        f = self.files.get(nodeid) or self._open_data(self._node(nodeid), False)
        return os.lseek(f.n, offset, whence) if f.plain else f.seek(offset, whence)

    def copy_file_range(self, src: int, src_off: int, dst: int, dst_off: int, length: int, flags: int) -> int:
        target = self.files.get(dst)
        if target is None or not target.writable:
            target = self._open_data(self._node(dst), True)
        source = self.files.get(src) or self._open_data(self._node(src), False)
        if not (source.plain and target.plain):
            raise fail(errno.EOPNOTSUPP)
        try:
            return os.copy_file_range(source.n, target.n, length, src_off, dst_off)
        except OSError as e:
            if e.errno in (errno.EXDEV, errno.EINVAL, errno.EBADF):
                raise fail(errno.EOPNOTSUPP)  # the kernel copies by reading and writing then
            raise

    def _kill_suidgid(self, node: Node) -> None:
        """What a write by someone without CAP_FSETID does to set-id bits."""
        at, path, follow = self._at(node)
        mode = os.stat(path, follow_symlinks=follow).st_mode
        kept = mode & ~0o4000
        if mode & 0o2010 == 0o2010:
            kept &= ~0o2000
        if kept != mode:
            os.chmod(path, kept & 0o7777)
        del at

    def ioctl_getflags(self, nodeid: int) -> int:
        return sysio.get_flags(self._flags_fd(nodeid))

    def ioctl_setflags(self, nodeid: int, flags: int) -> None:
        node = self._node(nodeid)
        self.make_writable(node, data=False)
        sysio.set_flags(self._flags_fd(nodeid), flags)

    def _flags_fd(self, nodeid: int) -> int:
        node = self._node(nodeid)
        if isinstance(node, Dir):
            return node.ldirs[0].open().n
        f = self.files.get(nodeid) or self._open_data(node, False)
        return f.n

    def birth_time(self, nodeid: int) -> tuple[int, int] | None:
        node = self._node(nodeid)
        at, path, follow = self._at(node)
        del follow
        if isinstance(node, Dir) or (node.more is not None and node.more.pin is not None):
            return sysio.birth_time(at.n, b"")
        return sysio.birth_time(at.n, path.rpartition(b"/")[2])

    def readlink(self, nodeid: int) -> bytes:
        node = self._node(nodeid)
        more = node.more
        if more is not None and more.pin is not None:
            return os.readlink(b"", dir_fd=more.pin.n)
        if more is not None and more.index is not None:
            return os.readlink(more.index, dir_fd=node.ldir.open().n)
        return os.readlink(node.name, dir_fd=node.ldir.open().n)

    def statfs(self) -> tuple[int, int, int, int, int, int, int, int]:
        return self.driver.statvfs()
