"""The node table under several threads: ids are nobody else's, and a node that somebody takes is not dropped."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unionfs.core.layers import FdCache, Layer
from unionfs.core.nodes import Dir, Node, NodeTable

THREADS = 4


@pytest.fixture
def root(tmp_path: Path) -> Iterator[Dir]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield Dir(None, b"", [Layer(0, bytes(tmp_path), False, FdCache(8)).root], 1)
    sys.setswitchinterval(interval)


def together(work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_ids_are_unique(root: Dir) -> None:
    table = NodeTable(root)
    nodes = [[Node(root, b"%d.%d" % (i, j), root.ldir, 2, 0o100000) for j in range(20000)] for i in range(THREADS)]

    def add(number: int) -> None:
        for node in nodes[number]:
            table.add(node)

    together(add)
    every = [node for some in nodes for node in some]
    assert len({node.id for node in every}) == len(every) == table.count - 1
    assert all(table.slots[node.id] is node for node in every)


def test_taken_is_not_dropped(root: Dir) -> None:
    """Threads that find a node and count it against threads that drop it when nobody has: each id stays its node's."""
    table = NodeTable(root)
    wrong: list[str] = []

    def work(number: int) -> None:
        for _ in range(20000):
            node = root.children.get(b"x")
            if node is None or not node.id:
                node = Node(root, b"x", root.ldir, 2, 0o100000)
                table.add(node)
                root.children[b"x"] = node
            nodeid = node.id
            table.counts[nodeid] += 1
            if not nodeid:
                continue  # too late
            if table.slots[nodeid] is not node or node.id != nodeid:
                wrong.append(f"{nodeid} is not the node that was taken")
                return
            table.counts[nodeid] -= 1
            table.drop(node)

    together(work)
    assert not wrong
