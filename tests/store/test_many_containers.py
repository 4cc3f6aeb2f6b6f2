"""Many containers of one image at once: all work, each costs little memory, and nothing is left of them.

UNIONFS_STORE_CONTAINERS sets how many (default 20); scripts/stress-store takes 100. The figures go to standard output.
"""

from __future__ import annotations

import os
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from unionfs.store import servers
from unionfs.store.containers import Containers
from unionfs.store.images import Images

from .conftest import Opener
from .test_image_verbs import run

COUNT = int(os.environ.get("UNIONFS_STORE_CONTAINERS", "20"))
MOST = 12 << 20  # bytes of our processes for each container

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="mounting and chroot need root"),
    pytest.mark.timeout(60 + 5 * COUNT),
]


def memory(pid: int) -> int:
    """Proportional set size: shared pages are divided among those who have them."""
    with open(f"/proc/{pid}/smaps_rollup") as stream:
        for line in stream:
            if line.startswith("Pss:"):
                return int(line.split()[1]) << 10
    raise AssertionError("no Pss")


def servers_of(store_home: str) -> dict[int, str]:
    """Our serving processes whose mounts are below the store: pid → mountpoint."""
    from unionfs.front import control
    from unionfs.front.mounts import fuse_mounts

    return {
        control.ask(mount, "ping", 30)["pid"]: os.fsdecode(mount.path)
        for mount in fuse_mounts()
        if os.fsdecode(mount.path).startswith(store_home + "/")
    }


def test_many_containers_of_one_image(open_layers: Opener, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "bin").mkdir(parents=True)
    (tree / "etc").mkdir()
    (tree / "tmp").mkdir()
    (tree / "etc/passwd").write_text("root:x:0:0::/:/bin/sh\n")
    run("cp", "/bin/busybox", tree / "bin/busybox")
    for name in ("sh", "ls", "cat"):
        os.link(tree / "bin/busybox", tree / "bin" / name)
    run("tar", "-C", tree, "-cf", tmp_path / "tree.tar", ".")
    store = open_layers("overlay")
    images = Images(store)
    containers = Containers(store, images)
    with open(tmp_path / "tree.tar", "rb") as stream:
        images.import_tar(stream, "base")

    def one(number: int) -> tuple[str, str]:
        container = containers.create("base", f"c{number}")
        path = store.get(container.layer)
        script = f"echo {number} > /etc/mine; cat /etc/mine /etc/passwd; ls / | cat -n > /tmp/l"
        done = subprocess.run(["chroot", path, "/bin/sh", "-c", script], capture_output=True, text=True, timeout=120)
        return path, done.stdout + done.stderr

    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(one, range(COUNT)))
    took = time.monotonic() - started
    for number, (path, said) in enumerate(results):
        assert said == f"{number}\nroot:x:0:0::/:/bin/sh\n", path
    assert len(store.mounted()) == COUNT
    serving = servers_of(store.home)
    assert len(serving) == COUNT
    zygote = store._servers._process
    assert zygote is not None
    total = sum(memory(pid) for pid in (*serving, zygote.pid))
    print(f"{COUNT} containers in {took:.1f} s, {total / COUNT / (1 << 20):.1f} MiB of ours each")
    assert total / COUNT <= MOST
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: containers.remove(f"c{number}", force=True), range(COUNT)))
    images.remove("base")
    assert store.layers() == [] and os.listdir(os.path.join(store.home, "layers")) == []
    assert servers.mountpoints(store.home) == set() and store.fsck() == []
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in serving):  # or reused by then, which the deadline shows
        assert time.monotonic() < deadline
        time.sleep(0.1)
