"""The chain of layers that an upper of the row driver is made of, and the names of its snapshots: one small file.

`UPPER/.wh..wh.row/chain`; where there is none, the upper directory itself is the one layer. The file is replaced in one
step by a rename, and what it names was made before: a crash leaves the old chain or the new one. Layers that it does
not name are leftovers, for `leftovers`. Format: docs/row-format.md. No locks: the caller has the upper's.
"""

from __future__ import annotations

import errno
import os
import time
from zlib import crc32

from unionfs.errors import EXIT_FORMAT, EXIT_LAYER, EXIT_USAGE, MountError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

STORE = b".wh..wh.row"
CHAIN = STORE + b"/chain"
LAYERS = STORE + b"/layers"
INDEX = STORE + b"/index"
CLONES = STORE + b"/clones"
MAPS = STORE + b"/maps"
_TITLE = b"unionfs-row-chain"
VERSION = 1
NAME_MAX = 200
NOW = "now"  # the state of the present, where a snapshot can be named


class Snapshot:
    __slots__ = ("created", "id", "layer", "name")

    def __init__(self, name: str, ident: str, layer: int, created: int) -> None:
        self.name = name
        self.id = ident  # the same for the same state, also where it was received
        self.layer = layer  # the topmost that it shows
        self.created = created  # ns


class Base:
    """What a clone stands on: a layer of another upper's chain."""

    __slots__ = ("id", "layer", "upper")

    def __init__(self, upper: bytes, ident: str, layer: int) -> None:
        self.upper = upper
        self.id = ident
        self.layer = layer


class Chain:
    """`parents`: layer number → the one it stands on, None at the bottom (number 0, the upper directory itself)."""

    def __init__(self, root: int) -> None:
        self.root = root  # descriptor of the upper directory; the caller's
        self.id = os.urandom(12).hex()
        self.top = 0
        self.next = 1
        self.parents: dict[int, int | None] = {0: None}
        self.snapshots: list[Snapshot] = []
        self.base: Base | None = None
        self.lowers: list[bytes] = []  # what it was last mounted over; for commands without a mount
        self.stored = False

    # --- on disk ---

    @classmethod
    def load(cls, root: int) -> Chain:
        """MountError for a chain that can't be believed."""
        chain = cls(root)
        try:
            fd = os.open(CHAIN, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=root)
        except (FileNotFoundError, NotADirectoryError):
            return chain
        with open(fd, "rb") as f:
            raw = f.read()
        title, _, body = raw.partition(b"\n")
        words = title.split()
        if len(words) != 3 or words[0] != _TITLE or not words[1].isdigit():
            raise _damaged(root, "it is no chain file")
        if int(words[1]) != VERSION:
            raise _damaged(root, f"it has version {words[1].decode()}, this program knows {VERSION}")
        if words[2] != b"%08x" % crc32(body):
            raise _damaged(root, "its checksum is wrong")
        import json  # only where there is a chain

        try:
            chain._take(json.loads(body))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            raise _damaged(root, f"it can't be read: {e!r}") from None
        chain.stored = True
        return chain

    def _take(self, data: dict[str, Any]) -> None:
        self.id, self.top, self.next = str(data["id"]), int(data["top"]), int(data["next"])
        self.parents = {int(n): parent for n, parent in data["layers"].items()}
        self.snapshots = [Snapshot(s["name"], s["id"], s["layer"], s["created"]) for s in data["snapshots"]]
        self.lowers = [os.fsencode(path) for path in data["lowers"]]
        base = data.get("base")
        self.base = Base(os.fsencode(base["upper"]), base["id"], base["layer"]) if base else None
        for layer in (self.top, *(s.layer for s in self.snapshots)):
            self.stack(layer)

    def packed(self) -> bytes:
        import json

        base = self.base
        body = json.dumps(
            {
                "id": self.id,
                "top": self.top,
                "next": self.next,
                "layers": {str(n): parent for n, parent in sorted(self.parents.items())},
                "snapshots": [
                    {"name": s.name, "id": s.id, "layer": s.layer, "created": s.created} for s in self.snapshots
                ],
                "base": {"upper": os.fsdecode(base.upper), "id": base.id, "layer": base.layer} if base else None,
                "lowers": [os.fsdecode(path) for path in self.lowers],
            },
            indent=1,
        ).encode()
        return _TITLE + b" %d %08x\n" % (VERSION, crc32(body)) + body

    def write(self) -> None:
        """Make the new chain durable beside the one in force."""
        for path in (STORE, LAYERS):
            make_directory(self.root, path)
        fd = os.open(
            CHAIN + b".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600,
            dir_fd=self.root,
        )  # fmt: skip
        with open(fd, "wb") as f:
            f.write(self.packed())
            f.flush()
            os.fsync(f.fileno())

    def publish(self) -> None:
        """Put what was written in force; not durable before `settle`."""
        os.rename(CHAIN + b".new", CHAIN, src_dir_fd=self.root, dst_dir_fd=self.root)
        self.stored = True

    def settle(self) -> None:
        sync_directory(self.root, STORE)

    def save(self) -> None:
        self.write()
        self.publish()
        self.settle()

    def copy(self) -> Chain:
        """To change and save, while the old one is in force."""
        made = Chain(self.root)
        made.id, made.top, made.next, made.stored = self.id, self.top, self.next, self.stored
        made.parents, made.snapshots = dict(self.parents), list(self.snapshots)
        made.base, made.lowers = self.base, list(self.lowers)
        return made

    # --- reading it ---

    def stack(self, layer: int) -> list[int]:
        """The layer and those it stands on, topmost first."""
        found: list[int] = []
        at: int | None = layer
        while at is not None:
            if at in found or at not in self.parents:
                raise ValueError(f"layer {at} of the chain is missing or stands on itself")
            found.append(at)
            at = self.parents[at]
        return found

    def find(self, name: str) -> Snapshot:
        """By name or id. MountError: there is none."""
        for s in self.snapshots:
            if name in (s.name, s.id):
                return s
        from unionfs.errors import nearest

        names = [s.name for s in self.snapshots]
        hint = nearest(name, names) or (f"; there are: {', '.join(names[-10:])}" if names else "; there are none")
        raise MountError(f"no snapshot {name!r}{hint}", EXIT_LAYER)

    def needed(self) -> set[int]:
        """Layers that the present, a snapshot or a clone shows."""
        found: set[int] = {0}
        for layer in (self.top, *(s.layer for s in self.snapshots), *self.cloned()):
            if layer in self.parents:
                found.update(self.stack(layer))
        return found

    def cloned(self) -> list[int]:
        """Layers that clones stand on."""
        return [layer for _, _, layer in clones(self.root)]

    def path(self, layer: int) -> bytes:
        """Of the layer's directory, from the upper's root."""
        return LAYERS + b"/%d" % layer if layer else b"."

    # --- changing it ---

    def add_layer(self, parent: int) -> int:
        layer, self.next = self.next, self.next + 1
        self.parents[layer] = parent
        return layer

    def add_snapshot(self, name: str, layer: int, ident: str | None = None) -> Snapshot:
        check_name(name)
        if any(s.name == name for s in self.snapshots):
            raise MountError(f"snapshot {name!r} exists already: delete it, or take another name", EXIT_USAGE)
        made = Snapshot(name, ident or os.urandom(12).hex(), layer, time.time_ns())
        self.snapshots.append(made)
        return made


