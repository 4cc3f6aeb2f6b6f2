"""The aufs driver: many branches, several of them writable, in aufs's format.

A deletion is a file `.wh.NAME`, and it may stand beside an entry of that name; a directory that hides those below holds
`.wh..wh..opq`. In a writable branch `.wh..wh.orph/` is where entries are built, `.wh..wh.plnk/` holds the inodes of
hard links that were copied up. Both are gone from a branch at rest that does not need them, so a branch is an OCI layer
as it is. Whiteouts of a read-only branch count only with `+wh`. Reference: aufs(5).
"""

from __future__ import annotations

import errno
import os

from unionfs.api import MountConfig
from unionfs.core.driver import NO_MARKS, Driver, FileMarks, Marks
from unionfs.core.idmap import OPTIONS
from unionfs.core.layers import Fd, FdCache, Layer, LDir, fd_path
from unionfs.errors import EXIT_USAGE, MountError
from unionfs.sysio import RENAME_EXCHANGE, renameat2

from . import aufs_branches as own
from . import branches, origin
from .aufs_policy import CreatePolicy, Space, copyup_policy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from unionfs.core.driver import Probe
    from unionfs.core.nodes import Dir

    from .aufs_live import Plan

WH = b".wh."
WH_OPAQUE = b".wh..wh..opq"
OPAQUE = Marks(opaque=True)
_PREFIXES = ("trusted.unionfs.", "user.unionfs.")
FULL_FOR = 30.0  # seconds that a branch which reported ENOSPC gets nothing new


