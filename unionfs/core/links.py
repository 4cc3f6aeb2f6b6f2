"""Hard links over copy-up become real ones at the end of a mount.

While it is mounted, an inode with several names that was copied up is found by way of the index: names that nobody has
touched exist in the layers below only. A layer at rest is to stand on its own (to be packed, or mounted by others), so
all names that the union shows are linked in the layer that has the inode; then the index is not needed any more.
"""

from __future__ import annotations

import sys
from stat import S_ISDIR

from unionfs.core.layers import LDir
from unionfs.core.nodes import Dir, Node
from unionfs.core.ops import UnionOperations


def link_all(core: UnionOperations, index: dict[tuple[LDir, bytes], int]) -> list[tuple[LDir, bytes]]:
    """`index`: its entries, with the number of names that each lacks. Returns those that lack none that is shown.

    Precondition: no operation is running. One pass over the tree, ended early when no name is missing.
    """
    missing = {entry: count for entry, count in index.items() if count > 0}
    pending: list[tuple[Dir, bytes]] = [(core.root, b"")] if missing else []
    failed: set[tuple[LDir, bytes]] = set()
    while pending and missing:
        p, name = pending.pop()
        node: Node = core._child(p, name) if name else p
        assert isinstance(node, Dir)
        core._list(node)
        for inner in core._visible(node):
            found = core._find(node, inner)
            if found is None:
                continue
            ldir, st = found
            if S_ISDIR(st.st_mode):
                pending.append((node, inner))
            elif st.st_nlink > 1 and not ldir.layer.writable:
                _link(core, node, inner, missing, failed)
    return [entry for entry in index if entry not in failed]


def _link(
    core: UnionOperations, p: Dir, name: bytes, missing: dict[tuple[LDir, bytes], int], failed: set[tuple[LDir, bytes]]
) -> None:
    node = core._child(p, name)
    if node.more is None or node.more.index is None:
        return
    entry = node.ldir, node.more.index
    try:
        into = core._ensure_alias(p, name, node, node.ldir.layer)
        if into.impure is not True:
            core.driver.mark_impure(into)  # the inode says which number it shows
    except OSError as e:
        failed.add(entry)
        print(f"unionfs: hard link {name!r} stays a pseudo-link: {e.strerror}", file=sys.stderr)
        return
    left = missing.get(entry, 0) - 1
    if left > 0:
        missing[entry] = left
    else:
        missing.pop(entry, None)
