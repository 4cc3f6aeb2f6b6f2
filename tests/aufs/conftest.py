"""The fixture `aufs`: unions of the aufs driver below one directory, gone at the end."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aufs.harness import Aufs


@pytest.fixture(params=["direct", "pyfuse3"])
def session(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def make_aufs(workspace: Path) -> Iterator[Callable[..., Aufs]]:
    made: list[Aufs] = []

    def make(**how: str) -> Aufs:
        made.append(Aufs(Path(tempfile.mkdtemp(dir=workspace)), **how))
        return made[-1]

    try:
        yield make
        for union in made:
            if union.process is not None:
                union.umount()
    finally:
        for union in made:
            union.discard()
