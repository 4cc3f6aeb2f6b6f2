"""The driver seam: where things are and how they are recorded. One class per on-disk format.

A driver opens and checks its layers (raising MountError), and then answers the core's questions. It never sees node
ids, the kernel or POSIX rules; the core never sees xattr names or whiteout forms. All methods are called with real
descriptors through `LDir` and raise OSError.
"""

from __future__ import annotations

import errno
import os

from unionfs.api import MountConfig
from unionfs.core.layers import FdCache, Layer, LDir
from unionfs.sysio import RENAME_EXCHANGE, renameat2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, Literal, Protocol

    from unionfs.core.base import OpenFile
    from unionfs.core.copyup import CopyUp
    from unionfs.core.freeze import FreezingUnion
    from unionfs.core.nodes import Dir, Node

    # A name in one layer: its attributes, None (says nothing), False (a whiteout: look no further down).
    Probe = os.stat_result | None | Literal[False]


class Marks:
    """What a layer directory says about merging with the layers below it."""

    __slots__ = ("opaque", "redirect")

    def __init__(self, opaque: bool = False, redirect: bytes | None = None) -> None:
        self.opaque = opaque  # nothing below joins
        self.redirect = redirect  # its path below: absolute from the root, or a plain name in the same parent


NO_MARKS = Marks()


class FileMarks:
    """What a file that was copied up says about itself."""

    __slots__ = ("index", "index_delta", "ino", "lower_delta", "mapped", "metacopy", "nested_whiteout", "redirect")

    def __init__(self) -> None:
        self.ino: int | None = None  # st_ino to show
        self.metacopy = False  # the data is further down
        self.mapped = False  # but for the part that this file has itself, which the driver knows
        self.redirect: bytes | None = None  # where, None: same path
        self.nested_whiteout = False  # users see the character device 0:0
        self.index: bytes | None = None  # its entry in the index
        self.index_delta: int | None = None  # union's link count minus the real one
        self.lower_delta: int | None = None  # union's link count minus that of the inode it was copied from


if TYPE_CHECKING:

    class LayerPlan(Protocol):
        """Another list of layers, checked and opened, that `commit` puts in force while no operation is running."""

        layers: list[Layer]
        added: list[Layer]
        removed: list[Layer]
        closing: list[Layer]  # writable now, and not afterwards

        def commit(self) -> None: ...
        def abandon(self) -> None: ...
        def summary(self) -> list[str]: ...