def check_name(name: str) -> None:
    if not 0 < len(os.fsencode(name)) <= NAME_MAX or name.startswith(("-", ".")) or name == NOW:
        raise MountError(
            f"snapshot name {name!r}: 1 to {NAME_MAX} bytes, not beginning with - or ., and not {NOW!r}", EXIT_USAGE
        )
    if not name.isprintable() or "/" in name:
        raise MountError(f"snapshot name {name!r}: must be printable, without /", EXIT_USAGE)


def _damaged(root: int, why: str) -> MountError:
    path = os.fsdecode(os.readlink(f"/proc/self/fd/{root}")) + "/" + CHAIN.decode()
    return MountError(f"{path}: {why}; nothing is mounted over a chain that can't be believed", EXIT_FORMAT)


# --- clones: a file for each, so that they can come while the upper is mounted ---


def clones(root: int) -> list[tuple[str, bytes, int]]:
    """(chain id, upper directory, layer that it stands on) of every clone that was made."""
    found = []
    for name in listed(root, CLONES):
        try:
            fd = os.open(CLONES + b"/" + name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=root)
        except OSError:
            continue
        with open(fd, "rb") as f:
            layer, _, path = f.read().rstrip(b"\n").partition(b" ")
        if layer.isdigit():
            found.append((name.decode("ascii", "replace"), path, int(layer)))
    return found


def register_clone(root: int, ident: str, path: bytes, layer: int) -> None:
    for directory in (STORE, CLONES):
        make_directory(root, directory)
    name = CLONES + b"/" + ident.encode()
    tmp = CLONES + b"/.new-" + ident.encode()
    fd = os.open(tmp, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600, dir_fd=root)
    with open(fd, "wb") as f:
        f.write(b"%d " % layer + path + b"\n")
        f.flush()
        os.fsync(f.fileno())
    os.rename(tmp, name, src_dir_fd=root, dst_dir_fd=root)
    sync_directory(root, CLONES)


def is_alive(ident: str, path: bytes) -> bool:
    """The clone is where it was made, or last mounted."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return Chain.load(fd).id == ident
    except MountError:
        return True  # damaged, but there
    finally:
        os.close(fd)


# --- small steps ---


def make_directory(root: int, path: bytes) -> None:
    """The upper's root keeps its times: nobody sees that we have something in it."""
    st = os.fstat(root)
    try:
        os.mkdir(path, 0o700, dir_fd=root)
    except FileExistsError:
        return
    os.utime(root, ns=(st.st_atime_ns, st.st_mtime_ns))


def sync_directory(root: int, path: bytes) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root)
    try:
        os.fsync(fd)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
    finally:
        os.close(fd)


def listed(root: int, path: bytes) -> list[bytes]:
    """Names in a directory of ours, unfinished ones left out; none where it does not exist."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=root)
    except (FileNotFoundError, NotADirectoryError):
        return []
    try:
        return sorted(os.fsencode(name) for name in os.listdir(fd) if not name.startswith("."))
    finally:
        os.close(fd)


def leftovers(chain: Chain) -> list[bytes]:
    """Layers and indexes, as paths from the upper's root, that the chain does not name."""
    found = []
    for directory in (LAYERS, INDEX):
        for name in listed(chain.root, directory):
            if not name.isdigit() or int(name) not in chain.parents:
                found.append(directory + b"/" + name)
    return found
