"""The vfs driver: the first mount copies all that the lowers show into upper; from then on upper is the whole tree.

The baseline that needs nothing of the lowers afterwards, and the slowest to begin with: extents are shared where the
filesystem can (FICLONE), else the first mount takes as long as `cp -a`. Upper must be empty then. The file
`.wh..wh.vfs` in upper's root, which users can't see, says "copying" or "complete": a copy that was interrupted is begun
anew by the next mount. Afterwards upper is an overlay upper of one layer, and a plain directory for anybody else.
"""

from __future__ import annotations

import errno
import os
from stat import S_IFMT, S_IMODE, S_ISDIR, S_ISLNK, S_ISREG, S_ISSOCK

from unionfs import sysio
from unionfs.api import Attr, MountConfig
from unionfs.core.layers import LDir, fd_path
from unionfs.core.ops import UnionOperations
from unionfs.errors import EXIT_FORMAT, EXIT_USAGE, MountError

from . import branches
from .overlay import OverlayDriver

MARK = b".wh..wh.vfs"
COPYING, COMPLETE = b"copying\n", b"complete\n"
_NS = 1_000_000_000


class VfsDriver(OverlayDriver):
    name = "vfs"

    def __init__(self, config: MountConfig) -> None:
        if config.upper is None:
            raise MountError("driver vfs copies the lowers into upper: give --upper DIR", EXIT_USAGE)
        state = _state(config.upper)
        if state is None and os.listdir(config.upper):
            raise MountError(
                f"upper {branches.show(config.upper)}: not empty, and no copy that driver vfs made: give an empty one",
                EXIT_FORMAT,
            )
        if state != COMPLETE and config.read_only:
            raise MountError(
                f"upper {branches.show(config.upper)}: not copied yet: the first mount can't be read-only", EXIT_FORMAT
            )
        layers = [("lower", path) for path in config.lowers]
        branches.check_overlap([*layers, ("upper", config.upper)])  # or the copy would copy itself
        super().__init__(_alone(config))
        self.config = config
        if state != COMPLETE:
            try:
                self._fill(config, state)
            except OSError as error:
                self.stop()
                text = f"upper {branches.show(config.upper)}: copying the lowers: {error.strerror}"
                raise MountError(text, EXIT_FORMAT) from None
            except BaseException:
                self.stop()
                raise

    def _fill(self, config: MountConfig, state: bytes | None) -> None:
        """Under upper's lock. `state` COPYING: what is there was left by a copy that did not end."""
        top = self.layers[0].root
        if state == COPYING:
            for name in os.listdir(fd_path(top.open())):
                if name != MARK:
                    self._remove(top, name)
        _write_mark(top, COPYING)
        lowers = MountConfig(b"/", driver="overlay")
        lowers.lowers, lowers.read_only = config.lowers, True
        ops = UnionOperations(OverlayDriver(lowers))
        try:
            _Copy(self, ops).run(top)
        finally:
            ops.stop()
        if not self.volatile:
            sysio.syncfs(top.open().n)
        _write_mark(top, COMPLETE)

    def _remove(self, parent: LDir, name: bytes) -> None:
        try:
            os.unlink(name, dir_fd=parent.open().n)
        except IsADirectoryError:
            inner = parent.child(name)
            branches.empty(inner)
            inner.fd = None
            os.rmdir(name, dir_fd=parent.open().n)


def _alone(config: MountConfig) -> MountConfig:
    """The same mount with upper as its one layer."""
    alone = MountConfig(config.mountpoint)
    for name in MountConfig.__slots__:
        setattr(alone, name, getattr(config, name))
    alone.lowers = []
    return alone


def _state(upper: bytes) -> bytes | None:
    branches.check_directory(upper, "upper")
    try:
        with open(os.path.join(upper, MARK), "rb") as stream:
            return COMPLETE if stream.read(16) == COMPLETE else COPYING
    except FileNotFoundError:
        return None


