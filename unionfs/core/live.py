"""Other layers under a mounted tree, with files open.

`LiveUnion` is the core for drivers whose layers may change. Sessions get it behind a `Gate`: a change waits until no
operation is running, none begins before it is done (the fast lane parks them), and then every known node is looked up
again. A node whose inode still shows under its name stays what it was, for the kernel too; one that something else
hides now, or whose layer is gone, loses its name and lives on for whoever has it open. Afterwards the kernel is told to
ask again.

Threads: `change` and `in_use` are called from a control thread, never from one that answers requests.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from stat import S_ISDIR
from time import monotonic, sleep

from unionfs.api import Operations
from unionfs.core.layers import Fd
from unionfs.core.nodes import Dir, More, Node
from unionfs.core.ops import UnionOperations
from unionfs.errors import EXIT_BUSY, MountError, WouldBlock

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from unionfs.core.driver import Driver
    from unionfs.core.layers import Layer, LDir

GATE_WAIT = 20.0  # seconds that a change waits for running operations
ROUNDS = 3  # how often what seems in use is looked at
ROUND_WAIT = 0.3  # seconds that the kernel gets to forget what nobody uses

GATED = (
    "backing_fd", "birth_time", "copy_file_range", "create", "diff", "fallocate", "fsync", "fsyncdir",
    "getattr", "getxattr", "ioctl_getflags", "ioctl_setflags", "link", "listxattr", "lookup", "lseek", "mkdir", "mknod",
    "open", "read", "readdir", "readdirplus", "readlink", "release", "removexattr", "rename", "rmdir", "setattr",
    "setxattr", "statfs", "symlink", "syncfs", "tmpfile", "unlink", "which", "write",
)  # fmt: skip


class Gate:
    """The core as sessions see it: each operation passes while no change is going on.

    `active` needs no lock: `+=` on an attribute is one step under the GIL (see nodes.py), and so is a test that is
    followed by it without a call in between.
    """

    def __init__(self, union: LiveUnion) -> None:
        self.union = union
        self.changing = False
        self.active = 0
        self._done = threading.Event()
        self._done.set()
        self._forgets: deque[tuple[int, int]] = deque()
        for name in GATED:
            setattr(self, name, self._gated(getattr(union, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.union, name)  # what needs no gate

    def _gated(self, operation: Callable[..., Any]) -> Callable[..., Any]:
        def passed(*args: Any) -> Any:
            while self.changing:
                self._wait()
            self.active += 1
            try:
                return operation(*args)
            finally:
                self.active -= 1

        return passed

    def _wait(self) -> None:
        if getattr(self.union.lanes, "fast", False):
            raise WouldBlock
        self._done.wait()

    def forget(self, nodeid: int, nlookup: int) -> None:
        """Never parked: a batch of them must not be begun twice. What comes during a change is done after it."""
        if self.changing:
            self._forgets.append((nodeid, nlookup))
            return
        self.active += 1
        try:
            self.union.forget(nodeid, nlookup)
        finally:
            self.active -= 1

    def __enter__(self) -> None:
        """Close: returns when no operation is running."""
        self._done.clear()
        self.changing = True
        deadline = monotonic() + GATE_WAIT
        while self.active:
            if monotonic() > deadline:
                self.__exit__()
                raise MountError(f"an operation has been running for {GATE_WAIT:.0f} s: nothing was changed", EXIT_BUSY)
            sleep(0.0005)

    def __exit__(self, *_: object) -> None:
        self.changing = False
        self._done.set()
        while self._forgets:
            self.forget(*self._forgets.popleft())


class LiveUnion(UnionOperations):
    def __init__(self, driver: Driver) -> None:
        super().__init__(driver)
        self.gate = self._make_gate()
        self._one_change = threading.Lock()

    def _make_gate(self) -> Gate:
        return Gate(self)

    def stop(self) -> None:
        try:
            self._dissolve_index(self.driver.layers)
        except OSError as e:  # they stay pseudo-links: to us the same
            print(f"unionfs: hard links stay pseudo-links: {e}", file=sys.stderr)
        super().stop()

    def _dissolve_index(self, layers: list[Layer]) -> None:
        """Before layers are written no more: what was linked by way of the index gets all its names, and no index.

        Precondition: no operation is running.
        """
        index = {entry: lacks for entry, lacks in self.driver.index_rows().items() if entry[0].layer in layers}
        if not index:
            return
        from unionfs.core.links import link_all

        for directory, name in link_all(self, index):
            for node in list(self.slots):
                if node is not None and node.more is not None and node.more.index == name and node.ldir is directory:
                    self._leave_index(node, node.more)
            self.driver.index_dissolved(directory, name)

    def _leave_index(self, node: Node, more: More) -> None:
        assert more.index is not None
        layer = node.ldir.layer
        if node.parent is None or more.unlinked:
            flags = os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC
            more.pin = Fd(os.open(more.index, flags, dir_fd=node.ldir.open().n))
        else:
            node.ldir = self.ensure_dir(node.parent, layer)
        more.index = None
        more.nlink_delta = 0

    # --- what people ask for ---

    def control_verbs(self) -> dict[str, Any]:
        return {**super().control_verbs(), "branch": self.change}

    def change(self, changes: list[list[Any]]) -> list[str]:
        """Apply what `Driver.plan_layers` understands, all of it or nothing. The branches as they are then."""
        with self._one_change:
            plan = self.driver.plan_layers(changes)
            try:
                for layer in plan.removed:
                    self._require_unused(layer)
                with self.gate:
                    if plan.closing:
                        self._dissolve_index(plan.closing)
                    changed = self._apply(plan.layers, plan.commit)
            except BaseException:
                plan.abandon()
                raise
            self._tell_kernel(changed)
            for layer in plan.removed:
                if not self._nodes_on(layer):
                    layer.root.fd = None  # its filesystem can be unmounted
            return plan.summary()

    def statistics(self) -> dict[str, Any]:
        """Of each layer also its room in bytes (None: it does not answer), and how many known files show from it."""
        known = super().statistics()
        counts: dict[Layer, int] = {}
        for node in list(self.slots):
            if node is not None:
                counts[node.ldir.layer] = counts.get(node.ldir.layer, 0) + 1
        for layer, row in zip(list(self.driver.layers), known["layers"], strict=False):
            try:
                s = os.fstatvfs(layer.root.open().n)
            except OSError:
                row["free"], row["free_inodes"] = None, None
            else:
                row["free"], row["free_inodes"] = s.f_bavail * s.f_frsize, s.f_favail
            row["known"] = counts.get(layer, 0)
        return known

    # --- is a layer in use? ---

    def _require_unused(self, layer: Layer) -> None:
        paths = self.in_use(layer)
        if paths:
            listed = ", ".join(paths[:20]) + (f" and {len(paths) - 20} more" if len(paths) > 20 else "")
            where = os.fsdecode(layer.path)
            raise MountError(f"branch {where} is in use: {listed}; close them, or wait (--wait)", EXIT_BUSY)

    def in_use(self, layer: Layer) -> list[str]:
        """Paths of what somebody has open (or mapped, or as working directory) and that only this layer has.

        The kernel tells of no open in the noopen mode, but it forgets what nobody uses when its name is invalidated:
        what is never forgotten is in use. What is only looked up again and again comes back as another node.
        """
        suspects = self._nodes_on(layer)
        for _ in range(ROUNDS):
            for node in suspects:
                for parent, name in self._names(node):
                    if self.notifier is not None:
                        self.notifier.invalidate_entry(parent.id, name)
            deadline = monotonic() + ROUND_WAIT
            while True:
                suspects = {node: nodeid for node, nodeid in suspects.items() if node.id == nodeid}
                if not suspects or monotonic() > deadline:
                    break
                sleep(0.005)
            if not suspects:
                break
        return sorted(os.fsdecode(self._path_of(node)) for node in suspects)

    def _nodes_on(self, layer: Layer) -> dict[Node, int]:
        found = {}
        for node in list(self.slots):
            if node is None or node is self.root:
                continue
            layers = {ldir.layer for ldir in node.ldirs} if isinstance(node, Dir) else {node.ldir.layer}
            if layers == {layer} and node.id:
                found[node] = node.id
        return found

    @staticmethod
    def _names(node: Node) -> list[tuple[Dir, bytes]]:
        own = [(node.parent, node.name)] if node.parent is not None else []
        return own + (node.more.aliases if node.more is not None else [])

    @staticmethod
    def _path_of(node: Node) -> bytes:
        parts = []
        here: Node | None = node
        while here is not None and here.parent is not None:
            parts.append(here.name)
            here = here.parent
        path = b"/" + b"/".join(reversed(parts))
        return path + b" (deleted)" if node.more is not None and node.more.unlinked else path

    # --- the change ---

    def _apply(self, layers: list[Layer], commit: Callable[[], None]) -> list[tuple[int, bytes]]:
        """Put other layers under the tree. Returns the names that lost their nodes.

        Precondition: no operation is running.
        """
        was_writable = {layer for layer in self.driver.layers if layer.writable}
        gone = [layer for layer in self.driver.layers if layer not in layers]
        commit()
        self.bottom = len(layers) - 1
        for layer in reversed(layers):
            self.ino_base.setdefault(layer.st_dev, len(self.ino_base) << 56)
        self.table.merged.clear()
        self.table.merged_names = 0
        self.root.ldirs[:] = [layer.root for layer in layers]
        self.root.ldir = self.root.ldirs[0]
        self._apply_marks(self.root, self.root.ldir)
        lost: list[tuple[int, bytes]] = []
        pending = [self.root]
        while pending:
            pending += self._look_again(pending.pop(), lost)
        closed = {*gone, *(layer for layer in was_writable if not layer.writable)}
        for nodeid in list(self.files):
            node = self.slots[nodeid]
            if node is None or node.ldir.layer in closed:
                self.files.pop(nodeid, None)  # opened again, in the right way, when needed
        return lost

    def _look_again(self, d: Dir, lost: list[tuple[int, bytes]]) -> list[Dir]:
        """Where d's known children are now. Returns those that are directories."""
        d.names = d.stacks = d.order = d.inherit = None
        d.complete = False
        d.subdirs = -1
        renewed = (self._renew(d, name, node, lost) for name, node in list(d.children.items()))
        return [child for child in renewed if child is not None]

    def _renew(self, d: Dir, name: bytes, node: Node, lost: list[tuple[int, bytes]]) -> Dir | None:
        """Where d's child is now. Returns it if it is a directory, with names of its own to look at."""
        try:
            found = self._find(d, name)
        except OSError:
            found = None  # the next lookup reports the error
        if isinstance(node, Dir):
            if found is not None and S_ISDIR(found[1].st_mode):
                fresh = self._new_dir(d, name, *found)
                node.ldirs, node.ldir, node.redirect = fresh.ldirs, fresh.ldirs[0], fresh.redirect
                return node
            self._dir_lost(node)
        elif found is not None and self._same(node, *found, name):
            if (node.more is None or node.more.index is None) and node.parent is d and node.name == name:
                node.ldir = found[0]
            return None
        else:
            self._name_lost(d, name, node)
        d.children.pop(name, None)
        lost.append((d.id, name))
        return None

    def _same(self, node: Node, ldir: LDir, st: os.stat_result, name: bytes) -> bool:
        try:
            own = self._stat(node)
        except OSError:
            return False
        return (own.st_dev, own.st_ino) == (st.st_dev, st.st_ino) or self._same_index(node, ldir, st, name)

    def _same_index(self, node: Node, ldir: LDir, st: os.stat_result, name: bytes) -> bool:
        """The inode was copied up under another name."""
        if node.more is None or node.more.index is None or ldir.layer.writable:
            return False
        return self.driver.index_find(ldir, name, st) == (node.ldir, node.more.index)

    def _name_lost(self, d: Dir, name: bytes, node: Node) -> None:
        more = node.extra()
        if (d, name) in more.aliases:
            more.aliases.remove((d, name))
        elif more.aliases:
            node.parent, node.name = more.aliases.pop()
            if more.index is None:
                layer = node.ldir.layer
                node.ldir = next((ldir for ldir in node.parent.ldirs if ldir.layer is layer), node.ldir)
        else:
            self._detach(node)

    def _detach(self, node: Node) -> None:
        """No name shows the inode any more: to those who have it open it is like an unlinked file."""
        more = node.extra()
        if node.parent is not None:
            self.table.leaving(node, node.parent, node.name)
        more.unlinked = True
        self.table.changed(node)
        if more.key is not None and self.table.links.get(more.key) is node:
            del self.table.links[more.key]

    def _dir_lost(self, d: Dir) -> None:
        pending: list[Node] = [d]
        while pending:
            node = pending.pop()
            if not isinstance(node, Dir):
                self._detach(node)
                continue
            node.extra().pin = node.ldirs[0].open()
            if node.parent is not None:
                self.table.leaving(node, node.parent, node.name)
            node.removed = True
            node.order = node.names = node.stacks = None
            self.table.changed(node)
            pending += node.children.values()

    # --- the kernel's caches ---

    def _tell_kernel(self, lost: list[tuple[int, bytes]]) -> None:
        """Every name is asked for again at its next use, every listing is read again."""
        notifier = self.notifier
        if notifier is None:
            return
        everything = notifier.expire_entries()
        for nodeid, name in lost:
            notifier.invalidate_entry(nodeid, name)
        for d in [node for node in list(self.slots) if isinstance(node, Dir) and node.id]:
            if not everything:
                self._invalidate_names(d)
            notifier.invalidate_inode(d.id)

    def _invalidate_names(self, d: Dir) -> None:
        """On kernels that can't expire all entries at once (before 6.16): all names that there may be."""
        assert self.notifier is not None
        names = set(d.children)
        for ldir in d.ldirs:
            try:
                entries, whiteouts = self.driver.scan(ldir)
            except OSError:
                continue
            names.update(whiteouts, (name for name, _ in entries))
        for name in names:
            self.notifier.invalidate_entry(d.id, name)


def live_union(driver: Driver) -> Operations:
    return LiveUnion(driver).gate
