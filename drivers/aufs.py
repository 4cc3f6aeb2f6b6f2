"""The aufs driver: many branches, several of them writable, in aufs's format (aufs_format.py).

In a writable branch `.wh..wh.orph/` is where entries are built, `.wh..wh.plnk/` holds the inodes of hard links that
were copied up. Both are gone from a branch at rest that does not need them, so a branch is an OCI layer as it is.
Whiteouts of a read-only branch count only with `+wh`. Reference: aufs(5).
"""

from __future__ import annotations

import os

from unionfs.api import MountConfig
from unionfs.core.layers import FdCache, Layer, LDir, fd_path
from unionfs.errors import EXIT_USAGE, MountError

from . import aufs_branches as own
from . import branches
from .aufs_format import WH, AufsFormat, probe_prefix
from .aufs_options import DIROPQ, OPTIONS, settle
from .aufs_policy import CreatePolicy, Space, copyup_policy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from unionfs.core.nodes import Dir

    from .aufs_live import Plan

FULL_FOR = 30.0  # seconds that a branch which reported ENOSPC gets nothing new


class AufsDriver(AufsFormat):
    name = "aufs"
    options = OPTIONS

    def __init__(self, config: MountConfig) -> None:
        super().__init__(config)
        o = config.options
        settle(o)
        self.fds = FdCache(branches.fd_budget())
        self.name_limit = 255 - len(WH)
        self.create = CreatePolicy(o.get("create", "tdp"))
        self._copyup = copyup_policy(o.get("cpup", "tdp"))
        self.full: dict[Layer, float] = {}
        self.keep_ino = "noxino" not in o
        self.always_opaque = DIROPQ[o.get("diropq", "whiteouted")]
        self.redirects = "dirren" in o
        self.volatile = "volatile" in o
        self.moves = branches.flag(o, "moveonenospc", False)
        if self.moves and config.data == "passthrough":
            raise MountError("moveonenospc: not with data=passthrough, the kernel writes by itself there", EXIT_USAGE)
        self.sum = "all" if "sum" in o else "rw" if "wsum" in o else ""
        self.outside = o.get("udba", "none")
        self.show_whiteouts = "shwh" in o
        self._holder: LDir | None = None  # work/, where it was given
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
                self.prefix = probe_prefix(layer)

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

    def take_over(self) -> None:
        for layer in self.writable:
            if layer.work is not None:
                branches.empty(layer.work)
            self._read_plinks(layer)
        for layer in self.layers:
            layer.root.impure = None

    live = True

    def plan_layers(self, changes: list[list[Any]]) -> Plan:
        from .aufs_live import Plan

        return Plan(self, changes)

    def joined(self, layer: Layer) -> None:
        """A branch was added to the mount."""
        if self.prefix is None and layer.writable:
            self.prefix = probe_prefix(layer)
        if "warn_perm" in self.config.options:
            self._warn_perm(layer)

    def stop(self) -> None:
        for layer in self.layers:
            if layer.work is not None:
                own.leave(layer)
            layer.root.fd = None  # the locks go with the descriptors
        if self._holder is not None:
            self._holder.fd = None

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

    # --- for people ---

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
