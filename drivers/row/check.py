"""`unionfs fsck`: an unmounted row upper, checked without mounting it.

Looks at every redirected file and every map: what is damaged, missing or left over is said in words; what can be
repaired without guessing is, where that is asked for.
"""

from __future__ import annotations

import os

from unionfs.errors import EXIT_FORMAT, MountError

from .blockmap import DATA, HOLE, Base, BlockMap, MapError
from .chain import Chain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

STORE = b".wh..wh.row"
MARK = "overlay.unionfs.row"
_PREFIXES = ("trusted.", "user.")


class Finding:
    __slots__ = ("fatal", "path", "repaired", "words")

    def __init__(self, path: bytes, words: str, fatal: bool, repaired: bool = False) -> None:
        self.path = path
        self.words = words
        self.fatal = fatal  # data can't be read as it was
        self.repaired = repaired


def ident_of(path: bytes) -> str | None:
    for prefix in _PREFIXES:
        try:
            return os.getxattr(path, prefix + MARK, follow_symlinks=False).decode("ascii", "replace")
        except OSError:
            continue
    return None


def redirected(upper: bytes) -> Iterator[tuple[bytes, str]]:
    """(path, map id) of every redirected file, those of frozen layers too."""
    for top in (upper, os.path.join(upper, STORE, b"layers"), os.path.join(upper, STORE, b"index")):
        for directory, names, files in os.walk(top):
            if STORE in names:
                names.remove(STORE)
            for name in files:
                path = os.path.join(directory, name)
                ident = ident_of(path)
                if ident is not None:
                    yield path, ident


def check(upper: bytes, repair: bool) -> list[Finding]:
    from .snapshot_check import check_chain

    findings = check_chain(upper, repair)
    maps = os.path.join(upper, STORE, b"maps")
    left = set(os.listdir(maps)) if os.path.isdir(maps) else set()
    seen: dict[str, tuple[int, int]] = {}
    for path, ident in redirected(upper):
        st = os.lstat(path)
        left.discard(ident.encode())
        if seen.setdefault(ident, (st.st_dev, st.st_ino)) != (st.st_dev, st.st_ino):
            findings.append(Finding(path, f"shares block map {ident} with another file", True))
            continue
        findings += _check_map(maps, path, ident, st.st_size, repair)
    for name in sorted(left):
        if repair:
            os.unlink(os.path.join(maps, name))
        findings.append(Finding(os.path.join(maps, name), "belongs to no file", False, repair))
    return findings


def refuse_snapshots(upper: bytes) -> None:
    """MountError where an upper is more than one layer."""
    root = os.open(upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        chain = Chain.load(root)
    finally:
        os.close(root)
    if len(chain.parents) > 1 or chain.base is not None:
        raise MountError(
            f"{os.fsdecode(upper)}: has snapshots, or is a clone: a plain upper is one layer; mount it and "
            "copy what it shows, or delete the snapshots (unionfs snapshot delete)",
            EXIT_FORMAT,
        )


def _check_map(maps: bytes, path: bytes, ident: str, size: int, repair: bool) -> list[Finding]:
    try:
        dirfd = os.open(maps, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as e:
        return [Finding(path, f"the maps are gone: {e.strerror}", True)]
    try:
        found = BlockMap.load(dirfd, ident, False, (4096, Base(0, 0, 0)))  # an empty one is no damage
        try:
            out: list[Finding] = []
            if not found.trusted:
                if repair:
                    BlockMap.load(dirfd, ident, True).close()
                out.append(Finding(path, "the end of its block map is torn or was never synced", False, repair))
            last = found.extents.end()
            if last > -(-size // found.blocksize):
                out.append(Finding(path, f"its block map reaches block {last}, beyond its end", False))
            return out
        finally:
            found.close()
    except FileNotFoundError:
        return [Finding(path, f"block map {ident} is missing", True)]
    except MapError as e:
        return [Finding(path, f"block map {ident}: {e}", True)]
    finally:
        os.close(dirfd)


def upper_of(path: bytes) -> bytes | None:
    """The upper that a path lies in: the nearest directory above it with block maps."""
    here = os.path.dirname(path)
    while True:
        if os.path.isdir(os.path.join(here, STORE, b"maps")):
            return here
        above = os.path.dirname(here)
        if above == here:
            return None
        here = above


def draw(upper: bytes, path: bytes) -> list[str]:
    """The block map of one file of an upper as lines: a picture of the whole, then its runs. MapError."""
    ident = ident_of(path)
    if ident is None:
        return ["plain: no block map"]
    dirfd = os.open(os.path.join(upper, STORE, b"maps"), os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = BlockMap.load(dirfd, ident, False, (4096, Base(0, 0, 0)))
    except FileNotFoundError:
        raise MapError("is missing") from None
    finally:
        os.close(dirfd)
    try:
        size = os.lstat(path).st_size
        blocks = -(-size // found.blocksize)
        runs = found.extents.runs(0, blocks)
        totals = {kind: sum(end - first for first, end, k in runs if k == kind) for kind in (DATA, HOLE, 0)}
        return [
            f"map {ident}, block size {found.blocksize}, {found.records} records, size {size}, {blocks} blocks",
            f"base: size {found.base.size}, inode {found.base.ino}, valid up to byte {found.limit}",
            f"redirected {totals[DATA]}, holes {totals[HOLE]}, base {totals[0]}",
            f"[{_picture(found, blocks)}]  # redirected  + in part  o hole  . base",
            *(f"{first:>10} .. {end - 1:<10} {_WORDS[kind]}" for first, end, kind in runs),
        ]
    finally:
        found.close()


_WORDS = {DATA: "redirected", HOLE: "hole", 0: "base"}
WIDTH = 64  # columns of a picture


def _picture(found: BlockMap, blocks: int) -> str:
    out = ""
    columns = min(WIDTH, blocks)
    for column in range(columns):
        first, end = column * blocks // columns, (column + 1) * blocks // columns
        kinds = {kind for _, _, kind in found.extents.runs(first, end)}
        out += {DATA: "#", HOLE: "o", 0: "."}[kinds.pop()] if len(kinds) == 1 else "+" if DATA in kinds else "o"
    return out
