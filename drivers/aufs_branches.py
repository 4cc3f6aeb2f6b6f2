"""Branches of the aufs driver: permissions and attributes as people write them, and opening and checking them.

`PATH=rw`, `PATH=ro+wh` and so on, as aufs(5) has it. What we don't do is refused by name, with the reason.
"""

from __future__ import annotations

import os

from unionfs.core.layers import Layer, LDir
from unionfs.errors import EXIT_LAYER, EXIT_PERMISSION, EXIT_USAGE, MountError, nearest

from . import branches

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

PERMISSIONS = ("rw", "ro", "rr")
MAX_BRANCHES = 512
ORPHANS = b".wh..wh.orph"
PSEUDO_LINKS = b".wh..wh.plnk"

# attribute → the permissions that it goes with
ATTRIBUTES = {"wh": ("ro", "rr"), "nolwh": ("rw",), "unpin": PERMISSIONS}
REFUSED = {
    "coo_reg": "a file is copied up by its first write, never by an open",
    "coo_all": "a file is copied up by its first write, never by an open",
    "moo": "files move to an upper branch when they are written there, never by an open",
    "fhsm": "there is no daemon that moves files between branches",
    "icex": "what a branch can't hold is left behind already, any other error is reported",
}


def parse_permission(text: str, path: bytes, default: str) -> tuple[str, frozenset[str]]:
    """("rw", {"nolwh"}) for "rw+nolwh". "" is the default."""
    permission, *attributes = (text or default).split("+")
    where = f"branch {branches.show(path)}={text}"
    if permission not in PERMISSIONS:
        hint = nearest(permission, PERMISSIONS)
        raise MountError(f"{where}: unknown permission {permission!r}{hint}; one of rw, ro, rr", EXIT_USAGE)
    for attribute in attributes:
        reason = REFUSED.get("icex" if attribute.startswith("icex") else attribute)
        if reason is not None:
            raise MountError(f"{where}: attribute {attribute} is not supported: {reason}; leave it out", EXIT_USAGE)
        if attribute not in ATTRIBUTES:
            known = [*ATTRIBUTES]
            raise MountError(
                f"{where}: unknown attribute {attribute!r}{nearest(attribute, known)}; known: {', '.join(known)}",
                EXIT_USAGE,
            )
        if permission not in ATTRIBUTES[attribute]:
            goes = " and ".join(ATTRIBUTES[attribute])
            raise MountError(f"{where}: attribute {attribute} goes with {goes} only", EXIT_USAGE)
    return permission, frozenset(attributes)


def check(wanted: Sequence[bytes], present: Sequence[bytes] = (), mountpoint: bytes | None = None) -> None:
    """MountError unless all are directories and none is or lies inside another one, one that is present included.

    `mountpoint`: of the mount that they are added to; a branch that holds it would be read through the mount itself.
    """
    count = len(wanted) + len(present)
    if count > MAX_BRANCHES:
        raise MountError(f"{count} branches: at most {MAX_BRANCHES} are supported", EXIT_USAGE)
    for path in wanted:
        branches.check_directory(path, "branch")
        real = os.path.realpath(path)
        if mountpoint is not None and os.path.commonpath([real, mountpoint]) in (real, mountpoint):
            raise MountError(f"branch {branches.show(path)}: the mountpoint is in it, or it in the mount", EXIT_LAYER)
    branches.check_overlap([("branch", path) for path in (*wanted, *present)])


def prepare_writable(layer: Layer) -> None:
    """Lock the branch, and empty its `.wh..wh.orph` of what a dead server left."""
    branches.lock(layer.root, "branch", layer.path)
    if layer.work is None:
        try:
            layer.work = own_directory(layer, ORPHANS)
            branches.empty(layer.work)
        except OSError as e:
            raise MountError(
                f"branch {branches.show(layer.path)}: not writable: {e.strerror}; mount it as =ro", EXIT_PERMISSION
            ) from None


def own_directory(layer: Layer, name: bytes) -> LDir:
    try:
        os.mkdir(name, 0o700, dir_fd=layer.root.open().n)
    except FileExistsError:
        pass
    made = layer.root.child(name)
    made.open()
    return made


def leave(layer: Layer) -> None:
    """At the end: our directories go from a branch where they are empty, so that it can be packed as it is."""
    for name in (ORPHANS, PSEUDO_LINKS):
        try:
            os.rmdir(name, dir_fd=layer.root.open().n)
        except OSError:
            pass  # in use for the next mount, or not there


def permission_of(layer: Layer) -> str:
    return "+".join([layer.permission, *sorted(layer.attrs)])

