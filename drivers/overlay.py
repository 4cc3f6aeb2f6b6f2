"""The overlay driver: the kernel overlayfs's format, in its own layers and in those of its relatives.

Whiteouts are character devices 0:0, or `.wh.NAME` files where mknod is refused; marks are `trusted.overlay.*` xattrs,
or `user.overlay.*` without the privilege. Read in any layer: both namespaces, `.wh.` files, `.wh..wh..opq`,
`user.fuseoverlayfs.opaque`, and xattr whiteouts (kernel 6.7). Format: Documentation/filesystems/overlayfs.rst.
"""

from __future__ import annotations

import errno
import os
from stat import S_ISCHR, S_ISDIR

from unionfs.api import MountConfig
from unionfs.core.idmap import OPTIONS
from unionfs.core.layers import FdCache, Layer, LDir, fd_path
from unionfs.errors import EXIT_LAYER, EXIT_PERMISSION, EXIT_USAGE, MountError
from unionfs.sysio import RENAME_EXCHANGE, RENAME_WHITEOUT, renameat2

from . import branches, origin
from .branches import flag
from .overlay_marks import PREFIXES, WH_OPAQUE, OverlayMarks

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from unionfs.core.driver import Probe

WH = b".wh."
MAX_LOWERS = 500


class OverlayDriver(OverlayMarks):
    name = "overlay"
    maps = False  # reads the row driver's block maps in upper
    options = {  # noqa: RUF012
        "redirect_dir": "on|off: rename directories of lower layers by a redirect (default on; off: EXDEV)",
        "metacopy": "on|off: a change of a big file's metadata copies no data (default on)",
        "index": "on|off: hard links of lower files stay linked over copy-up (default on)",
        "volatile": "sync nothing: fast, and lost in a power cut",
        "fsync": "0: same as volatile",
        "size": "SIZE: what upper may hold (10g, 500m ...); beyond it ENOSPC",
        "xino": "accepted: inode numbers are always made distinct",
        "userxattr": "marks in user.overlay.* xattrs even with the privilege for trusted.overlay.*",
        **OPTIONS,
    }

    def __init__(self, config: MountConfig) -> None:
        super().__init__(config)
        self.fds = FdCache(branches.fd_budget())
        self.wh_files = False  # whiteouts of ours are .wh. files
        self._holder: LDir | None = None
        self._tmp_count = 0
        # options first: a bad one must be refused before anything is touched
        redirects, metacopy, index = (
            flag(config.options, name, True) for name in ("redirect_dir", "metacopy", "index")
        )
        self.volatile = flag(config.options, "volatile", False) or not flag(config.options, "fsync", True)
        if "size" in config.options and config.upper is not None:
            from unionfs.core.quota import parse_size

            self.quota = parse_size(config.options["size"])
        self._open_layers(config)
        self.bottom = len(self.layers) - 1
        self.ino_bases = origin.device_bases(self.layers)
        self.redirects = redirects and self.has_xattrs
        self.metacopy = metacopy and self.redirects
        if not self.read_only:
            self._open_index(index and self.has_xattrs)

    # --- opening ---

    def _open_layers(self, config: MountConfig) -> None:
        if not config.lowers and config.upper is None:
            raise MountError("no layers: give --lower, or --lower and --upper", EXIT_USAGE)
        if len(config.lowers) > MAX_LOWERS:
            raise MountError(f"{len(config.lowers)} lower directories: at most {MAX_LOWERS} are supported", EXIT_USAGE)
        roles = [("lower", path) for path in config.lowers]
        for role, path in roles:
            branches.check_directory(path, role)
        if config.upper is not None:
            upper = branches.check_directory(config.upper, "upper")
            roles.append(("upper", config.upper))
            if config.work is not None:  # not needed to read
                roles.append(("work", config.work))
                self._check_work(config.work, upper)
        branches.check_overlap(roles)
        fresh = config.work is not None and not os.path.exists(config.work)
        if config.upper is not None:
            top = branches.open_layer(0, config.upper, "upper", not config.read_only, self.fds, self.maps)
            self.layers.append(top)
            if config.read_only:
                self.read_only = True
            else:
                assert config.work is not None
                branches.lock(top.root, "upper", config.upper)
                top.work, self._holder = branches.open_work(top, config.work, fresh, self.fds)
                self._probe_upper(top)
                self.writable.append(top)
        for path in config.lowers:
            self.layers.append(branches.open_layer(len(self.layers), path, "lower", False, self.fds))

    @staticmethod
    def _check_work(work: bytes, upper: os.stat_result) -> None:
        parent = work if os.path.isdir(work) else os.path.dirname(work)
        st = branches.check_directory(parent, "work")
        if st.st_dev != upper.st_dev:
            raise MountError(
                f"work {branches.show(work)}: on another filesystem than upper; give a directory beside upper",
                EXIT_LAYER,
            )

    def _probe_upper(self, top: Layer) -> None:
        """What the upper's filesystem and our rights allow."""
        work = top.work
        assert work is not None
        fd = work.open()
        try:
            os.mkdir(b"#probe", 0o700, dir_fd=fd.n)
        except OSError as e:
            raise MountError(
                f"upper {branches.show(top.path)}: not writable: {e.strerror}; leave out upper for a read-only mount",
                EXIT_PERMISSION,
            ) from None
        candidates = PREFIXES[1:] if "userxattr" in self.config.options else PREFIXES
        for prefix in candidates:
            try:
                os.setxattr(fd_path(fd, b"#probe"), prefix + "opaque", b"y")
                self.prefix = prefix
                break
            except OSError:
                continue
        else:
            self.has_xattrs = False
        os.rmdir(b"#probe", dir_fd=fd.n)
        self.wh_files = bool(os.environ.get("FUSE_OVERLAYFS_DISABLE_OVL_WHITEOUT"))
        if not self.wh_files:
            try:
                os.mknod(b"#probe", 0o020000, 0, dir_fd=fd.n)
                os.unlink(b"#probe", dir_fd=fd.n)
            except OSError:
                self.wh_files = True

    def _open_index(self, wanted: bool) -> None:
        holder = self._holder
        assert holder is not None
        if not wanted or not all(origin.supported(layer.root) for layer in self.layers[1:]):
            return
        try:
            os.mkdir(b"index", 0o700, dir_fd=holder.open().n)
        except FileExistsError:
            pass
        self._index = holder.child(b"index")
        self._index.impure = True
        self.index_entries = set(os.listdir(fd_path(self._index.open())))
        self.index = True

    def take_over(self) -> None:
        if self.read_only:
            return
        top = self.layers[0]
        assert top.work is not None
        branches.empty(top.work)
        if self._index is not None:
            self.index_entries = set(os.listdir(fd_path(self._index.open())))
        self.marks(top.root)  # it may have become impure

    def stop(self) -> None:
        for ldir in (self._holder, *(layer.root for layer in self.layers)):
            if ldir is not None:
                ldir.fd = None  # the locks go with the descriptors

    # --- reading ---

    def probe(self, ldir: LDir, name: bytes) -> Probe:
        try:
            st = os.stat(name, dir_fd=(ldir.fd or ldir.open()).n, follow_symlinks=False)
        except FileNotFoundError:
            if ldir.layer.index != self.bottom and self._wh_beside(ldir, name):
                return False
            return None
        mode = st.st_mode
        if mode & 0o170000 == 0o020000 and st.st_rdev == 0:
            return False
        if ldir.xwhiteouts and mode & 0o170000 == 0o100000 and not st.st_size and self._xattr_whiteout(ldir, name):
            return False
        return st

    @staticmethod
    def _wh_beside(ldir: LDir, name: bytes) -> bool:
        if len(name) > 251:
            return False
        return os.access(WH + name, os.F_OK, dir_fd=ldir.open().n, follow_symlinks=False)

    def scan(self, ldir: LDir) -> tuple[list[tuple[bytes, bool]], list[bytes]]:
        entries: list[tuple[bytes, bool]] = []
        whiteouts: list[bytes] = []
        held = ldir.open()
        plain = not ldir.xwhiteouts  # what looks like a file is one
        # By path: that gives names as bytes, and a descriptor of its own, whose position no other thread moves.
        with os.scandir(fd_path(held)) as it:
            for entry in it:
                name = entry.name
                if name.startswith(WH):
                    if name != WH_OPAQUE:
                        whiteouts.append(name[len(WH) :])
                elif plain and entry.is_file(follow_symlinks=False):
                    entries.append((name, False))
                elif entry.is_dir(follow_symlinks=False):
                    entries.append((name, True))
                elif entry.is_symlink():
                    entries.append((name, False))
                else:
                    st = self.probe(ldir, name)
                    if st:
                        entries.append((name, S_ISDIR(st.st_mode)))
                    elif st is False:
                        whiteouts.append(name)
        return entries, whiteouts

    def reserved(self, name: bytes) -> bool:
        return name.startswith(WH)

    # --- recording ---

    def whiteout(self, ldir: LDir, name: bytes) -> None:
        if self.wh_files:
            os.close(os.open(WH + name, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o644, dir_fd=ldir.open().n))
        else:
            os.mknod(name, 0o020000, 0, dir_fd=ldir.open().n)

    def is_whiteout(self, ldir: LDir, name: bytes) -> bool:
        try:
            st = os.stat(name, dir_fd=ldir.open().n, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return S_ISCHR(st.st_mode) and st.st_rdev == 0

    def swap_for_whiteout(self, ldir: LDir, name: bytes, is_dir: bool) -> None:
        fd = ldir.open()
        if self.wh_files:
            self.whiteout(ldir, name)  # beside the entry it does nothing yet
            if is_dir:
                self.remove_dir(ldir, name)
            else:
                os.unlink(name, dir_fd=fd.n)
            return
        work = self.layers[0].work
        assert work is not None
        wfd = work.open()
        tmp = self._tmp()
        os.mknod(tmp, 0o020000, 0, dir_fd=wfd.n)
        try:
            if is_dir:
                renameat2(wfd.n, tmp, fd.n, name, RENAME_EXCHANGE)
            else:
                os.rename(tmp, name, src_dir_fd=wfd.n, dst_dir_fd=fd.n)
        except OSError:
            os.unlink(tmp, dir_fd=wfd.n)
            raise
        if is_dir:
            self._dispose(work, tmp)

    def _tmp(self) -> bytes:
        self._tmp_count += 1
        return b"#w%x" % self._tmp_count

    def _dispose(self, work: LDir, tmp: bytes) -> None:
        """Remove a directory that holds only whiteouts and markers; what resists goes at the next mount."""
        gone = work.child(tmp)
        try:
            branches.empty(gone)
            gone.fd = None
            os.rmdir(tmp, dir_fd=work.open().n)
        except OSError:
            pass

    def publish(self, work: LDir, tmp: bytes, ldir: LDir, name: bytes, is_dir: bool) -> None:
        wfd, fd = work.open(), ldir.open()
        try:
            os.rename(tmp, name, src_dir_fd=wfd.n, dst_dir_fd=fd.n)
        except NotADirectoryError:  # a directory takes the place of a whiteout
            renameat2(wfd.n, tmp, fd.n, name, RENAME_EXCHANGE)
            try:
                os.unlink(tmp, dir_fd=wfd.n)
            except OSError:
                pass  # what was to be done is done; the next mount empties work
        self.drop_whiteout_beside(ldir, name)

    def move(self, src: LDir, name: bytes, dst: LDir, newname: bytes, leave_whiteout: bool, is_dir: bool) -> None:
        sfd, dfd = src.open(), dst.open()
        if self.wh_files:
            if leave_whiteout:
                self.whiteout(src, name)
            os.rename(name, newname, src_dir_fd=sfd.n, dst_dir_fd=dfd.n)
            self.drop_whiteout_beside(dst, newname)
            return
        if is_dir and self.is_whiteout(dst, newname):
            renameat2(sfd.n, name, dfd.n, newname, RENAME_EXCHANGE)
            if not leave_whiteout:
                os.unlink(name, dir_fd=sfd.n)
            return
        if not leave_whiteout:
            os.rename(name, newname, src_dir_fd=sfd.n, dst_dir_fd=dfd.n)
            return
        try:
            renameat2(sfd.n, name, dfd.n, newname, RENAME_WHITEOUT)
        except OSError as e:
            if e.errno not in (errno.EINVAL, errno.EPERM, errno.ENOSYS):
                raise
            os.rename(name, newname, src_dir_fd=sfd.n, dst_dir_fd=dfd.n)
            os.mknod(name, 0o020000, 0, dir_fd=sfd.n)

    def beside_whiteout(self, ldir: LDir, name: bytes) -> bool:
        return self.wh_files and self._wh_beside(ldir, name)

    def drop_whiteout_beside(self, ldir: LDir, name: bytes) -> None:
        if self.wh_files:
            try:
                os.unlink(WH + name, dir_fd=ldir.open().n)
            except FileNotFoundError:
                pass

    def make_nested_whiteout(self, dirfd: int, name: bytes) -> None:
        if not self.has_xattrs:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0, dir_fd=dirfd)
        try:
            self.mark_nested_whiteout(fd)
        finally:
            os.close(fd)

    def clear_dir(self, ldir: LDir, name: bytes) -> None:
        inner = ldir.child(name)
        fd = inner.open()
        for entry in os.listdir(fd_path(fd)):
            os.unlink(entry, dir_fd=fd.n)
        inner.fd = None

    def remove_dir(self, ldir: LDir, name: bytes) -> None:
        work = self.layers[0].work
        assert work is not None
        tmp = self._tmp()
        os.rename(name, tmp, src_dir_fd=ldir.open().n, dst_dir_fd=work.open().n)
        self._dispose(work, tmp)

    # --- xattrs and people ---

    def name_max(self, native: int) -> int:
        return min(native, 255 - len(WH)) if self.wh_files else native

    def status(self) -> dict[str, Any]:
        return {
            "whiteouts": ".wh. files" if self.wh_files else "character devices 0:0",
            "xattrs": self.prefix + "*" if self.has_xattrs else "none",
            "redirect_dir": self.redirects,
            "metacopy": self.metacopy,
            "index": self.index,
            "volatile": self.volatile,
        }
