"""Fixtures: `daemon` (not started), `running`, and `rest`, one that tests share which leave it as it was."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from daemon_harness import Daemon, made


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
