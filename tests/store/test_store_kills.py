"""Killed at any point, a store loses no committed layer, and cleanup leaves nothing of what was being done.

UNIONFS_STORE_KILLS sets how often (default 20 in all); scripts/stress-store does it 200 times.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from unionfs.store import servers
from unionfs.store.images import Images
from unionfs.store.layers import LayerStore

from .conftest import Opener
from .kill_worker import content
from .test_image_verbs import BASE, SECOND, layout

WORKER = Path(__file__).with_name("kill_worker.py")
KILLS = int(os.environ.get("UNIONFS_STORE_KILLS", "20"))
LONGEST = 0.5  # seconds of work before a kill

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting needs root"),
    pytest.mark.timeout(60 + 10 * KILLS),
]


def work_until_killed(root: Path, driver: str, seed: str, source: str, after: float) -> list[str]:
    """What the worker had said when it was killed."""
    process = subprocess.Popen([sys.executable, WORKER, root, driver, seed, source], stdout=subprocess.PIPE)
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == b"ready\n"
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        return process.stdout.read().decode().splitlines()


def check(store: LayerStore, must: set[str], may: set[str], images: set[str]) -> None:
    store.cleanup()
    assert store.fsck() == []
    there = {layer.id: layer for layer in store.layers()}
    lost = must - set(there)
    assert not lost, f"lost: {lost}"
    for id in must:
        layer = there[id]
        assert layer.kind == "committed" and layer.diff_id
        lowers, _, _ = store.branches(id)
        assert Path(lowers[0], id).read_bytes() == content(id)
    named = {image.name for image in Images(store).all()}
    assert images <= named
    for image in named:
        Images(store).history(image)  # its layers are there, all
    # what was in the middle of something is an active layer, which is its owner's to remove, or was garbage
    for id, layer in reversed(there.items()):
        if layer.kind == "active":
            store.release(id)
            store.remove(id)
        else:
            assert id in must | may or len(id) == 64, id
    assert servers.mountpoints(store.home) == set()
    rows = store.db.rows("SELECT directory FROM layers")
    assert set(os.listdir(os.path.join(store.home, "layers"))) == {row["directory"] for row in rows}


@pytest.mark.parametrize(("driver", "share"), [("overlay", 0.6), ("row", 0.2), ("vfs", 0.2)])
def test_no_committed_layer_is_lost(open_layers: Opener, tmp_path: Path, driver: str, share: float) -> None:
    source = layout(tmp_path / "in", BASE, SECOND)
    chance = random.Random(7)
    must: set[str] = set()
    may: set[str] = set()  # removals that were asked for
    done = 0
    for kill in range(max(1, round(KILLS * share))):
        said = work_until_killed(tmp_path / "data", driver, f"{driver}{kill}", source, chance.uniform(0, LONGEST))
        finished = {line[5:] for line in said if line.startswith("done ")}
        going = {line[6:] for line in said if line.startswith("going ")}
        done += len(finished)
        images = {name for name in finished - going if name[0] == "i"}
        may |= {id for id in going if id[0] == "k"}
        must |= {id for id in finished if id[0] == "k"}
        must -= may
        with open_store(open_layers, driver) as store:
            # what a kill caught between its commit and its line is committed without anybody having been told
            may |= {layer.id for layer in store.layers() if layer.id[0] == "k"} - must
            check(store, must, may, images)
    assert done > 0
    with open_store(open_layers, driver) as store:
        for image in Images(store).all():
            Images(store).remove(image.name)
        for layer in reversed(store.layers()):
            store.remove(layer.id)
        assert store.layers() == [] and os.listdir(os.path.join(store.home, "layers")) == [] and store.fsck() == []


class open_store:
    """The store of a killed worker: its lock went with it."""

    def __init__(self, opener: Opener, driver: str) -> None:
        self._store = opener(driver)

    def __enter__(self) -> LayerStore:
        return self._store

    def __exit__(self, *error: object) -> None:
        self._store.close()
