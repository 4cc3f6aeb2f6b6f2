"""The daemon is killed, or replaced, while it works: what it has acknowledged holds, and mounts go on serving.

UNIONFS_KILLS=200 and UNIONFS_CONTAINERS=100 make the long forms; CI runs short ones.
"""

from __future__ import annotations

import io
import os
import random
import signal
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from daemon_harness import Daemon, mounts_below, tar_of, wait_until

from unionfs.daemon.client import Client
from unionfs.errors import MountError
from unionfs.store.api import StoreError

KILLS = int(os.environ.get("UNIONFS_KILLS", "6"))
CONTAINERS = int(os.environ.get("UNIONFS_CONTAINERS", "24"))
WORKERS = 6


class Load:
    """Layers made and removed over REST by several threads; remembers what was acknowledged, until the daemon dies."""

    def __init__(self, host: str, number: int) -> None:
        self._host = host
        self._number = number
        self.committed: dict[str, bytes] = {}  # acknowledged
        self.mounted: dict[str, Path] = {}
        self.surprises: list[str] = []
        self._lock = threading.Lock()

    def work(self, worker: int) -> None:
        client = Client(self._host)
        dice = random.Random(self._number * 100 + worker)
        try:
            for step in range(10_000):
                self._step(client, dice, f"r{self._number}-w{worker}-{step}")
        except MountError:
            pass  # the daemon is dead
        except StoreError as error:
            if error.status != 502:  # it died in the middle of an answer
                self.surprises.append(str(error))

    def _step(self, client: Client, dice: random.Random, id: str) -> None:
        content = dice.randbytes(dice.choice((10, 5_000, 200_000)))
        with self._lock:
            parent = dice.choice(["base", *self.committed])
        client.call("POST", "/layers", {"id": f"{id}-key", "parent": parent})
        client.send("PUT", f"/layers/{id}-key/content", [tar_of({"file": content})])
        client.call("POST", f"/layers/{id}-key/commit", {"new_id": id})
        with self._lock:
            self.committed[id] = content
        if dice.random() < 0.3:
            client.call("POST", "/layers", {"id": f"{id}-box", "parent": id})
            path = Path(client.call("POST", f"/layers/{id}-box/mount")["path"])
            with self._lock:
                self.mounted[f"{id}-box"] = path
            if dice.random() < 0.7:
                with self._lock:
                    del self.mounted[f"{id}-box"]
                client.call("DELETE", f"/layers/{id}-box/mount")
                client.call("DELETE", f"/layers/{id}-box")


def file_in(tar: bytes) -> bytes:
    with tarfile.open(fileobj=io.BytesIO(tar)) as archive:
        member = archive.extractfile("file")
        assert member is not None
        return member.read()


def test_killed_at_random_under_load(daemon: Daemon) -> None:
    daemon.start()
    daemon.layer("base", {"file": b"base"})
    dice = random.Random(7)
    held: dict[str, bytes] = {}
    serving: dict[str, Path] = {}
    for number in range(KILLS):
        load = Load(daemon.host, number)
        with ThreadPoolExecutor(WORKERS) as pool:
            for worker in range(WORKERS):
                pool.submit(load.work, worker)
            time.sleep(dice.uniform(0.02, 0.6))
            daemon.stop(signal.SIGKILL)
        assert load.surprises == []
        serving.update(load.mounted)
        for path in serving.values():  # while no daemon runs
            assert (path / "file").stat().st_size > 0
        daemon.start()
        held.update(load.committed)
        there = {layer["id"]: layer["kind"] for layer in daemon.curl("/layers").json}
        for id in held:
            assert there.get(id) == "committed", f"{id} was acknowledged and is lost"
        for id, content in load.committed.items():
            assert file_in(daemon.curl(f"/layers/{id}/diff").body) == content
        found = {mount["id"]: mount["path"] for mount in daemon.curl("/mounts").json}
        for id, path in serving.items():
            assert found.get(id) == str(path)
            assert (path / "file").read_bytes()
        repaired = daemon.post("/fsck?repair=true").json  # half-made layers, and directories of those in work
        assert not [line for line in repaired if line.endswith("is gone")]
        assert daemon.post("/fsck").json == []
        if number % 10 == 9:  # else the long form would mostly look at what it made before
            clear(daemon)
            daemon.layer("base", {"file": b"base"})
            held, serving = {}, {}
    clear(daemon)


def clear(daemon: Daemon) -> None:
    """Everything goes over the API, and nothing stays on disk or mounted."""
    for mount in daemon.curl("/mounts").json:
        assert daemon.curl(f"/layers/{mount['id']}/mount?all=true", "-X", "DELETE").status == 204
    client = Client(daemon.host)
    for layer in reversed(client.call("GET", "/layers")):
        client.call("DELETE", f"/layers/{layer['id']}")
    client.call("POST", "/cleanup")
    assert client.call("POST", "/fsck") == []
    assert os.listdir(daemon.root / "overlay" / "layers") == []
    wait_until("nothing is mounted", lambda: not mounts_below(daemon.root))


def test_many_containers_at_once(running: Daemon) -> None:
    running.layer("base", {f"etc/{number}": b"x" * 100 for number in range(50)})

    def contain(number: int) -> None:
        client = Client(running.host)
        id = f"box{number}"
        client.call("POST", "/layers", {"id": id, "parent": "base"})
        tree = Path(client.call("POST", f"/layers/{id}/mount")["path"])
        assert len(os.listdir(tree / "etc")) == 50
        (tree / "etc/mine").write_text(id)
        both.wait(120)  # all are mounted at one time
        assert (tree / "etc/mine").read_text() == id
        client.call("DELETE", f"/layers/{id}/mount")
        kinds = {change["path"]: change["kind"] for change in client.call("GET", f"/layers/{id}/changes")}
        assert kinds["/etc/mine"] == 1
        client.call("DELETE", f"/layers/{id}")

    both = threading.Barrier(CONTAINERS)
    with ThreadPoolExecutor(CONTAINERS) as pool:
        list(pool.map(contain, range(CONTAINERS)))
    assert [layer["id"] for layer in running.curl("/layers").json] == ["base"]
    clear(running)


def test_a_download_that_the_client_leaves(running: Daemon) -> None:
    running.layer("base", {"file": os.urandom(8 << 20)})
    for _ in range(3):
        stream = Client(running.host).receive("/layers/base/diff")
        assert len(next(stream)) > 0
        stream.close()  # type: ignore[attr-defined]
    assert running.curl("/layers/base", "-X", "DELETE").status == 204


def test_an_upload_that_breaks_off(running: Daemon) -> None:
    """What was half unpacked can be removed; the next attempt works."""
    running.post("/layers", {"id": "key"})
    whole = tar_of({"file": os.urandom(4 << 20)})

    def half() -> object:
        yield whole[: 1 << 20]
        raise KeyboardInterrupt

    try:
        Client(running.host).send("PUT", "/layers/key/content", half())  # type: ignore[arg-type]
    except KeyboardInterrupt:
        pass
    wait_until("the daemon has let go", lambda: running.curl("/layers/key", "-X", "DELETE").status == 204)
    running.post("/layers", {"id": "key"})
    assert running.put_tar("/layers/key/content", whole).status == 200
    assert running.post("/fsck").json == []