class AufsDriver(Driver):
    name = "aufs"
    options = {  # noqa: RUF012
        "br": "br:PATH=rw:PATH=ro+wh…: the branches, topmost first (also br=, dirs=)",
        "create": "tdp|tdmfs:LOW|rr|mfs|mfsrr:LOW|pmfs|pmfsrr:LOW[:SECONDS]: the branch for new files (default tdp)",
        "cpup": "tdp|bup|bu: the branch for copies of files of read-only branches (default tdp)",
        "moveonenospc": "on|off: a file on a full branch moves to another one when more is written (default off)",
        "shwh": "show whiteouts (read-only mounts)",
        "sum": "free space is that of all branches together",
        "wsum": "free space is that of the writable branches together",
        "xino": "inode numbers survive copy-up and remount (default)",
        "noxino": "they need not: nothing is noted on copies",
        "plink": "hard links stay linked over copy-up (default)",
        "noplink": "a copied-up hard link becomes a file of its own",
        "dirren": "rename directories of lower branches by a redirect, noted in an xattr (else EXDEV)",
        "diropq": "always|whiteouted: when a new directory is marked opaque (default whiteouted)",
        "dirperm1": "accepted: only the topmost directory's permissions count, always",
        "warn_perm": "log branches whose root has another owner or mode than the topmost's",
        "nowarn_perm": "the default",
        "dirwh": "accepted: a removed directory goes in one step, however many whiteouts it holds",
        "dio": "accepted: direct I/O always works",
        "rdcache": "accepted: listings are cached until something changes",
        "rdblk": "accepted, no effect",
        "rdhash": "accepted, no effect",
        "volatile": "sync nothing: fast, and lost in a power cut",
        **OPTIONS,
    }

    def __init__(self, config: MountConfig) -> None:
        super().__init__(config)
        o = config.options
        self.fds = FdCache(branches.fd_budget())
        self.name_limit = 255 - len(WH)
        self.create = CreatePolicy(o.get("create", "tdp"))
        self._copyup = copyup_policy(o.get("cpup", "tdp"))
        self.prefix: str | None = None
        self.full: dict[Layer, float] = {}
        self.keep_ino = "noxino" not in o
        if o.get("xino"):
            raise MountError(
                f"xino={o['xino']}: inode numbers are kept in xattrs of the copies, there is no table file; "
                "give xino without a path, or noxino",
                EXIT_USAGE,
            )
        if o.get("diropq", "whiteouted") not in ("always", "a", "whiteouted", "w"):
            raise MountError(f"diropq={o['diropq']}: must be always or whiteouted", EXIT_USAGE)
        self.always_opaque = o.get("diropq", "") in ("always", "a")
        self.redirects = "dirren" in o
        self.volatile = "volatile" in o
        self.moves = branches.flag(o, "moveonenospc", False)
        if self.moves and config.data == "passthrough":
            raise MountError("moveonenospc: not with data=passthrough, the kernel writes by itself there", EXIT_USAGE)
        self.sum = "all" if "sum" in o else "rw" if "wsum" in o else ""
        self._holder: LDir | None = None  # work/, where it was given
        self._tmp_count = 0
        self.show_whiteouts = "shwh" in o
        try:
            self._open(config)
            if self.show_whiteouts and not self.read_only:
                raise MountError("shwh: only a read-only mount shows whiteouts; add ro", EXIT_USAGE)
        except BaseException:
            self.stop()
            raise
        if "warn_perm" in o:
            for layer in self.layers[1:]:
                self._warn_perm(layer)

    # --- opening ---

    def _open(self, config: MountConfig) -> None:
        wanted = self._wanted(config)
        if not wanted:
            raise MountError("no branches: give --branch PATH=rw, or --lower and --upper", EXIT_USAGE)
        own.check([path for path, _, _ in wanted])
        for path, permission, attributes in wanted:
            layer = branches.open_layer(len(self.layers), path, "branch", permission == "rw", self.fds)
            layer.permission, layer.attrs = permission, attributes
            self.layers.append(layer)
        if config.upper is not None and not config.read_only and not config.branches:
            self._open_given_work(config, self.layers[0])
        for layer in self.layers:
            if layer.writable:
                own.prepare_writable(layer)
        self.plinks: dict[Layer, tuple[LDir, set[bytes]]] = {}
        self.layers_changed(self.layers)
        self.index = "noplink" not in config.options
        for layer in self.writable:
            if self.prefix is None:
                self.prefix = _probe_prefix(layer)

    @staticmethod
    def _wanted(config: MountConfig) -> list[tuple[bytes, str, frozenset[str]]]:
        """The branches: as given, or upper over lowers whose whiteouts count (an unpacked OCI layer is one)."""
        given = [(path, mode) for path, mode in config.branches]
        if config.upper is not None:
            given.append((config.upper, "rw"))
        given += [(path, "ro+wh") for path in config.lowers]
        wanted = []
        for i, (path, mode) in enumerate(given):
            permission, attributes = own.parse_permission(mode, path, "ro" if i else "rw")
            if config.read_only and permission == "rw":
                permission, attributes = "ro", frozenset(("wh",))
            wanted.append((path, permission, attributes))
        return wanted

    def _open_given_work(self, config: MountConfig, top: Layer) -> None:
        assert config.work is not None and config.upper is not None
        parent = config.work if os.path.isdir(config.work) else os.path.dirname(config.work)
        if branches.check_directory(parent, "work").st_dev != top.st_dev:
            return  # our own place in the branch does as well
        branches.check_overlap([("upper", config.upper), ("work", config.work)])
        top.work, self._holder = branches.open_work(top, config.work, not os.path.exists(config.work), self.fds)

    def layers_changed(self, layers: list[Layer]) -> None:
        """Take this list of branches from now on."""
        for index, layer in enumerate(layers):
            layer.index = index
        self.layers = layers
        self.bottom = len(layers) - 1
        self.writable = [layer for layer in layers if layer.writable]
        self.read_only = not self.writable
        for layer in self.writable:
            if layer not in self.plinks:
                self._read_plinks(layer)
        for gone in [layer for layer in (*self.plinks, *self.full) if layer not in self.writable]:
            self.plinks.pop(gone, None)
            self.full.pop(gone, None)
        self.create.space.forget()

    def _read_plinks(self, layer: Layer) -> None:
        index = layer.root.child(own.PSEUDO_LINKS)
        index.impure = True
        try:
            self.plinks[layer] = (index, set(os.listdir(fd_path(index.open()))))
        except FileNotFoundError:
            self.plinks[layer] = (index, set())  # made when the first link needs it

    def _warn_perm(self, layer: Layer) -> None:
        import sys

        top, here = (os.fstat(at.root.open().n) for at in (self.layers[0], layer))
        if (top.st_mode, top.st_uid, top.st_gid) != (here.st_mode, here.st_uid, here.st_gid):
            said = [f"{st.st_mode & 0o7777:o} {st.st_uid}:{st.st_gid}" for st in (here, top)]
            where = branches.show(layer.path)
            print(f"unionfs: warn_perm: branch {where} is {said[0]}, the topmost {said[1]}", file=sys.stderr)

    live = True

    def plan_layers(self, changes: list[list[Any]]) -> Plan:
        from .aufs_live import Plan

        return Plan(self, changes)

    def joined(self, layer: Layer) -> None:
        """A branch was added to the mount."""
        if self.prefix is None and layer.writable:
            self.prefix = _probe_prefix(layer)
        if "warn_perm" in self.config.options:
            self._warn_perm(layer)

    def stop(self) -> None:
        for layer in self.layers:
            if layer.work is not None:
                own.leave(layer)
            layer.root.fd = None  # the locks go with the descriptors
        if self._holder is not None:
            self._holder.fd = None

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
            ldir.impure = any(key == "impure" for key, _ in self._own_xattrs(fd_path(ldir.open()), True))
        if not ldir.impure:
            return None
        marks: FileMarks | None = None
        for key, value in self._own_xattrs(fd_path(ldir.open(), name), False):
            if marks is None:
                marks = FileMarks()
            if key == "ino":
                marks.ino = int(value)
            elif key == "nlink":
                marks.index_delta = int(value)
        return marks

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

    def reserved(self, name: bytes) -> bool:
        return name.startswith(WH) and not self.show_whiteouts

    # --- where ---

    def place_new(self, parent: Dir, fit: list[Layer], is_dir: bool) -> Layer:
        if self.full and len(fit) > 1:
            fit = self._not_full(fit)
        return self.create.choose(parent, fit, is_dir)

    def place_copyup(self, parent: Dir, fit: list[Layer]) -> Layer:
        if self.full and len(fit) > 1:
            fit = self._not_full(fit)
        return self._copyup(parent, fit)

    def _not_full(self, fit: list[Layer]) -> list[Layer]:
        from time import monotonic

        now = monotonic()
        for layer, until in list(self.full.items()):
            if until < now:
                self.full.pop(layer, None)
        return [layer for layer in fit if layer not in self.full] or fit

    def place_moved(self, fit: list[Layer], size: int) -> Layer | None:
        space = Space(0.0)
        best = space.most(fit)
        return best if space.free(best) > size else None

    def filled(self, layer: Layer) -> bool:
        from time import monotonic

        known = layer in self.full
        self.full[layer] = monotonic() + FULL_FOR
        return not known and len(self.writable) > 1

    # --- recording ---

    def whiteout(self, ldir: LDir, name: bytes) -> None:
        if len(name) > self.name_limit:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), name)
        os.close(os.open(WH + name, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o444, dir_fd=ldir.open().n))

    def is_whiteout(self, ldir: LDir, name: bytes) -> bool:
        return False  # a whiteout is never in the way of an entry

    def swap_for_whiteout(self, ldir: LDir, name: bytes, is_dir: bool) -> None:
        self.whiteout(ldir, name)  # beside the entry it hides nothing but what is below
        if is_dir:
            self.remove_dir(ldir, name)
        else:
            os.unlink(name, dir_fd=ldir.open().n)

    def publish(self, work: LDir, tmp: bytes, ldir: LDir, name: bytes, is_dir: bool) -> None:
        os.rename(tmp, name, src_dir_fd=work.open().n, dst_dir_fd=ldir.open().n)

    def move(self, src: LDir, name: bytes, dst: LDir, newname: bytes, leave_whiteout: bool, is_dir: bool) -> None:
        sfd, dfd = src.open(), dst.open()
        if leave_whiteout:
            self.whiteout(src, name)
        try:
            os.rename(name, newname, src_dir_fd=sfd.n, dst_dir_fd=dfd.n)
        except OSError as e:
            if not is_dir or e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # a directory that shows no entries but holds whiteouts
            renameat2(sfd.n, name, dfd.n, newname, RENAME_EXCHANGE)
            self.remove_dir(src, name)

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
            self._note(fd_path(ldir.open()), "impure", b"y", True)
            ldir.impure = True

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

    def set_nlink_delta(self, path: bytes, delta: int) -> None:
        self._note(path, "nlink", b"%d" % delta, b"/" not in path[14:])

    # --- xattrs and people ---

    def xattr_in(self, name: bytes) -> bytes | None:
        return None if name.startswith((b"trusted.unionfs.", b"user.unionfs.")) else name

    def xattr_out(self, name: str) -> bytes | None:
        return None if name.startswith(_PREFIXES) else os.fsencode(name)

    def name_max(self, native: int) -> int:
        return min(native, self.name_limit)

    def statvfs(self) -> tuple[int, int, int, int, int, int, int, int]:
        if not self.sum:
            return super().statvfs()
        blocks = bfree = bavail = files = ffree = 0
        namemax = 255
        filesystems = {layer.st_dev: layer for layer in (self.layers if self.sum == "all" else self.writable)}
        for layer in filesystems.values():  # several branches on one filesystem share its space
            s = os.fstatvfs(layer.root.open().n)
            blocks += s.f_blocks * s.f_frsize // 4096
            bfree += s.f_bfree * s.f_frsize // 4096
            bavail += s.f_bavail * s.f_frsize // 4096
            files += s.f_files
            ffree += s.f_ffree
            namemax = min(namemax, s.f_namemax)
        return blocks, bfree, bavail, files, ffree, 4096, self.name_max(namemax), 4096

    def status(self) -> dict[str, Any]:
        return {
            "create": self.create.text,
            "cpup": self.config.options.get("cpup", "tdp"),
            "xattrs": self.prefix + "*" if self.prefix else "none",
            "plink": self.index,
            "dirren": self.redirects,
            "pseudo_links": sum(len(entries) for _, entries in self.plinks.values()),
            "full": [branches.show(layer.path) for layer in self.full],
        }


def _probe_prefix(layer: Layer) -> str | None:
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