class Driver:
    """Base of all drivers. `options` maps the option names that it takes to one line of help."""

    name = "?"
    options: dict[str, str] = {}  # noqa: RUF012 - shared on purpose

    def __init__(self, config: MountConfig) -> None:
        self.config = config
        self.layers: list[Layer] = []
        self.read_only = config.upper is None
        self.writable: list[Layer] = []  # the layers that are, topmost first
        self.name_limit = 255  # bytes of a name that users can make
        self.fds = FdCache(1024)
        self.metacopy = False  # metadata changes of big files copy no data
        self.index = False  # hard links of lower inodes stay linked over copy-up
        self.volatile = False  # nothing is synced
        self.quota: int | None = None  # bytes that the upper may hold

    live = False  # layers may change while mounted: `plan_layers`
    freezes = False  # snapshots may be taken while mounted: unionfs/core/freeze.py

    def plan_layers(self, changes: list[list[Any]]) -> LayerPlan:
        """MountError where the changes don't fit; nothing has changed then."""
        raise NotImplementedError

    outside = "none"  # what others change in the layers: "none" looked for, "reval" at each access, "notify" when told

    def concerns(self, name: bytes) -> bytes | None:
        """Which name of a directory an entry on disk says something of; b"": the directory itself; None: no name."""
        return name

    def snapshot(self, core: FreezingUnion, action: str, arguments: dict[str, Any]) -> Any:
        """An action of `unionfs snapshot` on the mounted union. MountError where it can't be done."""
        raise NotImplementedError

    def diff_frozen(self) -> list[tuple[str, bytes]] | None:
        """As Operations.diff, of all that snapshots froze too; None: nothing is frozen."""
        return None

    def start(self) -> None:
        """Called in the serving process before the first request."""

    def take_over(self) -> None:
        """In place of another process that served these layers and died: remove its scratch, read again what it may
        have changed since this driver opened them."""

    def stop(self) -> None:
        """After the last request: release locks."""

    def limited_paths(self) -> list[bytes]:
        """The directories whose files count for a quota."""
        return [self.layers[0].path]

    # --- reading ---

    def probe(self, ldir: LDir, name: bytes) -> Probe:
        raise NotImplementedError

    def scan(self, ldir: LDir) -> tuple[list[tuple[bytes, bool]], list[bytes]]:
        """All entries as (name, is a directory), and the whited-out names; internal names left out."""
        raise NotImplementedError

    def marks(self, ldir: LDir) -> Marks:
        raise NotImplementedError

    def cut_off(self, ldir: LDir, name: bytes) -> bool:
        """A whiteout stands beside the directory of that name: nothing below joins it."""
        return False

    def file_marks(self, ldir: LDir, name: bytes) -> FileMarks | None:
        """None for a file that was never copied up."""
        return None

    def reserved(self, name: bytes) -> bool:
        """A name that users can neither see nor make."""
        return False

    # --- where ---

    # The core finds the writable layers that fit (where the result would be seen), topmost first; with a choice of
    # several it asks the driver.

    def place_new(self, parent: Dir, fit: list[Layer], is_dir: bool) -> Layer:
        """The layer for a new entry of parent."""
        return fit[0]

    def place_copyup(self, parent: Dir, fit: list[Layer]) -> Layer:
        """The layer that an entry of parent is copied up to; all that fit are above its own."""
        return fit[0]

    moves = False  # a file whose layer is full moves to another one when more is written to it

    def place_moved(self, fit: list[Layer], size: int) -> Layer | None:
        """The layer for a file of that size that has to leave its own; None: none has room."""
        return None

    def filled(self, layer: Layer) -> bool:
        """The layer has reported ENOSPC: whether another one should be tried."""
        return False

    # --- recording ---

    def whiteout(self, ldir: LDir, name: bytes) -> None:
        """Record that name is deleted; nothing has that name in ldir itself."""
        raise NotImplementedError

    def is_whiteout(self, ldir: LDir, name: bytes) -> bool:
        """There is a whiteout for name in this very directory."""
        raise NotImplementedError

    def swap_for_whiteout(self, ldir: LDir, name: bytes, is_dir: bool) -> None:
        """Replace an existing entry of ldir by a whiteout in one step. A directory's leftovers go too."""
        raise NotImplementedError

    def publish(self, work: LDir, tmp: bytes, ldir: LDir, name: bytes, is_dir: bool) -> None:
        """Move work/tmp to ldir/name in one step, taking the place of a whiteout if there is one."""
        raise NotImplementedError

    def move(self, src: LDir, name: bytes, dst: LDir, newname: bytes, leave_whiteout: bool, is_dir: bool) -> None:
        """rename within one writable layer, replacing a whiteout or file at the target."""
        raise NotImplementedError

    def exchange(self, src: LDir, name: bytes, dst: LDir, newname: bytes) -> None:
        """Swap two entries of one writable layer in one step."""
        renameat2(src.open().n, name, dst.open().n, newname, RENAME_EXCHANGE)

    def beside_whiteout(self, ldir: LDir, name: bytes) -> bool:
        """A whiteout that can stand beside an entry of that name does stand there (`.wh.` files)."""
        return False

    def drop_whiteout_beside(self, ldir: LDir, name: bytes) -> None:
        pass

    def make_nested_whiteout(self, dirfd: int, name: bytes) -> None:
        """An entry that users see as the character device 0:0."""
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    def set_opaque(self, ldir: LDir, name: bytes) -> None:
        raise NotImplementedError

    def set_redirect(self, ldir: LDir, name: bytes, path: bytes) -> None:
        """EXDEV where the format has no redirects."""
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    def remove_dir(self, ldir: LDir, name: bytes) -> None:
        """Remove a directory that shows no entries, with the whiteouts and markers that it holds."""
        raise NotImplementedError

    def clear_dir(self, ldir: LDir, name: bytes) -> None:
        """Remove whiteouts and markers from a directory that shows no entries, so that rmdir or rename can work."""
        raise NotImplementedError

    def mark_copy(self, path: bytes | int, source: LDir, name: bytes, ino: int, follow: bool) -> None:
        """Note on a copy (not yet published) where it came from."""

    def mark_impure(self, ldir: LDir) -> None:
        """ldir is about to get an entry that file_marks has something to say of."""

    def mark_metacopy(self, path: bytes | int, redirect: bytes, follow: bool) -> None:
        raise NotImplementedError

    def clear_metacopy(self, fd: int) -> None:
        """The data has been copied: the file stands on its own."""
        raise NotImplementedError

    # --- content: files whose bytes are not one plain descriptor's ---

    def redirects_data(self, node: Node, st: os.stat_result, size: int | None) -> bool:
        """Writing to this file copies no more than the touched blocks. `size`: it is about to be cut to that length."""
        return False

    def holds_data(self, ldir: LDir, name: bytes) -> bool:
        """A metacopy of a lower layer that has some of its data itself: one above it continues from it."""
        return False

    def open_redirected(self, core: CopyUp, node: Node, write: bool) -> OpenFile | None:
        """The content of a metacopy: an OpenFile, plain or not; None: all of it is in the file below."""
        return None

    def settle(self, core: CopyUp, node: Node, f: OpenFile) -> OpenFile | None:
        """After a sync: the plain file that a redirected one has become, if it has."""
        return None

    def inode_gone(self, path: bytes) -> None:
        """The last name of an upper inode is about to go."""

    def flush(self) -> None:
        """Bring to the disk what the driver holds back."""

    # --- hard links over copy-up ---

    def index_dir(self, layer: Layer) -> LDir | None:
        return None

    def index_name(self, source: LDir, name: bytes, st: os.stat_result) -> bytes | None:
        """The index entry's name for a lower inode, whether it exists or not."""
        return None

    def index_find(self, source: LDir, name: bytes, st: os.stat_result) -> tuple[LDir, bytes] | None:
        """The existing index entry for a lower inode: directory and name."""
        return None

    def index_added(self, index: LDir, entry: bytes) -> None:
        pass

    def index_removed(self, index: LDir, entry: bytes) -> None:
        pass

    def index_rows(self) -> dict[tuple[LDir, bytes], int]:
        """What is to be dissolved at the end of the mount: the index's entries, and how many names each lacks."""
        return {}

    def index_dissolved(self, index: LDir, entry: bytes) -> None:
        """All names of the inode are in its layer now: the entry goes."""

    def set_nlink_delta(self, path: bytes, delta: int, of_lower: bool = False) -> None:
        """Note on an inode in the index what the union's link count is more than its own, or than the lower one's."""

    # --- xattrs and people ---

    def xattr_in(self, name: bytes) -> bytes | None:
        """The name on disk for a user's xattr name; None: refused (EOPNOTSUPP)."""
        return name

    def xattr_out(self, name: str) -> bytes | None:
        """The name users see for one on disk; None: internal."""
        return os.fsencode(name)

    def name_max(self, native: int) -> int:
        """The longest name that users can make (statfs)."""
        return native

    def statvfs(self) -> tuple[int, int, int, int, int, int, int, int]:
        """As Operations.statfs gives it."""
        s = os.fstatvfs((self.writable or self.layers)[0].root.open().n)
        namemax = self.name_max(s.f_namemax)
        return s.f_blocks, s.f_bfree, s.f_bavail, s.f_files, s.f_ffree, s.f_bsize, namemax, s.f_frsize

    def status(self) -> dict[str, Any]:
        return {}

    def control_verbs(self) -> dict[str, Callable[..., Any]]:
        return {}
