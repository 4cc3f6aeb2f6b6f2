"""The node table: what the kernel knows, by node id.

A node lives while the kernel holds lookups on it (`counts[id]` > 0) or a known child needs its parent. Ids are slots of
a list, used again after FORGET with another generation.

Threads: CPython's GIL changes hands only at calls and backward jumps. `+=` on an array's element is one step, and so is
"read a node's id, count it" in who takes a node, and "see no count, take the id away" in `drop`. Who finds the id 0
after counting came too late: the node is gone (slot 0 is nobody's; its count means nothing).

What a successor of this process would have to know is told to `changed` and `leaving`; here nobody listens.
"""

from __future__ import annotations

import errno
import os
import threading
from array import array

from unionfs.api import ROOT_ID
from unionfs.core.layers import Fd, LDir

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unionfs.core.order import Order


class More:
    """What few nodes have: hard-link names, a metacopy's data, an open-unlinked file, a corrected link count."""

    __slots__ = (
        "aliases",
        "backed",
        "data",
        "index",
        "key",
        "moving",
        "nested_whiteout",
        "nlink_delta",
        "opens",
        "orphan",
        "pin",
        "unlinked",
    )

    def __init__(self) -> None:
        self.aliases: list[tuple[Dir, bytes]] = []  # other known names of this inode
        self.data: tuple[LDir, bytes] | None = None  # metacopy: where the bytes are
        self.pin: Fd | None = None  # unlinked: keeps the inode reachable
        self.nested_whiteout = False  # shown as the character device 0:0
        self.unlinked = False  # no name left in the merged view
        self.orphan = False  # made without a name (O_TMPFILE)
        self.nlink_delta = 0  # union's link count minus the upper inode's
        self.index: bytes | None = None  # its name in the index, once copied up
        self.key: tuple[int, int] | None = None  # where NodeTable.links has it
        self.opens = 0  # opens that the kernel told us of
        self.moving = False  # between two writable layers: who wants to write waits
        self.backed = False  # the kernel reads and writes a descriptor of ours by itself


class Node:
    """A file of any kind but a directory. `ldir` and `rname` say where the inode is on disk."""

    __slots__ = ("id", "ino", "kind", "ldir", "more", "name", "parent")

    def __init__(self, parent: Dir | None, name: bytes, ldir: LDir, ino: int, kind: int) -> None:
        self.id = 0
        self.parent = parent
        self.name = name  # in the merged view
        self.ldir = ldir  # the layer directory that holds it under the same name
        self.ino = ino  # st_ino as users see it
        self.kind = kind  # S_IFMT bits
        self.more: More | None = None

    def disk_name(self) -> bytes:
        """Its name in `ldir`."""
        more = self.more
        return self.name if more is None or more.index is None else more.index

    def extra(self) -> More:
        more = self.more
        if more is None:
            more = self.more = More()
        return more


class Dir(Node):
    """A directory: its layer directories from the top down, and what is known of its names.

    `names` maps a name to the topmost layer directory that has it, None for a whiteout. Unless `complete`, it says
    nothing of the bottom layer, which is asked directly. `stacks` holds, for names that are directories in layers
    above the bottom, all layer directories that merge (a trailing None: cut off, the bottom does not join).
    """

    __slots__ = (
        "children",
        "complete",
        "inherit",
        "ldirs",
        "names",
        "order",
        "redirect",
        "removed",
        "stacks",
        "subdirs",
    )

    def __init__(self, parent: Dir | None, name: bytes, ldirs: list[LDir], ino: int) -> None:
        super().__init__(parent, name, ldirs[0], ino, 0o040000)
        self.ldirs = ldirs
        self.children: dict[bytes, Node] = {}
        self.names: dict[bytes, LDir | None] | None = None
        self.stacks: dict[bytes, list[LDir | None]] | None = None
        self.complete = False
        self.order: Order | None = None
        self.subdirs = -1  # number of subdirectories, -1: not counted yet
        self.redirect: bytes | None = None  # its path in the layers below, where that is not its place here
        self.inherit: tuple[int, bool] | None = None  # (gid for new entries or -1, has a default ACL); None: not read
        self.removed = False


def _unlist(parent: Dir, name: bytes, node: Node) -> None:
    """Take the name away if it is still this node's; without a call, so that no other thread comes in between."""
    children = parent.children
    try:
        if children[name] is node:
            del children[name]
    except KeyError:
        pass


class NodeTable:
    """node id → Node, and (dev, ino) → Node for inodes with several links."""

    def __init__(self, root: Dir) -> None:
        self.slots: list[Node | None] = [None, root]
        self.generations = array("I", [0, 0])
        self.counts: array[int] | memoryview[int] = array("i", [0, 1])  # lookups that the kernel holds
        self.free: list[int] = []
        self.links: dict[tuple[int, int], Node] = {}
        self.count = 1
        self.merged: dict[Dir, int] = {}  # directories whose names are remembered, oldest first: how many
        self.merged_names = 0
        self._growing = threading.Lock()
        root.id = ROOT_ID

    def add(self, node: Node) -> None:
        """Give the node an id. Its parent's `children` is the caller's."""
        if self.free:
            slot = self.free.pop()
            self.slots[slot] = node
            self.generations[slot] += 1
        else:
            with self._growing:  # two threads must not both see the same length
                slot = len(self.slots)
                self.slots.append(node)
                self.generations.append(0)
                self.counts.append(0)  # type: ignore[union-attr]
        node.id = slot
        self.count += 1

    def drop(self, node: Node) -> None:
        """Forget the node, unless somebody has taken it meanwhile, and its parents where nothing else needs them."""
        nodeid = node.id
        if not nodeid or self.counts[nodeid] > 0:
            return
        node.id = 0
        if isinstance(node, Dir):
            self.merged_names -= self.merged.pop(node, 0)
        more = node.more
        pin = None
        if more is not None:
            if more.key is not None and self.links.get(more.key) is node:
                del self.links[more.key]
            for parent, name in more.aliases:
                if parent.children.get(name) is node:
                    del parent.children[name]
                    self._reap(parent)
            pin, more.pin = more.pin, None
        self.slots[nodeid] = None
        self.counts[nodeid] = 0
        self.released(nodeid)
        del pin  # not earlier: what is written down must be open
        self.free.append(nodeid)
        self.count -= 1
        parent_ = node.parent
        if parent_ is not None:
            _unlist(parent_, node.name, node)
            self._reap(parent_)

    def _reap(self, directory: Dir) -> None:
        """A forgotten directory goes when its last known child has."""
        if self.counts[directory.id] <= 0 and not directory.children and directory.id > ROOT_ID:
            self.drop(directory)

    def changed(self, node: Node) -> None:
        """The node's name, its parent, or what keeps it reachable without a name is another now."""

    def leaving(self, node: Node, parent: Dir, name: bytes) -> None:
        """One of the node's names is about to go."""

    def released(self, nodeid: int) -> None:
        """The id is about to be free for another node."""

    def correcting(self, node: Node, before: int, after: int) -> None:
        """A name of an inode in the index is about to come or go, and then its mark: the union's count of links."""

    def forgotten(self, nodeid: int, nlookup: int) -> None:
        """FORGET of an id that has no node here."""

    def revive(self, nodeid: int) -> Node:
        """The node of an id that has none here, but that a predecessor of this process gave to the kernel. ESTALE."""
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
