"""Batches of sequences on several file systems at once, and what is printed when they differ."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from pprint import pformat
from types import TracebackType

from .compare import Difference, compare
from .executor import Facts, Operation
from .filesystems import FileSystem, Layers, Worker, ask_all

BATCH = 60  # sequences of one layer set per mount

Sequence = tuple[str, list[Operation]]


class Batch:
    """File systems over fresh layers; `run` takes sequences until the directories are used up."""

    def __init__(self, kinds: Iterable[str], session: str, data: str, size: int = BATCH) -> None:
        self.base = Path(tempfile.mkdtemp(prefix="differential."))
        self.base.chmod(0o755)
        self.layers = Layers(self.base / "layers", size)
        self.free = {name: list(copies) for name, copies in self.layers.names.items()}
        self.workers = [Worker(FileSystem(kind, self.layers, session, data)) for kind in ("plain", *kinds)]
        self.lowers = [worker.filesystem.lower_trees() for worker in self.workers]
        self.done: list[tuple[str, Sequence, list[Facts]]] = []  # and what each worker saw last

    def start(self) -> None:
        for worker in self.workers:
            worker.start()
        for worker in self.workers:
            worker.receive()

    def run(self, layers: str, operations: list[Operation], used: set[str]) -> None:
        """Raises Difference."""
        directory = self.free[layers].pop()
        records = ask_all(self.workers, (directory, operations))
        if any(operation[0] == "interchange" for operation in operations):
            ask_all(self.workers, "settle")
        for worker, record in zip(self.workers[1:], records[1:], strict=True):
            compare(worker.filesystem.kind, operations, records[0], record, used)
        self.done.append((directory, (layers, operations), [record[-1] for record in records]))

    def look_again(self, verb: str, used: set[str]) -> None:
        """Every tree is still what its last operation left: after a remount, or (`interchange`) as the other
        implementation of the format shows the same layers. Raises Difference."""
        ask_all(self.workers, verb)
        for directory, (layers, operations), finals in self.done:
            records = ask_all(self.workers, (directory, [("tree", 0)]))
            for worker, final, record in zip(self.workers, finals, records, strict=True):
                kind = worker.filesystem.kind
                history = [*operations[:-1], (verb, 0), operations[-1]]
                nothing: list[Facts] = [{}] * len(operations)
                try:
                    compare(kind, history, [*nothing, final], [*nothing, *record], used)
                except Difference as difference:
                    difference.layers = layers
                    difference.operations = operations
                    difference.when = f"at the end, after {verb}"
                    raise

    def stop(self) -> None:
        """Unmounts; an error if the lowers are not what they were."""
        for worker in self.workers:
            worker.stop()
        for worker, before in zip(self.workers, self.lowers, strict=True):
            assert worker.filesystem.lower_trees() == before, f"{worker.filesystem.kind} changed a lower layer"

    def remove(self) -> None:
        for worker in self.workers:
            if worker.pid:
                worker.kill()
        shutil.rmtree(self.base)


class Runner:
    """Gives out batches as they are used up. A context manager."""

    def __init__(self, kinds: Iterable[str], session: str = "auto", data: str = "auto", size: int = BATCH) -> None:
        self.kinds = tuple(kinds)
        self.session = session
        self.data = data
        self.size = size
        self.used: set[str] = set()
        self.count = 0
        self._batch: Batch | None = None

    def __enter__(self) -> Runner:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.finish(check=kind is None)

    def finish(self, check: bool) -> None:
        batch, self._batch = self._batch, None
        if batch is None:
            return
        try:
            if check:
                batch.look_again("remount", self.used)
                if "unionfs" in self.kinds:
                    batch.look_again("interchange", self.used)
                batch.stop()
        finally:
            batch.remove()

    def run(self, layers: str, operations: list[Operation]) -> None:
        """Raises Difference, or Broken when a file system stopped working; the next run begins a new batch then."""
        if self._batch is not None and not self._batch.free[layers]:
            self.finish(check=True)
        if self._batch is None:
            self._batch = Batch(self.kinds, self.session, self.data, self.size)
            self._batch.start()
        self.count += 1
        try:
            self._batch.run(layers, operations, self.used)
        except Difference as difference:
            difference.layers = layers
            raise
        except BaseException:
            self.finish(check=False)
            raise


def shrink(sequence: Sequence, fails: Callable[[Sequence], bool]) -> Sequence:
    """Without every operation that the failure does not need. For what only shows at the end of a batch, where
    hypothesis, which shrinks the rest, has lost hold of the sequence."""
    layers, operations = sequence
    index = 0
    while operations[index][0] != "tree":
        fewer = operations[:index] + operations[index + 1 :]
        if fails((layers, fewer)):
            operations = fewer
        else:
            index += 1
    return layers, operations


def reproducer(layers: str, operations: list[Operation]) -> str:
    """Text that `scripts/differential --replay FILE` runs."""
    return f"({layers!r}, {pformat(operations, width=110)})\n"