def _write_mark(top: LDir, state: bytes) -> None:
    flags = os.O_CREAT | os.O_TRUNC | os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(MARK, flags, 0o600, dir_fd=top.open().n)
    try:
        os.write(fd, state)
        os.fsync(fd)
    finally:
        os.close(fd)


class _Copy:
    def __init__(self, driver: VfsDriver, ops: UnionOperations) -> None:
        self._driver = driver
        self._ops = ops
        self._links: dict[int, tuple[LDir, bytes]] = {}
        self._directories: list[tuple[LDir, Attr]] = []  # their times are set when all is in them

    def run(self, top: LDir) -> None:
        todo = [(1, top)]
        while todo:
            node, target = todo.pop()
            cookie = 0
            while batch := self._ops.readdirplus(node, cookie, 1 << 16, 152):
                for name, position, (child, _, attr) in batch:
                    cookie = position
                    if self._make(target, name, child, attr):
                        inner = target.child(name)
                        self._directories.append((inner, attr))
                        todo.append((child, inner))
        for made, attr in reversed(self._directories):
            os.utime(made.open().n, ns=(attr[3] * _NS + attr[6], attr[4] * _NS + attr[7]))

    def _make(self, target: LDir, name: bytes, node: int, attr: Attr) -> bool:
        """True for a directory."""
        fd, mode = target.open(), attr[9]
        if S_ISDIR(mode):
            os.mkdir(name, 0o700, dir_fd=fd.n)
            self._attributes(target, name, node, attr)
            return True
        if S_ISSOCK(mode):
            return False  # nobody listens on a copy
        if attr[10] > 1:
            known = self._links.get(attr[0])
            if known is not None:
                os.link(known[1], name, src_dir_fd=known[0].open().n, dst_dir_fd=fd.n, follow_symlinks=False)
                return False
            self._links[attr[0]] = target, name
        if S_ISLNK(mode):
            os.symlink(self._ops.readlink(node), name, dir_fd=fd.n)
        elif S_ISREG(mode):
            self._file(fd.n, name, node, attr[1])
        elif not attr[13] and S_IFMT(mode) == 0o020000:
            self._driver.make_nested_whiteout(fd.n, name)
            self._driver.mark_impure(target)
        else:
            minor, major = attr[13] & 0xFF | attr[13] >> 12 & 0xFFF00, attr[13] >> 8 & 0xFFF
            os.mknod(name, S_IFMT(mode) | 0o600, os.makedev(major, minor), dir_fd=fd.n)
        self._attributes(target, name, node, attr)
        return False

    def _file(self, dirfd: int, name: bytes, node: int, size: int) -> None:
        copy = os.open(name, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=dirfd)
        try:
            source = self._ops.backing_fd(node, False)
            if source is not None:
                try:
                    sysio.copy_data(source, copy, size)
                finally:
                    os.close(source)
                return
            buffer, offset = memoryview(bytearray(1 << 20)), 0  # its data is not in one file of a lower
            while count := self._ops.read(node, offset, buffer):
                os.pwrite(copy, buffer[:count], offset)
                offset += count
        finally:
            os.close(copy)

    def _attributes(self, target: LDir, name: bytes, node: int, attr: Attr) -> None:
        fd, mode = target.open(), attr[9]
        path = fd_path(fd, name)
        try:
            os.chown(name, attr[11], attr[12], dir_fd=fd.n, follow_symlinks=False)
        except PermissionError:
            if os.geteuid() == 0:
                raise  # an ordinary user's copies are the user's
        for key in self._ops.listxattr(node, os.geteuid()):
            stored = self._driver.xattr_in(key)
            try:
                if stored is not None:
                    os.setxattr(path, stored, self._ops.getxattr(node, key), follow_symlinks=False)
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                    raise
        if not S_ISLNK(mode):
            os.chmod(name, S_IMODE(mode), dir_fd=fd.n)
        os.utime(name, ns=(attr[3] * _NS + attr[6], attr[4] * _NS + attr[7]), dir_fd=fd.n, follow_symlinks=False)
