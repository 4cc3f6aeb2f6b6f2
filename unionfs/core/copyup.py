"""Copy-up: making what lies in a read-only layer writable, atomically.

A copy is built in the layer's work directory with all its metadata and renamed into place, so the merged view shows
the old file or the whole new one. Data of a big file is copied in a slow thread, with other requests served meanwhile;
only those that want to write the same file wait. Where the driver can, a change of metadata copies no data
(metacopy). The times of the parent directory are put back: copying up is no change that users see.
"""

from __future__ import annotations

import errno
import os
import threading
from stat import S_IFREG, S_ISLNK, S_ISREG

from unionfs import sysio
from unionfs.core.base import OpenFile, fail
from unionfs.core.layers import Fd, Layer, LDir, fd_path
from unionfs.core.nodes import Dir, Node
from unionfs.core.placement import Placement

INLINE_COPY = 256 << 10  # bytes that the fast lane copies itself
SMALL_COPY = 64 << 10  # below it sharing extents gains nothing
METACOPY_MIN = 64 << 10  # below it a metadata change copies the data too: that costs less than following it later


class CopyUp(Placement):
    # --- directories ---

    def ensure_dir(self, d: Dir, layer: Layer) -> LDir:
        """d's directory in a writable layer, made (with its parents) if need be."""
        for ldir in d.ldirs:
            if ldir.layer is layer:
                return ldir
        if d.removed:
            raise fail(errno.ENOENT, d.name)
        with self.tree_lock:
            for ldir in d.ldirs:
                if ldir.layer is layer:
                    return ldir
            assert d.parent is not None
            return self._copy_up_dir(d, self.ensure_dir(d.parent, layer))

    def _lift_dir(self, d: Dir) -> Layer:
        """See to it that the directory that d's attributes come from is writable; the layer it is in."""
        layer = d.ldirs[0].layer
        if not layer.writable:
            if d.parent is None:
                raise fail(errno.EROFS)  # the root of the topmost branch
            layer = self._place_copy(d.parent, layer)
            self.ensure_dir(d, layer)
        return layer

    def _copy_up_dir(self, d: Dir, into: LDir) -> LDir:
        source = d.ldirs[0]
        fd = source.open()
        st = os.fstat(fd.n)
        work = self._work(into.layer)
        tmp = self._tmp_name()
        os.mkdir(tmp, 0o700, dir_fd=work.open().n)
        try:
            copy = Fd(os.open(tmp, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=work.open().n))
            self._copy_xattrs(fd.n, copy.n, True, True)
            self._copy_owner(copy.n, st)
            self.driver.mark_copy(copy.n, source, b"", d.ino, True)
            os.utime(copy.n, ns=(st.st_atime_ns, st.st_mtime_ns))
            with self._times_kept(into):
                self.driver.publish(work, tmp, into, d.name, True)
        except BaseException:
            self._discard(work, tmp, True)
            raise
        made = into.child(d.name)
        made.impure = False
        at = next((i for i, ldir in enumerate(d.ldirs) if ldir.layer.index > into.layer.index), len(d.ldirs))
        d.ldirs.insert(at, made)
        if at == 0:
            d.ldir = made
            d.redirect = None  # a new directory: the layers below know it by its place in the merged view
        self._joined(d.parent, d.name, into)
        return made

    def _joined(self, p: Dir | None, name: bytes, ldir: LDir) -> None:
        """A directory that showed already now exists in ldir too."""
        if p is None or p.names is None:
            return
        first = p.names.get(name)
        if first is None and not p.complete:
            first = p.ldirs[-1]
        if first is None or first.layer.index < ldir.layer.index:
            if p.stacks is not None:
                p.stacks.pop(name, None)
            return
        p.names[name] = ldir
        assert p.stacks is not None
        p.stacks[name] = [ldir, *p.stacks.get(name, [])]

    def _times_kept(self, ldir: LDir) -> _TimesKept:
        return _TimesKept(ldir)

    # --- files ---

    def make_writable(self, node: Node, data: bool, size: int | None = None) -> None:
        """See to it that node's inode lies in a writable layer and, with `data`, its bytes too.

        `size`: the file is about to be cut to that length, more need not be copied.
        """
        if isinstance(node, Dir):
            self._lift_dir(node)
            return
        if data and node.kind == S_IFREG and self._redirects(node, size):
            data = False  # its blocks go elsewhere one by one, when they are written
        while True:
            more = node.more
            waiting = more is not None and (more.moving or (data and more.data is not None))
            if not waiting and (node.ldir.layer.writable or self._is_private(node)):
                return
            if self._await_copy(node):
                continue
            st = self._stat(node)
            with_data = data or not self._can_metacopy(node, st)
            length = min(st.st_size, size) if size is not None else st.st_size
            if with_data and S_ISREG(st.st_mode) and length > INLINE_COPY:
                self._park()
            done = threading.Lock()
            done.acquire()
            if self.copying.setdefault(node, done) is not done:
                continue
            known = self.table.counts[node.id] > 0  # else it is the caller's, who settles it
            try:
                if node.ldir.layer.writable:
                    self._copy_data_up(node, length)
                else:
                    self._copy_up(node, st, with_data, length)
            finally:
                del self.copying[node]
                done.release()
                if known and node.id and self.table.counts[node.id] <= 0:
                    self.forget(node.id, 0)
            return

    def _await_copy(self, node: Node) -> bool:
        """Whether a copy-up of node was running; it is over now."""
        running = self.copying.get(node)
        if running is None:
            return False
        self._park()
        with running:
            return True

    def relocate(self, node: Node, layer: Layer) -> None:
        """Move a file from one writable layer to another one, where it is seen under the same name.

        EXDEV for what can't be moved unnoticed: several links, or an open descriptor that the kernel writes through.
        """
        more = node.more
        if more is not None and (more.unlinked or more.aliases or more.backed):
            raise fail(errno.EXDEV, node.name)
        self._park()
        done = threading.Lock()
        done.acquire()
        if self.copying.setdefault(node, done) is not done:
            raise fail(errno.EBUSY, node.name)
        old, name, p = node.ldir, node.name, node.parent
        assert p is not None
        more = node.extra()
        more.moving = True
        try:
            st = self._stat(node)
            if st.st_nlink > 1:
                raise fail(errno.EXDEV, name)
            self.files.pop(node.id, None)  # a write from now on waits for us
            into = self.ensure_dir(p, layer)
            work = self._work(layer)
            tmp = self._tmp_name()
            try:
                self._build_copy(node, st, work, tmp, True, st.st_size)
                with self._times_kept(into):
                    self.driver.publish(work, tmp, into, name, False)
            except BaseException:
                self._discard(work, tmp, False)
                raise
            node.ldir = into
            self._name_added(p, name, into, False, new=False)
            with self._times_kept(old):
                self.driver.drop_whiteout_beside(old, name)  # it would hide the file once that is below
                os.unlink(name, dir_fd=old.open().n)
        finally:
            more.moving = False
            del self.copying[node]
            done.release()

    def _redirects(self, node: Node, size: int | None) -> bool:
        """The driver keeps the file's changed blocks apart from what lies below (row)."""
        more = node.more
        if node.ldir.layer.writable and (more is None or more.data is None):
            return False
        st = self._stat(node)
        fit = node.ldir.layer.writable or self._can_metacopy(node, st)
        return fit and self.driver.redirects_data(node, st, size)

    def _move_from_full(self, node: Node) -> bool:
        """The layer that node lies in is full: take the file to one that has room. False: it has to stay."""
        layer, p = node.ldir.layer, node.parent
        self.driver.filled(layer)
        if p is None or not self.driver.moves or (node.more is not None and node.more.unlinked):
            return False
        others = [other for other in self.driver.writable if other is not layer and self._could_move(node, other)]
        target = self.driver.place_moved(others, self._stat(node).st_size) if others else None
        if target is None:
            return False
        try:
            self.relocate(node, target)
        except OSError as e:
            if e.errno not in (errno.EXDEV, errno.EBUSY, errno.ENOSPC, errno.EDQUOT):
                raise
            return False
        return True

    @staticmethod
    def _is_private(node: Node) -> bool:
        """It lost its last name before its layer was frozen: no snapshot shows it, so it may still be written."""
        more = node.more
        return node.ldir.layer.frozen and more is not None and more.unlinked and more.pin is not None

    def _can_metacopy(self, node: Node, st: os.stat_result) -> bool:
        more = node.more
        if more is not None and more.index is not None and not node.ldir.layer.writable:
            return False  # names of it that only layers further down have would lead to other data
        return (
            self.driver.metacopy
            and S_ISREG(st.st_mode)
            and st.st_size >= METACOPY_MIN
            and not (more is not None and more.unlinked)
        )

    def _copy_up(self, node: Node, st: os.stat_result, data: bool, length: int) -> None:
        while True:
            layer = self._place_copy(node.parent or self.root, node.ldir.layer)
            try:
                return self._copy_up_to(layer, node, st, data, length)
            except OSError as e:
                if e.errno not in (errno.ENOSPC, errno.EDQUOT) or not self.driver.filled(layer):
                    raise

    def _copy_up_to(self, layer: Layer, node: Node, st: os.stat_result, data: bool, length: int) -> None:
        more = node.more
        unlinked = more is not None and more.unlinked
        work = self._work(layer)
        into: LDir | None = None
        if not unlinked:
            assert node.parent is not None
            into = self.ensure_dir(node.parent, layer)
        source, name = node.ldir, node.disk_name()
        tmp = self._tmp_name()
        try:
            copied, made = self._build_copy(node, st, work, tmp, data, length)
            if unlinked:
                node.extra().pin = Fd(os.open(tmp, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=work.open().n))
                self.table.changed(node)
                os.unlink(tmp, dir_fd=work.open().n)
            else:
                assert into is not None
                self._publish_copy(node, st, work, tmp, into)
        except BaseException:
            self._discard(work, tmp, False)
            raise
        if not data:
            old = node.more.data if node.more is not None else None
            node.extra().data = (source, name) if old is None or self.driver.holds_data(source, name) else old
        elif node.more is not None:
            node.more.data = None
        if into is None:
            node.ldir = work
        elif node.more is None or node.more.index is None:
            node.ldir = into
            assert node.parent is not None
            self._name_added(node.parent, node.name, into, False, new=False)
        if data:
            self._replace_file(node, made)
            if 0 < copied <= INLINE_COPY and made is not None and not self.driver.volatile:
                self.settler.add(made)
        self.copied_files += 1
        self.copied_up += copied

    def _build_copy(
        self, node: Node, st: os.stat_result, work: LDir, tmp: bytes, data: bool, length: int
    ) -> tuple[int, OpenFile | None]:
        """work/tmp becomes a complete copy of the node's inode; returns the bytes copied, and the copy of a file."""
        at, path, follow = self._at(node)
        source: bytes | int = path
        wfd = work.open()
        out: OpenFile | None = None
        copied = 0
        if S_ISREG(st.st_mode):
            flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            out = OpenFile(os.open(tmp, flags, 0o600, dir_fd=wfd.n), True)
            if data:
                src = self._open_source(node)
                if not src.plain:
                    src.copy_to(out.n, length)
                elif length <= SMALL_COPY and st.st_blocks * 512 >= st.st_size:
                    sysio.copy_small(src.n, out.n, length)
                else:
                    sysio.copy_data(src.n, out.n, length)
                if node.more is None or node.more.data is None:
                    source = src.n  # not the path: going through /proc costs more than the call
                copied = length
                if length < st.st_size:
                    os.ftruncate(out.n, length)
                if copied > INLINE_COPY and not self.driver.volatile:
                    sysio.start_writeback(out.n)
            else:
                os.ftruncate(out.n, st.st_size)
        elif S_ISLNK(st.st_mode):
            os.symlink(os.readlink(path), tmp, dir_fd=wfd.n)
        else:
            os.mknod(tmp, st.st_mode & 0o170000 | 0o600, st.st_rdev, dir_fd=wfd.n)
        target: bytes | int = out.n if out is not None else fd_path(wfd, tmp)
        tfollow = out is not None
        self._copy_xattrs(source, target, follow or source is not path, tfollow)
        if out is not None:
            self._copy_owner(out.n, st)
        else:
            os.chown(tmp, st.st_uid, st.st_gid, dir_fd=wfd.n, follow_symlinks=False)
            if not S_ISLNK(st.st_mode):
                os.chmod(tmp, st.st_mode & 0o7777, dir_fd=wfd.n)
        if not (node.more is not None and node.more.unlinked):
            self.driver.mark_copy(target, node.ldir, node.disk_name(), node.ino, tfollow)
            if not data:
                assert node.parent is not None
                self.driver.mark_metacopy(target, self._path_below(node.parent) + b"/" + node.name, tfollow)
        times = (st.st_atime_ns, st.st_mtime_ns)
        if out is not None:
            os.utime(out.n, ns=times)
        else:
            os.utime(tmp, ns=times, dir_fd=wfd.n, follow_symlinks=False)
        del at
        return copied, out

    def _publish_copy(self, node: Node, st: os.stat_result, work: LDir, tmp: bytes, into: LDir) -> None:
        """Put work/tmp in place of the lower file: by its name, and for hard links through the index."""
        entry: bytes | None = None
        linked = node.more is not None and node.more.index is not None
        if (st.st_nlink > 1 or linked) and self.driver.index:
            entry = self.driver.index_name(node.ldir, node.disk_name(), st)
        index = self.driver.index_dir(into.layer) if entry is not None else None
        if into.impure is not True:
            self.driver.mark_impure(into)
        with self._times_kept(into):
            if entry is None or index is None:
                self.driver.publish(work, tmp, into, node.name, False)
                return
            links = st.st_nlink + (node.more.nlink_delta if linked and node.more is not None else 0)
            # While names come and go the count is that of the lower inode: true whenever we die.
            self.driver.set_nlink_delta(fd_path(work.open(), tmp), links - st.st_nlink, of_lower=True)
            self._link_index(work, tmp, index, entry)
            delta = links - 2  # two names in upper now: the index entry and this one
            published = False
            try:
                self.driver.publish(work, tmp, into, node.name, False)
                published = True
                self.driver.set_nlink_delta(fd_path(index.open(), entry), delta)
            except BaseException:
                if published:  # counted by the lower inode it must not stay: names of the copy may go next
                    os.unlink(node.name, dir_fd=into.open().n)
                os.unlink(entry, dir_fd=index.open().n)
                raise
        self.driver.index_added(index, entry)
        more = node.extra()
        more.index = entry
        more.nlink_delta = delta
        node.ldir = index
        if more.key is not None:
            self.table.links.pop(more.key, None)
        self._register_link(node, os.stat(entry, dir_fd=index.open().n, follow_symlinks=False))
        if node.parent is not None:
            self._name_added(node.parent, node.name, into, False, new=False)

    @staticmethod
    def _link_index(work: LDir, tmp: bytes, index: LDir, entry: bytes) -> None:
        wfd, fd = work.open(), index.open()
        try:
            os.link(tmp, entry, src_dir_fd=wfd.n, dst_dir_fd=fd.n, follow_symlinks=False)
        except FileExistsError:  # of a copy-up that failed here, and could not take it back
            os.unlink(entry, dir_fd=fd.n)
            os.link(tmp, entry, src_dir_fd=wfd.n, dst_dir_fd=fd.n, follow_symlinks=False)

    def _copy_data_up(self, node: Node, length: int) -> None:
        """A metacopy gets its data: into the same inode, the mark goes last."""
        src = self._open_source(node)
        st = self._stat(node)
        fd = Fd(self._open_inode(node, os.O_RDWR))
        try:
            if src.plain:
                sysio.copy_data(src.n, fd.n, length)
            else:
                src.copy_to(fd.n, length)
        finally:
            _put_times_back(fd.n, st)
        if not self.driver.volatile:
            sysio.start_writeback(fd.n)  # the mark's removal must not reach the disk before the data
        self.driver.clear_metacopy(fd.n)
        assert node.more is not None
        node.more.data = None
        self._replace_file(node, None)
        self.copied_up += length

    def _ensure_alias(self, p: Dir, name: bytes, node: Node, layer: Layer) -> LDir:
        """(p, name) exists in the writable layer: for a hard link that was copied up under another name, link it."""
        into = self.ensure_dir(p, layer)
        more = node.more
        if more is None or more.index is None:
            return into
        if self.driver.probe(into, name):
            return into
        links = self._links(node)
        self.table.correcting(node, links, links)
        with self._times_kept(into):
            os.link(more.index, name, src_dir_fd=node.ldir.open().n, dst_dir_fd=into.open().n, follow_symlinks=False)
        self._add_nlink_delta(node, -1)
        self._name_added(p, name, into, False, new=False)
        return into

    def _links(self, node: Node) -> int:
        return self._stat(node).st_nlink + node.extra().nlink_delta

    def _add_nlink_delta(self, node: Node, change: int) -> None:
        more = node.extra()
        more.nlink_delta += change
        _, path, _ = self._at(node)
        self.driver.set_nlink_delta(path, more.nlink_delta)

    # --- pieces ---

    def _work(self, layer: Layer) -> LDir:
        work = layer.work
        if work is None:
            raise fail(errno.EROFS)
        return work

    def _tmp_name(self) -> bytes:
        self._tmp += 1
        return b"#%x" % self._tmp

    def _discard(self, work: LDir, tmp: bytes, is_dir: bool) -> None:
        """Remove a half-built entry; what can't be removed now goes at the next mount."""
        try:
            if is_dir:
                os.rmdir(tmp, dir_fd=work.open().n)
            else:
                os.unlink(tmp, dir_fd=work.open().n)
        except OSError:
            pass

    def _open_inode(self, node: Node, flags: int) -> int:
        """A descriptor of the node's inode in the layer where it lies (not of a metacopy's data)."""
        more = node.more
        flags |= os.O_CLOEXEC
        if more is not None and more.pin is not None:
            return os.open(fd_path(more.pin), flags)
        name = more.index if more is not None and more.index is not None else node.name
        return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=node.ldir.open().n)

    def _open_source(self, node: Node) -> OpenFile:
        """The node's bytes, wherever they are, for reading."""
        more = node.more
        opened = self.files.get(node.id)
        if opened is not None:
            return opened
        if more is not None and more.data is not None:
            redirected = self.driver.open_redirected(self, node, False)
            return redirected or OpenFile(self._open_quiet(more.data[1], more.data[0]), False)
        if node.ldir.layer.writable or (more is not None and more.pin is not None):
            return OpenFile(self._open_inode(node, os.O_RDONLY), False)
        return OpenFile(self._open_quiet(node.disk_name(), node.ldir), False)

    @staticmethod
    def _open_quiet(name: bytes, ldir: LDir) -> int:
        """Open a lower file for reading; its access time stays as it is where we may ask for that."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        fd = ldir.open()
        try:
            return os.open(name, flags | os.O_NOATIME, dir_fd=fd.n)
        except PermissionError:
            return os.open(name, flags, dir_fd=fd.n)

    def _replace_file(self, node: Node, made: OpenFile | None) -> None:
        """After a copy-up of data: the descriptor of the old place goes; the one that wrote the copy, if given, serves
        what comes next (most often the write that asked for it)."""
        self.files.pop(node.id, None)
        if made is not None:
            self._keep_file(node, made)

    def _copy_owner(self, fd: int, st: os.stat_result) -> None:
        if st.st_uid != self.fsuid or st.st_gid != self.fsgid:
            try:
                os.fchown(fd, st.st_uid, st.st_gid)
            except PermissionError:
                if self.fsuid == 0:
                    raise
                # an ordinary user's copy belongs to that user, as with cp
        os.fchmod(fd, st.st_mode & 0o7777)

    def _copy_xattrs(self, src: bytes | int, dst: bytes | int, follow: bool, dst_follow: bool) -> None:
        try:
            names = os.listxattr(src, follow_symlinks=follow)
        except OSError as e:
            if e.errno in (errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM):
                return
            raise
        for name in names:
            if self.driver.xattr_out(name) is None:
                continue
            try:
                value = os.getxattr(src, name, follow_symlinks=follow)
                os.setxattr(dst, name, value, follow_symlinks=dst_follow)
            except OSError as e:
                if e.errno == errno.ENODATA:
                    continue
                # as the kernel's overlayfs: what the upper can't hold for lack of rights or support is left behind
                if e.errno in (errno.EOPNOTSUPP, errno.EPERM) and not name.startswith("user."):
                    continue
                raise


class _TimesKept:
    """Context: the directory's access and modification times are what they were before."""

    __slots__ = ("ldir", "st")

    def __init__(self, ldir: LDir) -> None:
        self.ldir = ldir

    def __enter__(self) -> None:
        self.st = os.fstat(self.ldir.open().n)

    def __exit__(self, *_: object) -> None:
        _put_times_back(self.ldir.open().n, self.st)


def _put_times_back(fd: int, st: os.stat_result) -> None:
    """Not worth failing an operation for."""
    try:
        os.utime(fd, ns=(st.st_atime_ns, st.st_mtime_ns))
    except OSError:
        pass
