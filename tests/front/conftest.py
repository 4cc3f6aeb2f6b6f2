"""`place` and `user`: see support/commands.py."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import Place, User


@pytest.fixture
def place(workspace: Path, request: pytest.FixtureRequest) -> Iterator[Place]:
    base = workspace / f"front-{request.function.__name__}-{os.urandom(3).hex()}"
    base.mkdir()
    place = Place(base)
    yield place
    place.clean_up()
    shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def user(place: Place) -> User:
    user = User(place.base)
    for path in (place.upper, place.work, place.merged):
        os.chown(path, user.uid, user.gid)
    return user
