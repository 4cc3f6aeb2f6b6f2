"""The seam of the layer store: what engines' plugins, the daemon and the image verbs see of it. A leaf.

A store keeps layers of one driver under `DATA_ROOT/DRIVER/`. All calls block and are thread-safe; one process at a
time holds a store (`InUse` for the second). Every failure is a `StoreError` with an HTTP-like `status`; what a message
says is one line that names the thing, the reason and the way out.

Words: a layer is *active* (writable), *committed* (read-only, may be a parent) or a *view* (a committed chain to be
mounted read-only). A layer's own content is what it changes against its parent; its tree is that over its parents.
"""

from __future__ import annotations

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple, Protocol

Kind = Literal["committed", "active", "view"]

DRIVERS = ("overlay", "aufs", "row", "vfs", "btrfs")

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}\Z")


class StoreError(Exception):
    """Base of all that a store refuses; `status` is what HTTP would say."""

    status = 500


class Invalid(StoreError):
    """Malformed: an id, an option, a tar stream."""

    status = 400


class NotFound(StoreError):
    status = 404


class Exists(StoreError):
    status = 409


class InUse(StoreError):
    """Mounted, a parent of others, or held by another process."""

    status = 409


class Precondition(StoreError):
    """The layer is of a kind that this can't be done with."""

    status = 412


class Unsupported(StoreError):
    """The driver, or the host, can't: a quota, btrfs on another filesystem."""

    status = 501


class NoSpace(StoreError):
    """ENOSPC or EDQUOT while writing; what was half written is garbage that `cleanup` takes."""

    status = 507


class Layer(NamedTuple):
    id: str
    parent: str  # "": none
    kind: Kind
    created: float  # seconds since the epoch
    updated: float
    labels: dict[str, str]
    size: int  # bytes of its own content, frozen at commit; -1 before
    inodes: int  # same
    diff_id: str  # "sha256:..." of the uncompressed tar that was applied; "" if none was


class Change(NamedTuple):
    path: str  # "/a/b"; bytes that are not UTF-8 as surrogate escapes
    kind: int  # MODIFIED, ADDED, DELETED: the engines' numbers


MODIFIED, ADDED, DELETED = 0, 1, 2


class Usage(NamedTuple):
    size: int  # bytes allocated
    inodes: int


class Applied(NamedTuple):
    size: int  # bytes of the regular files that were unpacked
    diff_id: str  # "sha256:..." of the uncompressed tar


class Readable(Protocol):
    """What `apply` reads from: any binary stream."""

    def read(self, size: int, /) -> bytes: ...


