"""The aufs format on disk: what the aufs driver reads and records. See aufs.py.

A deletion is a file `.wh.NAME`, and it may stand beside an entry of that name; a directory that hides those below holds
`.wh..wh..opq`. Xattrs `trusted.unionfs.*` (`user.unionfs.*` where those are not allowed) note what the format has no
word for: inode numbers and link counts of copies, redirects of renamed directories.
"""

from __future__ import annotations

import errno
import os

from unionfs.core.driver import NO_MARKS, Driver, FileMarks, Marks
from unionfs.core.layers import Fd, Layer, LDir, fd_path
from unionfs.sysio import RENAME_EXCHANGE, RENAME_NOREPLACE, renameat2

from . import aufs_branches as own
from . import branches, origin

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unionfs.core.driver import Probe

WH = b".wh."
WH_OPAQUE = b".wh..wh..opq"
OPAQUE = Marks(opaque=True)
_PREFIXES = ("trusted.unionfs.", "user.unionfs.")


class AufsFormat(Driver):
    # what options say of it
    always_opaque = False  # new directories are marked opaque always
    keep_ino = True  # copies note the inode number of what they are copies of
    redirects = False  # a renamed directory notes where the layers below have it
    show_whiteouts = False

    prefix: str | None = None  # of our xattrs; None: no writable branch takes any
    plinks: dict[Layer, tuple[LDir, set[bytes]]]  # of writable layers: the directory of pseudo-links, and its names
    bottom = 0
    _tmp_count = 0

    # --- reading ---

    @staticmethod
    def _honours(layer: Layer) -> bool:
        return layer.permission == "rw" or "wh" in layer.attrs

    def probe(self, ldir: LDir, name: bytes) -> Probe:
        try:
            return os.stat(name, dir_fd=(ldir.fd or ldir.open()).n, follow_symlinks=False)
        except FileNotFoundError:
            layer = ldir.layer
            if layer.index != self.bottom and self._honours(layer) and self.beside(ldir, name):
                return False
            return None

    def cut_off(self, ldir: LDir, name: bytes) -> bool:
        return ldir.layer.index != self.bottom and self._honours(ldir.layer) and self.beside(ldir, name)

    @staticmethod
    def beside(ldir: LDir, name: bytes) -> bool:
        """`.wh.NAME` is there."""
        if len(name) > 255 - len(WH):
            return False
        return os.access(WH + name, os.F_OK, dir_fd=ldir.open().n, follow_symlinks=False)

    def scan(self, ldir: LDir) -> tuple[list[tuple[bytes, bool]], list[bytes]]:
        entries: list[tuple[bytes, bool]] = []
        whiteouts: list[bytes] = []
        honoured = self._honours(ldir.layer)
        # a descriptor of its own: a shared one would share its position with other threads
        fd = Fd(os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=ldir.open().n))
        with os.scandir(fd.n) as it:
            for entry in it:
                name = os.fsencode(entry.name)
                if name.startswith(WH):
                    if honoured and not name.startswith(b".wh..wh."):
                        whiteouts.append(name[len(WH) :])
                    if not self.show_whiteouts:
                        continue
                entries.append((name, entry.is_dir(follow_symlinks=False)))
        return entries, whiteouts

    def marks(self, ldir: LDir) -> Marks:
        if not self._honours(ldir.layer):
            return NO_MARKS
        if os.access(WH_OPAQUE, os.F_OK, dir_fd=ldir.open().n, follow_symlinks=False):
            return OPAQUE
        if self.redirects:
            for key, value in self._own_xattrs(fd_path(ldir.open()), True):
                if key == "redirect":
                    return Marks(redirect=value)
        return NO_MARKS

    def file_marks(self, ldir: LDir, name: bytes) -> FileMarks | None:
        if ldir.impure is None:
            # a branch whose root is not marked holds no copies anywhere: none of its directories needs to be asked
            root = ldir.layer.root
            if root.impure is None:
                root.impure = self._reads_impure(root)
            ldir.impure = root.impure and (ldir is root or self._reads_impure(ldir))
        if not ldir.impure:
            return None
        marks: FileMarks | None = None
        for key, value in self._own_xattrs(fd_path(ldir.open(), name), False):
            if marks is None:
                marks = FileMarks()
            if key == "ino":
                marks.ino = int(value)
            elif key == "nlink":
                if value.startswith(b"L"):
                    marks.lower_delta = int(value[1:])
                else:
                    marks.index_delta = int(value)
        return marks

    def _reads_impure(self, ldir: LDir) -> bool:
        return any(key == "impure" for key, _ in self._own_xattrs(fd_path(ldir.open()), True))

    @staticmethod
    def _own_xattrs(path: bytes, follow: bool) -> list[tuple[str, bytes]]:
        try:
            names = os.listxattr(path, follow_symlinks=follow)
        except OSError as e:
            if e.errno in (errno.EOPNOTSUPP, errno.ENOSYS):
                return []
            raise
        return [
            (name[len(prefix) :], os.getxattr(path, name, follow_symlinks=follow))
            for name in names
            for prefix in _PREFIXES
            if name.startswith(prefix)
        ]

    def concerns(self, name: bytes) -> bytes | None:
        if not name.startswith(WH):
            return name
        return b"" if name == WH_OPAQUE else None if name.startswith(b".wh..wh.") else name[len(WH) :]

    def reserved(self, name: bytes) -> bool:
        return name.startswith(WH) and not self.show_whiteouts

    # --- recording ---

    def whiteout(self, ldir: LDir, name: bytes) -> None:
        if len(name) > self.name_limit:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), name)
        os.close(os.open(WH + name, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o444, dir_fd=ldir.open().n))

    def is_whiteout(self, ldir: LDir, name: bytes) -> bool:
        return False  # a whiteout is never in the way of an entry

    def swap_for_whiteout(self, ldir: LDir, name: bytes, is_dir: bool) -> None:
        with _Whiteout(self, ldir, name):  # beside the entry it hides nothing but what is below
            if is_dir:
                self.remove_dir(ldir, name)
            else:
                os.unlink(name, dir_fd=ldir.open().n)

    def publish(self, work: LDir, tmp: bytes, ldir: LDir, name: bytes, is_dir: bool) -> None:
        os.rename(tmp, name, src_dir_fd=work.open().n, dst_dir_fd=ldir.open().n)

    def move(self, src: LDir, name: bytes, dst: LDir, newname: bytes, leave_whiteout: bool, is_dir: bool) -> None:
        if leave_whiteout:
            with _Whiteout(self, src, name):
                self._move(src, name, dst, newname, is_dir)
        else:
            self._move(src, name, dst, newname, is_dir)

    def _move(self, src: LDir, name: bytes, dst: LDir, newname: bytes, is_dir: bool) -> None:
        sfd, dfd = src.open(), dst.open()
        try:
            os.rename(name, newname, src_dir_fd=sfd.n, dst_dir_fd=dfd.n)
        except OSError as e:
            if not is_dir or e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # a directory that shows no entries but holds whiteouts
            renameat2(sfd.n, name, dfd.n, newname, RENAME_EXCHANGE)
            try:
                self.remove_dir(src, name)
            except OSError:
                renameat2(sfd.n, name, dfd.n, newname, RENAME_EXCHANGE)
                raise

    def beside_whiteout(self, ldir: LDir, name: bytes) -> bool:
        return self.always_opaque or self.beside(ldir, name)

    def drop_whiteout_beside(self, ldir: LDir, name: bytes) -> None:
        try:
            os.unlink(WH + name, dir_fd=ldir.open().n)
        except FileNotFoundError:
            pass

    def make_nested_whiteout(self, dirfd: int, name: bytes) -> None:
        os.mknod(name, 0o020000, 0, dir_fd=dirfd)  # to aufs a device like any other

    def set_opaque(self, ldir: LDir, name: bytes) -> None:
        inner = ldir.child(name)
        flags = os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        os.close(os.open(WH_OPAQUE, flags, 0o444, dir_fd=inner.open().n))

    def set_redirect(self, ldir: LDir, name: bytes, path: bytes) -> None:
        if not self.redirects or self.prefix is None:
            super().set_redirect(ldir, name, path)
        os.setxattr(fd_path(ldir.open(), name), f"{self.prefix}redirect", path, follow_symlinks=False)

    def clear_dir(self, ldir: LDir, name: bytes) -> None:
        """`move` takes the place of a directory that holds whiteouts in one step."""

    def remove_dir(self, ldir: LDir, name: bytes) -> None:
        work = ldir.layer.work
        assert work is not None
        self._tmp_count += 1
        tmp = b"#w%x" % self._tmp_count
        os.rename(name, tmp, src_dir_fd=ldir.open().n, dst_dir_fd=work.open().n)
        gone = work.child(tmp)
        if self.outside != "none" and any(not inner.startswith(WH) for inner in os.listdir(fd_path(gone.open()))):
            # somebody has put something there since it was found empty
            renameat2(work.open().n, tmp, ldir.open().n, name, RENAME_NOREPLACE)
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), name)
        try:
            branches.empty(gone)
            gone.fd = None
            os.rmdir(tmp, dir_fd=work.open().n)
        except OSError:
            pass  # what resists goes at the next mount

    def mark_copy(self, path: bytes | int, source: LDir, name: bytes, ino: int, follow: bool) -> None:
        if self.keep_ino:
            self._note(path, "ino", b"%d" % ino, follow)

    def mark_impure(self, ldir: LDir) -> None:
        if self.keep_ino or self.index:
            for marked in (ldir.layer.root, ldir):
                if marked.impure is not True:
                    self._note(fd_path(marked.open()), "impure", b"y", True)
                    marked.impure = True

    def _note(self, path: bytes | int, key: str, value: bytes, follow: bool) -> None:
        """On a filesystem without xattrs there is no note: a copy's inode number is a new one after a remount."""
        if self.prefix is None:
            return
        try:
            os.setxattr(path, self.prefix + key, value, follow_symlinks=follow)
        except OSError as e:
            if e.errno not in (errno.EOPNOTSUPP, errno.EPERM):  # EPERM: user.* on a symlink or device
                raise

    # --- hard links over copy-up ---

    def index_dir(self, layer: Layer) -> LDir | None:
        index, _ = self.plinks[layer]
        if index.fd is None:
            index.fd = own.own_directory(layer, own.PSEUDO_LINKS).fd
        return index

    def index_name(self, source: LDir, name: bytes, st: os.stat_result) -> bytes | None:
        return origin.index_name(source, name)

    def index_find(self, source: LDir, name: bytes, st: os.stat_result) -> tuple[LDir, bytes] | None:
        entry: bytes | None = None
        for layer in self.writable:
            index, entries = self.plinks[layer]
            if entries and layer.index < source.layer.index:
                entry = entry or self.index_name(source, name, st)
                if entry in entries:
                    assert entry is not None
                    return index, entry
        return None

    def index_added(self, index: LDir, entry: bytes) -> None:
        self.plinks[index.layer][1].add(entry)

    def index_removed(self, index: LDir, entry: bytes) -> None:
        self.plinks[index.layer][1].discard(entry)

    def index_rows(self) -> dict[tuple[LDir, bytes], int]:
        found = {}
        for index, entries in self.plinks.values():
            for entry in entries:
                marks = dict(self._own_xattrs(fd_path(index.open(), entry), False))
                found[index, entry] = int(marks.get("nlink", b"0")) + 1  # the entry itself is a name less to users
        return found

    def index_dissolved(self, index: LDir, entry: bytes) -> None:
        path = fd_path(index.open(), entry)
        if self.prefix is not None:
            try:
                os.removexattr(path, self.prefix + "nlink", follow_symlinks=False)
            except OSError:
                pass  # it had none
        os.unlink(entry, dir_fd=index.open().n)
        self.index_removed(index, entry)

    def set_nlink_delta(self, path: bytes, delta: int, of_lower: bool = False) -> None:
        self._note(path, "nlink", (b"L%d" if of_lower else b"%d") % delta, b"/" not in path[14:])

    # --- xattrs ---

    def xattr_in(self, name: bytes) -> bytes | None:
        return None if name.startswith((b"trusted.unionfs.", b"user.unionfs.")) else name

    def xattr_out(self, name: str) -> bytes | None:
        return None if name.startswith(_PREFIXES) else os.fsencode(name)


class _Whiteout:
    """Context: a whiteout for what is taken away inside; it goes again if that fails."""

    def __init__(self, driver: AufsFormat, ldir: LDir, name: bytes) -> None:
        self.driver, self.ldir, self.name = driver, ldir, name

    def __enter__(self) -> None:
        self.was = self.driver.beside(self.ldir, self.name)
        self.driver.whiteout(self.ldir, self.name)

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if failed is not None and not self.was:
            self.driver.drop_whiteout_beside(self.ldir, self.name)


def probe_prefix(layer: Layer) -> str | None:
    work = layer.work
    assert work is not None
    for prefix in _PREFIXES:
        try:
            os.setxattr(fd_path(work.open()), prefix + "probe", b"y")
            os.removexattr(fd_path(work.open()), prefix + "probe")
            return prefix
        except OSError:
            continue
    return None
