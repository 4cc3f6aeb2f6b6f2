"""The btrfs driver, on a loop-mounted filesystem: subvolume snapshots."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from unionfs.store.api import Change, Unsupported
from unionfs.store.containers import Containers
from unionfs.store.images import Images
from unionfs.store.layers import LayerStore

from .conftest import Opener, archive


@pytest.fixture(scope="module")
def btrfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("a loop mount needs root")
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("mkfs.btrfs: install btrfs-progs")
    where = tmp_path_factory.mktemp("btrfs")
    with open(where / "image", "wb") as stream:
        stream.truncate(256 << 20)
    (where / "mounted").mkdir()
    subprocess.run(["mkfs.btrfs", "-q", where / "image"], check=True, timeout=60)
    subprocess.run(["mount", "-o", "loop", where / "image", where / "mounted"], check=True, timeout=60)
    try:
        yield where / "mounted"
    finally:
        subprocess.run(["umount", "-l", where / "mounted"], check=True, timeout=60)


@pytest.fixture
def store(btrfs: Path, tmp_path: Path) -> Iterator[LayerStore]:
    opened = LayerStore(str(btrfs / tmp_path.name), "btrfs", {"sync": "off"})
    yield opened
    opened.close()


def test_snapshots(store: LayerStore) -> None:
    store.create("base")
    store.apply("base", archive(("etc/", None), ("etc/a", b"1"), ("etc/b", b"2"), ("big", b"x" * (4 << 20))))
    store.commit("base", "base")
    path = store.branches("base")[0][0]
    with pytest.raises(OSError, match="Read-only"):
        Path(path, "new").write_text("")
    store.create("c", "base")
    tree = Path(store.get("c"))
    (tree / "etc/c").write_text("3")
    (tree / "etc/a").unlink()
    assert store.changes("c") == [Change("/etc", 0), Change("/etc/a", 2), Change("/etc/c", 1)]
    assert store.usage("c").size < 1 << 20  # the rest is shared
    with tarfile.open(fileobj=io.BytesIO(b"".join(store.diff("c")))) as tar:
        assert tar.getnames() == ["etc", "etc/.wh.a", "etc/c"]
    subprocess.run(["btrfs", "-q", "subvolume", "create", tree / "inner"], check=True)  # a container may do that
    (tree / "inner/f").write_text("x")
    store.put("c")
    store.create("v", "base", kind="view")
    with pytest.raises(OSError, match="Read-only"):
        Path(store.get("v"), "new").write_text("")
    store.put("v")
    for id in ("v", "c", "base"):
        store.remove(id)
    assert store.fsck() == [] and os.listdir(os.path.join(store.home, "layers")) == []
    assert dict(store.status())["Backing Filesystem"] == "btrfs"


def test_images(store: LayerStore, tmp_path: Path) -> None:
    images = Images(store)
    containers = Containers(store, images)
    images.import_tar(archive(("bin/", None), ("bin/sh", b"s")), "base")
    tree = Path(store.get(containers.create("base", "c").layer))
    (tree / "new").write_text("n")
    containers.commit("c", "next")
    images.save("next", f"oci:{tmp_path}/out")
    (image,) = images.load(f"oci:{tmp_path}/out", "back")
    with tarfile.open(fileobj=io.BytesIO(b"".join(store.diff(image.layer, "")))) as tar:
        assert tar.getnames() == ["bin", "bin/sh", "new"]


def test_cleanup_of_a_half_made_subvolume(store: LayerStore) -> None:
    stray = os.path.join(store.home, "layers", "0123456789ab")
    os.mkdir(stray)
    store.backend.make(stray, None, readonly=False)
    assert store.cleanup() == [stray] and not os.path.exists(stray)


def test_elsewhere_it_is_refused(open_layers: Opener) -> None:
    with pytest.raises(Unsupported, match="not on btrfs"):
        open_layers("btrfs")