class Store(ABC):
    """One driver's layers. Ids are opaque: `[A-Za-z0-9][A-Za-z0-9_.:-]{0,127}`, anything else is `Invalid`."""

    driver: str
    home: str  # DATA_ROOT/DRIVER

    # --- layers ---

    @abstractmethod
    def create(
        self,
        id: str,
        parent: str = "",
        *,
        kind: Kind = "active",
        labels: Mapping[str, str] | None = None,
        options: Mapping[str, str] | None = None,
    ) -> Layer:
        """A new active layer or view. The parent must be committed (Precondition). options: {"size": "10g"}, a quota,
        where the driver can (else Unsupported); "uidmapping", "gidmapping": ID:DISK_ID:LENGTH groups, the owners that
        its mounts show for those on disk (Unsupported where the driver keeps whole trees). A view needs a parent
        (Invalid)."""

    @abstractmethod
    def commit(self, id: str, new_id: str, *, labels: Mapping[str, str] | None = None, parent: str = "") -> Layer:
        """Freezes an active layer under `new_id`; the old id vanishes. O(1) but for the fsync; labels replace the old
        ones. `new_id` may be `id` itself: frozen in place (labels kept if none are given). InUse while mounted.
        `parent`: puts a layer without one onto that committed layer, where the driver can (else Unsupported)."""

    @abstractmethod
    def remove(self, id: str) -> None:
        """InUse while it is mounted or a parent. Once it returns the id is free and stays gone after a crash."""

    @abstractmethod
    def exists(self, id: str) -> bool: ...

    @abstractmethod
    def layer(self, id: str) -> Layer: ...

    @abstractmethod
    def layers(self) -> list[Layer]:
        """All, oldest first."""

    @abstractmethod
    def set_labels(self, id: str, labels: Mapping[str, str], *, replace: bool) -> Layer:
        """Merges (an empty value deletes the label) or replaces; `updated` becomes now."""

    # --- mounts ---

    @abstractmethod
    def get(self, id: str) -> str:
        """Mounts if need be, takes one reference; the absolute path of the tree. A committed layer and a view are
        mounted read-only. The mount is served by a process that outlives this one."""

    @abstractmethod
    def put(self, id: str) -> None:
        """Gives a reference back and unmounts at none (lazily if it is busy then). Without references: nothing."""

    @abstractmethod
    def release(self, id: str) -> None:
        """Gives back all references: `put` until nothing is left."""

    @abstractmethod
    def mounted(self) -> dict[str, tuple[str, int]]:
        """id -> (path, references), those of earlier processes included if their mounts are still there."""

    @abstractmethod
    def branches(self, id: str) -> tuple[list[str], str, str]:
        """(lowers topmost first, upper or "", work or ""): what a mount of it is made of. vfs and btrfs keep whole
        trees: ([], tree, "") for an active layer and ([tree], "", "") for others."""

    # --- content ---

    @abstractmethod
    def apply(self, id: str, stream: Readable) -> Applied:
        """Unpacks an OCI layer tar (plain, gzip, zstd) into an active layer, never outside of it. On failure the layer
        holds part of it: remove it."""

    @abstractmethod
    def diff(self, id: str, parent: str | None = None) -> Iterator[bytes]:
        """The OCI layer tar of what `id` changes against `parent` (None: its own parent; "": nothing, so its whole
        tree), uncompressed. The same for the same content."""

    @abstractmethod
    def changes(self, id: str, parent: str | None = None) -> list[Change]:
        """What the tar of `diff` would hold, by path."""

    @abstractmethod
    def diff_size(self, id: str, parent: str | None = None) -> int:
        """Bytes of the regular files that `diff` would hold."""

    @abstractmethod
    def usage(self, id: str) -> Usage:
        """Of the layer without its parents; frozen for committed layers."""

    # --- people and upkeep ---

    @abstractmethod
    def metadata(self, id: str) -> dict[str, str]:
        """Paths as `docker inspect` shows them: LowerDir, UpperDir, WorkDir, MergedDir, as far as there are any."""

    @abstractmethod
    def status(self) -> list[tuple[str, str]]:
        """Lines for `info`: Backing Filesystem, Supports d_type, Native Diff, Layers, Mounted and the driver's own."""

    @abstractmethod
    def cleanup(self) -> list[str]:
        """Removes what is on disk and not in the database, and unpackings that nobody finishes; what went."""

    @abstractmethod
    def fsck(self, repair: bool = False) -> list[str]:
        """What is wrong, in words; [] for a clean store. Repair removes what can't be saved and says so."""

    @abstractmethod
    def close(self) -> None:
        """Lets go of the lock. Mounts stay."""


def check_id(id: str) -> str:
    if not _ID.match(id):
        raise Invalid(f"id {id[:140]!r}: must be 1 to 128 of A-Z a-z 0-9 _ . : - and begin with a letter or digit")
    return id


def default_root() -> str:
    """/var/lib/unionfs for root, $XDG_DATA_HOME/unionfs (~/.local/share/unionfs) for others."""
    if os.geteuid() == 0:
        return "/var/lib/unionfs"
    data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
    return os.path.join(data, "unionfs")


def stored_drivers(root: str) -> list[str]:
    """The drivers that have a store under the data root already."""
    return [driver for driver in DRIVERS if os.path.exists(os.path.join(root, driver, "store.db"))]


def open_store(root: str, driver: str, options: Mapping[str, str] | None = None) -> Store:
    """Opens `root`/`driver`, makes it if need be. InUse if another process holds it, Unsupported if the host can't."""
    from unionfs.store.layers import LayerStore

    return LayerStore(root, driver, options or {})
