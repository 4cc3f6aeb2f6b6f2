"""The verbs of `unionfs snapshot` that change a chain: on a mounted union (`Mounted`), and on an upper that is not
(`Unmounted`).

What a verb makes new is made first; the chain file's rename is the step that counts; what nobody needs any more is
removed afterwards, by a thread of its own. Callers: one at a time for an upper.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import threading
import time

from unionfs.core.layers import Fd, FdCache, Layer
from unionfs.errors import EXIT_BUSY, EXIT_LAYER, EXIT_USAGE, MountError

from .. import branches
from . import chain as chains
from .chain import Chain, Snapshot
from .check import ident_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from unionfs.core.freeze import FreezingUnion

    from .driver import RowDriver

CLEAN_AGAIN = (0.0, 1.0, 5.0, 30.0)  # seconds before each look whether what was dropped is in use still


class Mounted:
    def __init__(self, driver: RowDriver, core: FreezingUnion) -> None:
        self.driver = driver
        self.core = core

    def do(self, action: str, arguments: dict[str, Any]) -> Any:
        driver = self.driver
        if driver.chain is None or driver.read_only:
            raise MountError("a read-only mount has nothing to take a snapshot of", EXIT_USAGE)
        if driver.config.data == "passthrough":
            raise MountError(
                "snapshots: not with data=passthrough: the kernel writes to frozen files by itself; mount without it",
                EXIT_USAGE,
            )
        actions: dict[str, Callable[..., Any]] = {
            "create": self.create, "rollback": self.rollback, "delete": self.delete,
        }  # fmt: skip
        return actions[action](**arguments)

    def create(self, name: str, sync: bool = False, ident: str | None = None) -> dict[str, Any]:
        driver, core = self.driver, self.core
        assert driver.chain is not None
        chain = driver.chain.copy()
        chain.lowers = list(driver.config.lowers)
        made = chain.add_snapshot(name, chain.top, ident)
        core.flush_kernel()
        chain.top = number = chain.add_layer(chain.top)
        self._switch(chain, number, driver.layers[0], None)
        if sync:
            core.syncfs()
        return row(made)

    def rollback(self, name: str) -> dict[str, Any]:
        """What changed since then is dropped; whoever has such a file open goes on with it, without a name."""
        driver = self.driver
        assert driver.chain is not None
        chain = driver.chain.copy()
        target = chain.find(name)
        below = driver.layers_of(target.layer, chain)
        chain.top = number = chain.add_layer(target.layer)
        drop(chain)
        self._switch(chain, number, below[0], below)
        self.clean()
        return row(target)

    def delete(self, names: list[str]) -> None:
        driver = self.driver
        assert driver.chain is not None
        driver.chain = save_without(driver.chain, names)
        self.clean()

    def _switch(self, chain: Chain, number: int, looks: Layer, below: list[Layer] | None) -> None:
        """Put an empty layer on top: of what there is, or of `below`."""
        driver, core = self.driver, self.core
        new = driver.make_top(number)
        try:
            copy_looks(looks.root.open().n, new.root.open().n)
            chain.write()
            if below is None:
                core.freeze(new, lambda: driver.put_on_top(new, number, chain, list(driver.layers)))
            else:
                core.switch([new, *below], lambda: driver.put_on_top(new, number, chain, below))
        except BaseException:
            if driver.chain is not chain:
                discard(chain.root, chain.path(number))
            raise
        chain.settle()

    def clean(self) -> None:
        clean_later(self.driver, self.core)


class Unmounted:
    """An upper directory that no mount has: locked while this exists."""

    def __init__(self, upper: bytes) -> None:
        self.upper = upper
        self.layer = Layer(0, upper, False, FdCache(16))
        branches.lock(self.layer.root, "upper", upper)
        self.root = self.layer.root.open().n
        self.chain = Chain.load(self.root)

    def do(self, action: str, arguments: dict[str, Any]) -> Any:
        if action == "create":
            raise MountError(f"{branches.show(self.upper)}: mount it to take a snapshot", EXIT_USAGE)
        actions: dict[str, Callable[..., Any]] = {"rollback": self.rollback, "delete": self.delete}
        return actions[action](**arguments)

    def rollback(self, name: str) -> dict[str, Any]:
        chain = self.chain.copy()
        target = chain.find(name)
        chain.top = number = chain.add_layer(target.layer)
        drop(chain)
        os.mkdir(chain.path(number), 0o700, dir_fd=self.root)
        source, made = (Fd(os.open(chain.path(n), _DIRECTORY, dir_fd=self.root)) for n in (target.layer, number))
        copy_looks(source.n, made.n)
        chain.save()
        self.chain = chain
        clean(chain, lambda _: False)
        return row(target)

    def delete(self, names: list[str]) -> None:
        self.chain = save_without(self.chain, names)
        clean(self.chain, lambda _: False)


_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def row(s: Snapshot) -> dict[str, Any]:
    return {"name": s.name, "id": s.id, "layer": s.layer, "created": s.created}


def save_without(chain: Chain, names: list[str]) -> Chain:
    """The chain without these snapshots and what only they needed, on disk. The one given stays as it is."""
    chain = chain.copy()
    for name in names:
        chain.snapshots.remove(chain.find(name))
    drop(chain)
    chain.save()
    return chain


def drop(chain: Chain) -> None:
    """Take out of the chain what nothing needs."""
    needed = chain.needed()
    chain.parents = {n: parent for n, parent in chain.parents.items() if n in needed}


def clone(upper: bytes, name: str, target: bytes) -> None:
    """An upper directory that stands on a snapshot: O(1), and the snapshot's layers are kept for it from now on.

    The original may be mounted: a clone is registered in a file of its own, before it is looked whether the snapshot
    is still there.
    """
    if os.path.realpath(target).startswith(os.path.realpath(upper) + b"/"):
        raise MountError(f"clone {branches.show(target)}: lies inside the upper; give another place", EXIT_LAYER)
    try:
        os.mkdir(target, 0o700)
    except FileExistsError:
        if not os.path.isdir(target) or os.listdir(target):
            raise MountError(f"clone {branches.show(target)}: exists; give a new directory", EXIT_LAYER) from None
    except OSError as e:
        raise MountError(f"clone {branches.show(target)}: {e.strerror}", EXIT_LAYER) from None
    here, there = (Layer(0, path, False, FdCache(16)) for path in (upper, target))
    root = here.root.open().n
    made = Chain(there.root.open().n)
    try:
        found = Chain.load(root).find(name)
        chains.register_clone(root, made.id, target, found.layer)
        original = Chain.load(root)
        if found.layer not in original.needed() or found.layer not in original.parents:
            raise MountError(f"snapshot {name!r} was deleted meanwhile", EXIT_BUSY)
        source = Fd(os.open(original.path(found.layer), _DIRECTORY, dir_fd=root))
        copy_looks(source.n, made.root)
        made.base = chains.Base(upper, original.id, found.layer)
        made.lowers = original.lowers
        made.save()
    except BaseException:
        try:
            os.unlink(chains.CLONES + b"/" + made.id.encode(), dir_fd=root)
        except OSError:
            pass
        shutil.rmtree(target, ignore_errors=True)
        raise


def copy_looks(source: int, target: int) -> None:
    """Owner, mode, times and users' xattrs of a layer's root."""
    for name in os.listxattr(source):
        if name.startswith(("trusted.overlay.", "user.overlay.")):
            continue
        try:
            os.setxattr(target, name, os.getxattr(source, name))
        except OSError as e:
            if e.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENODATA):
                raise
    st = os.fstat(source)
    if (st.st_uid, st.st_gid) != (os.geteuid(), os.getegid()):
        os.fchown(target, st.st_uid, st.st_gid)
    os.fchmod(target, st.st_mode & 0o7777)
    os.utime(target, ns=(st.st_atime_ns, st.st_mtime_ns))


# --- what nobody needs any more ---


def clean_later(driver: RowDriver, core: FreezingUnion | None) -> None:
    chain = driver.chain
    if chain is None or not chain.stored or not chains.leftovers(chain):
        return

    def in_use(number: int) -> bool:
        layers = {layer for layer, n in driver._numbers.items() if n == number and driver._homes[layer] is driver.home}
        return core is not None and core.uses(layers)

    def run() -> None:
        for seconds in CLEAN_AGAIN:
            time.sleep(seconds)
            done = driver.chain is None or clean(driver.chain, in_use)
            if core is not None:
                core.space_changed()
            if done:
                return

    threading.Thread(target=run, name="unionfs-row-clean", daemon=True).start()


def clean(chain: Chain, in_use: Callable[[int], bool]) -> bool:
    """Remove layers that the chain does not name. False: some are in use; they go at the next mount, or verb."""
    all_gone = True
    lock = Fd(os.open(chains.STORE, _DIRECTORY, dir_fd=chain.root))
    try:
        fcntl.flock(lock.n, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False  # a diff or send is reading
    for path in chains.leftovers(chain):
        number = path.rpartition(b"/")[2]
        if number.isdigit() and in_use(int(number)):
            all_gone = False
            continue
        try:
            discard(chain.root, path)
        except OSError:
            all_gone = False  # a file of it is in use, or the server is ending
    return all_gone


def discard(root: int, path: bytes) -> None:
    """A layer and the block maps of its files."""
    at = b"/proc/self/fd/%d/" % root + path
    for directory, _, names in os.walk(at):
        for name in names:
            inode = os.path.join(directory, name)
            ident = ident_of(inode)
            if ident is not None and os.lstat(inode).st_nlink == 1:
                try:
                    os.unlink(chains.MAPS + b"/" + os.fsencode(ident), dir_fd=root)
                except FileNotFoundError:
                    pass
    shutil.rmtree(at)


def space(root: int, chain: Chain, number: int) -> tuple[int, int]:
    """(bytes on disk, files) of a layer; block maps are not counted."""
    total = files = 0
    seen: set[int] = set()
    at = b"/proc/self/fd/%d/" % root + chain.path(number)
    for directory, dirs, names in os.walk(at):
        if chains.STORE in dirs:
            dirs.remove(chains.STORE)
        for name in (*dirs, *names):
            st = os.lstat(os.path.join(directory, name))
            if st.st_nlink > 1 and name in names:
                if st.st_ino in seen:
                    continue
                seen.add(st.st_ino)
            total += st.st_blocks * 512
            files += name in names
    return total, files
