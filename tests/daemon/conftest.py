"""Fixtures: `daemon` (not started), `running`, and `rest`, one that tests share which leave it as it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from daemon_harness import Daemon


@contextmanager
def made(workspace: Path) -> Iterator[Daemon]:
    base = workspace / f"daemon-{os.urandom(4).hex()}"
    base.mkdir()
    daemon = Daemon(base)
    try:
        yield daemon
    finally:
        daemon.clean_up()
        shutil.rmtree(base, ignore_errors=True)


@pytest.fixture
def daemon(workspace: Path) -> Iterator[Daemon]:
    with made(workspace) as daemon:
        yield daemon


@pytest.fixture
def running(daemon: Daemon) -> Daemon:
    daemon.start()
    return daemon


@pytest.fixture(scope="session")
def rest(workspace: Path) -> Iterator[Daemon]:
    with made(workspace) as daemon:
        daemon.start()
        yield daemon
