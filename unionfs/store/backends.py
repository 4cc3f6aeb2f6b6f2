"""What a store's drivers do on disk: make, freeze and delete a layer's directory, say what a mount of it is made of.

A layer's directory holds `diff` (its content), and for the union drivers `work` and `merged` (the mountpoint). A
*chain* is a list of such directories, the layer's own first, then its parent and so on. Backends know no ids, no
database and no locks; calls for different directories may run at the same time.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from unionfs import sysio
from unionfs.api import MountConfig
from unionfs.store.api import Invalid, Unsupported, Usage
from unionfs.store.formats import Format, OverlayFormat, PlainFormat
from unionfs.store.removal import remove
from unionfs.store.tree import DirTree, Row, Tree, UnionTree, compare, everything

DIFF, WORK, MERGED = "diff", "work", "merged"
ROW_MAPS = ".wh..wh.row"


class Backend:
    """The part that all share; the tree of a layer is a union of the chain or, where `whole`, its own directory."""

    whole = False
    name: str
    format: Format

    def make(self, directory: str, parent: str | None, *, readonly: bool) -> None:
        """Content for a new layer in an empty directory. `readonly`: it is a view."""
        raise NotImplementedError

    def inherit_root(self, directory: str, parent: str) -> None:
        """The root of the tree is the topmost layer's: it gets the parent's owner and mode."""
        raise NotImplementedError

    def flatten(self, chain: Sequence[str]) -> list[str]:
        """The command line that makes the layer readable for those above it, before it is frozen; [] if it is."""
        return []

    def freeze(self, directory: str) -> None:
        """The layer was committed: nobody writes to it any more. Idempotent."""
        raise NotImplementedError

    def delete(self, directory: str) -> None:
        raise NotImplementedError

    def mount(self, chain: Sequence[str], writable: bool, options: str) -> list[str]:
        """The command line that mounts the chain on its `merged`; [] if its tree needs no mount."""
        raise NotImplementedError

    def branches(self, chain: Sequence[str], writable: bool) -> tuple[list[str], str, str]:
        raise NotImplementedError

    def tree(self, chain: Sequence[str]) -> Tree:
        """The tree of the chain's first layer, read without a mount."""
        raise NotImplementedError

    def rows(self, chain: Sequence[str], base: Sequence[str]) -> list[Row]:
        """What the first layer of `chain` changes against that of `base` (may be empty)."""
        with opened(self.tree(chain)) as new:
            if not base:
                return everything(new)
            with opened(self.tree(base)) as old:
                return compare(new, old)

    def usage(self, chain: Sequence[str]) -> Usage:
        return disk_usage(os.path.join(chain[0], DIFF))

    def status(self) -> list[tuple[str, str]]:
        return []


@contextmanager
def opened(tree: Tree) -> Iterator[Tree]:
    try:
        yield tree
    finally:
        tree.close()


class UnionBackend(Backend):
    """overlay, aufs and row: `diff` holds the changes, the tree is a mount of ours over the chain."""

    def __init__(self, name: str, home: str) -> None:
        self.name = name
        self._empty = os.path.join(home, "empty")  # below a layer without a parent: a mount has a lower
        os.makedirs(self._empty, 0o755, exist_ok=True)
        self.format = Format() if name == "aufs" else OverlayFormat(home)

    def make(self, directory: str, parent: str | None, *, readonly: bool) -> None:
        os.mkdir(os.path.join(directory, MERGED), 0o755)
        if readonly:
            return
        diff = os.path.join(directory, DIFF)
        os.mkdir(diff, 0o755)
        os.mkdir(os.path.join(directory, WORK), 0o700)
        if parent is not None:
            self.inherit_root(directory, parent)
        else:
            os.chmod(diff, 0o755)

    def inherit_root(self, directory: str, parent: str) -> None:
        diff = os.path.join(directory, DIFF)
        status = os.stat(os.path.join(parent, DIFF))
        if os.geteuid() == 0:
            os.chown(diff, status.st_uid, status.st_gid)
        os.chmod(diff, stat.S_IMODE(status.st_mode))

    def flatten(self, chain: Sequence[str]) -> list[str]:
        """Block maps of the row driver count in the uppermost layer only."""
        lowers, upper, _ = self.branches(chain, True)
        if not lowers or not os.path.isdir(os.path.join(upper, ROW_MAPS)):
            return []
        return ["row", *(word for lower in lowers for word in ("--lower", _escaped(lower))), "--", "flatten", upper]

    def freeze(self, directory: str) -> None:
        """work/ goes: a lower has none."""
        try:
            remove(None, os.fsencode(os.path.join(directory, WORK)))
        except FileNotFoundError:
            pass

    def delete(self, directory: str) -> None:
        remove(None, os.fsencode(directory))

    def branches(self, chain: Sequence[str], writable: bool) -> tuple[list[str], str, str]:
        own, below = chain[0], [os.path.join(layer, DIFF) for layer in chain[1:]]
        diff = os.path.join(own, DIFF)
        if writable:
            return below or [self._empty], diff, os.path.join(own, WORK)
        return ([diff, *below] if os.path.isdir(diff) else below), "", ""

    def mount(self, chain: Sequence[str], writable: bool, options: str) -> list[str]:
        lowers, upper, work = self.branches(chain, writable)
        argv = ["mount", "--driver", self.name]
        for lower in lowers:
            argv += ["--lower", _escaped(lower)]
        if upper:
            argv += ["--upper", upper, "--work", work]
        else:
            argv.append("--read-only")
        if options:
            argv += ["--options", options]
        return [*argv, "--", os.path.join(chain[0], MERGED)]

    def _config(self, lowers: Sequence[str], upper: str, work: str) -> MountConfig:
        config = MountConfig(b"/", driver=self.name)
        config.lowers = [os.fsencode(path) for path in lowers]
        if upper:
            config.upper, config.work = os.fsencode(upper), os.fsencode(work)
        return config

    def tree(self, chain: Sequence[str]) -> Tree:
        return UnionTree(self._config(*self.branches(chain, os.path.isdir(os.path.join(chain[0], WORK)))))

    def rows(self, chain: Sequence[str], base: Sequence[str]) -> list[Row]:
        if list(base) != list(chain[1:]) or not base or not os.path.isdir(os.path.join(chain[0], DIFF)):
            return super().rows(chain, base)
        # against its own parent the layer knows by itself: no walk over the whole tree
        tree = UnionTree(self._config(*self.branches(chain, True)))
        with opened(tree):
            return tree.ops.diff()


