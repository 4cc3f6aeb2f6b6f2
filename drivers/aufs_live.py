"""Changes of the branches of a mounted aufs union: what is asked for, checked and prepared before anything changes.

A `Plan` opens and locks what it needs when it is made (MountError if something does not fit), `commit` puts it in force
while no operation is running, `abandon` undoes the preparation. The core does the rest (unionfs/core/live.py).
"""

from __future__ import annotations

import fcntl
import os

from unionfs.errors import EXIT_LAYER, EXIT_USAGE, MountError, nearest

from . import aufs_branches as own
from . import branches

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from unionfs.core.layers import Layer

    from .aufs import AufsDriver

VERBS = ("add", "insert", "append", "prepend", "mod", "del")


class Plan:
    """`changes`: rows of (verb, position or None, path, permission), applied from left to right."""

    def __init__(self, driver: AufsDriver, changes: list[list[Any]]) -> None:
        self.driver = driver
        self.layers: list[Layer] = list(driver.layers)
        self.added: list[Layer] = []
        self.removed: list[Layer] = []
        self._modes: dict[Layer, tuple[str, frozenset[str]]] = {}
        self._locked: list[Layer] = []  # made writable by us
        try:
            for verb, position, path, mode in changes:
                self._take(verb, position, os.fsencode(os.path.abspath(path)), mode)
            if not self.layers:
                raise MountError("the last branch can't be deleted: unmount instead", EXIT_LAYER)
        except BaseException:
            self.abandon()
            raise
        self.closing = [
            layer for layer in driver.writable
            if layer in self.removed or self._modes.get(layer, ("rw",))[0] != "rw"
        ]  # fmt: skip

    def _take(self, verb: str, position: int | None, path: bytes, mode: str) -> None:
        if verb not in VERBS:
            raise MountError(f"{verb}: unknown{nearest(verb, VERBS)}; one of {', '.join(VERBS)}", EXIT_USAGE)
        if verb == "del":
            self._delete(self._find(path))
        elif verb == "mod":
            self._modify(self._find(path), mode)
        else:
            end = len(self.layers)
            at = 0 if verb == "prepend" else end if position is None or verb == "append" else position
            if not 0 <= at <= end:
                raise MountError(f"position {at}: there are {end} branches, positions 0 to {end}", EXIT_USAGE)
            self._add(at, path, mode)

    def _find(self, path: bytes) -> Layer:
        real = os.path.realpath(path)
        for layer in self.layers:
            if layer.path == path or os.path.realpath(layer.path) == real:
                return layer
        raise MountError(f"{branches.show(path)} is not a branch of this mount", EXIT_LAYER)

    def _add(self, at: int, path: bytes, mode: str) -> None:
        driver = self.driver
        permission, attributes = own.parse_permission(mode, path, "ro")
        if driver.config.read_only and permission == "rw":
            raise MountError(f"branch {branches.show(path)}=rw: the mount is read-only; add it as ro", EXIT_USAGE)
        own.check([path], [layer.path for layer in self.layers], driver.config.mountpoint)
        layer = branches.open_layer(at, path, "branch", permission == "rw", driver.fds)
        layer.permission, layer.attrs = permission, attributes
        self.added.append(layer)
        if layer.writable:
            own.prepare_writable(layer)
        self.layers.insert(at, layer)

    def _delete(self, layer: Layer) -> None:
        self.layers.remove(layer)
        if layer in self.added:
            self.added.remove(layer)
            self._release(layer)
        else:
            self.removed.append(layer)

    def _modify(self, layer: Layer, mode: str) -> None:
        permission, attributes = own.parse_permission(mode, layer.path, "ro")
        if permission == "rw" and not layer.writable:
            if self.driver.config.read_only:
                raise MountError(f"branch {branches.show(layer.path)}=rw: the mount is read-only", EXIT_USAGE)
            own.prepare_writable(layer)
            self._locked.append(layer)
        self._modes[layer] = (permission, attributes)

    def commit(self) -> None:
        """Precondition: no operation is running."""
        for layer, (permission, attributes) in self._modes.items():
            layer.permission, layer.attrs = permission, attributes
            was, layer.writable = layer.writable, permission == "rw"
            if was and not layer.writable:
                self._release(layer)
        for layer in self.removed:
            self._release(layer)
        driver = self.driver
        driver.layers_changed(self.layers)
        config = driver.config
        config.branches = [(layer.path, own.permission_of(layer)) for layer in self.layers]
        config.lowers, config.upper, config.work = [], None, None  # if it began as upper and lowers: it is not any more
        for layer in self.added:
            driver.joined(layer)

    def abandon(self) -> None:
        for layer in (*self.added, *self._locked):
            self._release(layer)

    @staticmethod
    def _release(layer: Layer) -> None:
        """No longer written by us. The descriptors go with the last file that somebody still has open."""
        if layer.work is None:
            return
        own.leave(layer)
        layer.work.fd = None
        layer.work = None
        try:
            fcntl.flock(layer.root.open().n, fcntl.LOCK_UN)
        except OSError:
            pass

    def summary(self) -> list[str]:
        return [f"{branches.show(layer.path)}={own.permission_of(layer)}" for layer in self.layers]
