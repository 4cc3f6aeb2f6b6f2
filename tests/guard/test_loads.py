"""The short form of scripts/stress: workers are killed at random times under each load."""

from __future__ import annotations

from pathlib import Path

import pytest
from loads import LOADS, kill_under

KILLS = 20
# Each load once, the drivers in turn; scripts/stress runs all of them with all drivers.
CHOSEN = [
    ("compile", "overlay"), ("git", "aufs"), ("io", "row"), ("sqlite", "overlay"), ("names", "aufs"),
    ("names", "overlay"), ("snapshots", "row"), ("branches", "aufs"),
]  # fmt: skip


def test_every_load_is_chosen() -> None:
    assert {name for name, _ in CHOSEN} == set(LOADS)


@pytest.mark.parametrize(("name", "driver"), CHOSEN)
def test_kills_under_load(tmp_path: Path, name: str, driver: str) -> None:
    assert len(kill_under(tmp_path, name, driver, KILLS, (0.05, 0.2))) == KILLS