class VfsBackend(Backend):
    """vfs: each layer is a whole copy of its parent's tree (shared blocks where the filesystem can)."""

    whole = True
    name = "vfs"

    def __init__(self) -> None:
        self.format = PlainFormat()

    def make(self, directory: str, parent: str | None, *, readonly: bool) -> None:
        diff = os.path.join(directory, DIFF)
        os.mkdir(diff, 0o755)
        if parent is not None:
            copy_tree(os.path.join(parent, DIFF), diff)
        else:
            os.chmod(diff, 0o755)

    def freeze(self, directory: str) -> None:
        pass

    def delete(self, directory: str) -> None:
        remove(None, os.fsencode(directory))

    def branches(self, chain: Sequence[str], writable: bool) -> tuple[list[str], str, str]:
        diff = os.path.join(chain[0], DIFF)
        return ([], diff, "") if writable else ([diff], "", "")

    def mount(self, chain: Sequence[str], writable: bool, options: str) -> list[str]:
        return []

    def tree(self, chain: Sequence[str]) -> Tree:
        return DirTree(os.path.join(chain[0], DIFF))


BTRFS_MAGIC = 0x9123683E
_SUBVOL_CREATE = 0x5000940E  # BTRFS_IOC_SUBVOL_CREATE: struct btrfs_ioctl_vol_args
_SNAP_CREATE_V2 = 0x50009417  # BTRFS_IOC_SNAP_CREATE_V2: struct btrfs_ioctl_vol_args_v2
_SNAP_DESTROY = 0x5000940F
_SUBVOL_SETFLAGS = 0x4008941A
_RDONLY = 2
_SUBVOLUME_INODE = 256


class BtrfsBackend(VfsBackend):
    """btrfs: each layer is a subvolume, a snapshot of its parent's; committed ones are read-only ones."""

    name = "btrfs"

    def __init__(self, home: str) -> None:
        super().__init__()
        if filesystem_magic(home) != BTRFS_MAGIC:
            raise Unsupported(f"driver btrfs: {home} is not on btrfs: choose another data root, or the driver overlay")

    def make(self, directory: str, parent: str | None, *, readonly: bool) -> None:
        name = DIFF.encode()
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            if parent is None:
                _ioctl(fd, _SUBVOL_CREATE, struct.pack("q4088s", 0, name))
                os.chmod(os.path.join(directory, DIFF), 0o755)
                return
            source = os.open(os.path.join(parent, DIFF), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                flags = _RDONLY if readonly else 0
                _ioctl(fd, _SNAP_CREATE_V2, struct.pack("qQQ32x4040s", source, 0, flags, name))
            finally:
                os.close(source)
        finally:
            os.close(fd)

    def freeze(self, directory: str) -> None:
        fd = os.open(os.path.join(directory, DIFF), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _ioctl(fd, _SUBVOL_SETFLAGS, struct.pack("Q", _RDONLY))
        finally:
            os.close(fd)

    def delete(self, directory: str) -> None:
        diff = os.path.join(directory, DIFF)
        if os.path.isdir(diff):
            for inner in [*_subvolumes(diff), diff]:  # a container may have made some of its own: deepest first
                fd = os.open(os.path.dirname(inner), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                try:
                    _ioctl(fd, _SNAP_DESTROY, struct.pack("q4088s", 0, os.fsencode(os.path.basename(inner))))
                finally:
                    os.close(fd)
        remove(None, os.fsencode(directory))

    def usage(self, chain: Sequence[str]) -> Usage:
        """What differs from the parent: snapshots share the rest."""
        if len(chain) == 1:
            return super().usage(chain)
        size, inodes = 0, 0
        rows = self.rows(chain, chain[1:])
        with opened(self.tree(chain)) as tree:
            for kind, path in rows:
                status = tree.stat(path) if kind != "D" else None
                if status is not None:
                    size, inodes = size + status.size, inodes + 1
        return Usage(size, inodes)


def _ioctl(fd: int, request: int, argument: bytes) -> None:
    fcntl.ioctl(fd, request, bytearray(argument))  # a bytes argument may have 1024 at most


def _subvolumes(root: str) -> list[str]:
    found = []
    for path, names, _ in os.walk(root, topdown=False):
        found += [
            os.path.join(path, name)
            for name in names
            if os.lstat(os.path.join(path, name)).st_ino == _SUBVOLUME_INODE
        ]
    return found


def make_backend(driver: str, home: str) -> Backend:
    if driver in ("overlay", "aufs", "row"):
        return UnionBackend(driver, home)
    if driver == "vfs":
        return VfsBackend()
    if driver == "btrfs":
        return BtrfsBackend(home)
    raise Invalid(f"storage driver {driver!r}: one of overlay, aufs, row, vfs, btrfs")


class _Statfs(ctypes.Structure):
    _fields_ = [("type", ctypes.c_long), ("rest", ctypes.c_byte * 256)]


def filesystem_magic(path: str) -> int:
    """statfs(2)'s f_type."""
    buffer = _Statfs()
    if sysio.libc.statfs(os.fsencode(path), ctypes.byref(buffer)):
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), path)
    return int(buffer.type) & 0xFFFFFFFF


def disk_usage(root: str) -> Usage:
    """Allocated bytes and inodes below a directory, hard links once, itself included."""
    if not os.path.isdir(root):
        return Usage(0, 0)
    first = os.lstat(root)
    size, seen = first.st_blocks * 512, {(first.st_dev, first.st_ino)}
    todo = [root]
    while todo:
        with os.scandir(todo.pop()) as entries:
            for entry in entries:
                try:
                    status = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                identity = (status.st_dev, status.st_ino)
                if identity not in seen:
                    seen.add(identity)
                    size += status.st_blocks * 512
                if entry.is_dir(follow_symlinks=False):
                    todo.append(entry.path)
    return Usage(size, len(seen))


def copy_tree(source: str, target: str) -> None:
    """A copy with owners, modes, times, xattrs, holes and hard links. `target` is an empty directory. At rest only."""
    links: dict[tuple[int, int], str] = {}
    _copy_inside(source, target, links)
    _copy_attributes(source, target, os.stat(source))


def _copy_inside(source: str, target: str, links: dict[tuple[int, int], str]) -> None:
    with os.scandir(source) as entries:
        for entry in entries:
            status = entry.stat(follow_symlinks=False)
            new = os.path.join(target, entry.name)
            mode, identity = status.st_mode, (status.st_dev, status.st_ino)
            if stat.S_ISSOCK(mode):
                continue
            if not stat.S_ISDIR(mode) and status.st_nlink > 1:
                if identity in links:
                    os.link(links[identity], new, follow_symlinks=False)
                    continue
                links[identity] = new
            if stat.S_ISDIR(mode):
                os.mkdir(new, 0o700)
                _copy_inside(entry.path, new, links)
            elif stat.S_ISLNK(mode):
                os.symlink(os.readlink(entry.path), new)
            elif stat.S_ISREG(mode):
                with open(entry.path, "rb") as old, open(new, "xb") as copy:
                    sysio.copy_data(old.fileno(), copy.fileno(), status.st_size)
            else:
                os.mknod(new, stat.S_IFMT(mode) | 0o600, status.st_rdev)
            _copy_attributes(entry.path, new, status)


def _copy_attributes(source: str, target: str, status: os.stat_result) -> None:
    if os.geteuid() == 0:
        os.chown(target, status.st_uid, status.st_gid, follow_symlinks=False)
    for name in os.listxattr(source, follow_symlinks=False):
        value = os.getxattr(source, name, follow_symlinks=False)
        try:
            os.setxattr(target, name, value, follow_symlinks=False)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP):
                raise
    if not stat.S_ISLNK(status.st_mode):
        os.chmod(target, stat.S_IMODE(status.st_mode))
    os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns), follow_symlinks=False)


def _escaped(path: str) -> str:
    return path.replace("\\", "\\\\").replace(":", "\\:")
