"""One `unionfs daemon` that serves REST, a real dockerd and a real containerd from one store at the same time."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import harness
from .conftest import needs
from .test_docker import release_data_root
from .test_docker_plugin import SOCKET, Docker, end, plugin_socket, wait_for

__all__ = ["plugin_socket"]  # the fixture

pytestmark = [
    needs("dockerd", "docker", "containerd", "ctr", "runc", "skopeo", "curl", "busybox"),
    pytest.mark.timeout(300),
]

UNIONFS = Path(sys.executable).with_name("unionfs")
CONFIG = """\
version = 2
root = "{root}/containerd/root"
state = "{root}/containerd/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "{root}/containerd.sock"
[proxy_plugins.unionfs]
type = "snapshot"
address = "{root}/snapshots.sock"
"""


class Served(Docker):
    """A dockerd whose plugin is the daemon, and a containerd whose snapshotter is."""

    def start_plugin(self, *arguments: str | Path) -> None:
        with (self.root / "plugin-log").open("a") as out:
            self.plugin = subprocess.Popen(
                [
                    UNIONFS, "daemon", "-H", f"unix://{self.root}/rest.sock", "--data-root", f"{self.root}/store",
                    "--docker-plugin", SOCKET, "--containerd-snapshotter", f"{self.root}/snapshots.sock", *arguments,
                ],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        sockets = (SOCKET, self.root / "rest.sock", self.root / "snapshots.sock")
        wait_for(lambda: all(map(harness.answers, sockets)), self.plugin, self.root / "plugin-log")

    def start_containerd(self) -> None:
        (self.root / "containerd.toml").write_text(CONFIG.format(root=self.root))
        with (self.root / "containerd-log").open("a") as out:
            self.containerd = subprocess.Popen(
                ["containerd", "--config", self.root / "containerd.toml"],
                env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        wait_for(lambda: "unionfs" in self.ctr("plugins", "ls"), self.containerd, self.root / "containerd-log")

    def ctr(self, *argv: str | Path) -> str:
        return harness.run("ctr", "--address", self.root / "containerd.sock", "--namespace", "test", *argv)

    def unionfs(self, *argv: str | Path) -> str:
        return harness.run(UNIONFS, "-H", f"unix://{self.root}/rest.sock", *argv)


@pytest.fixture
def served(scratch: Path, plugin_socket: None) -> Iterator[Served]:
    served = Served(scratch)
    try:
        served.start_plugin()
        served.start()
        served.start_containerd()
        yield served
        served.stop()
        end(served.containerd, signal.SIGTERM)
        served.stop_plugin()
    finally:
        for process in (served.daemon, getattr(served, "containerd", None), served.plugin):
            if process is not None and process.poll() is None:
                end(process, signal.SIGTERM)
    release_data_root(scratch / "data")
    harness.wait_until_clean(scratch)


@pytest.fixture
def busybox(scratch: Path) -> Path:
    """The tar of a tree with busybox alone."""
    tree = scratch / "tree"
    (tree / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", tree / "bin/busybox")
    for name in ("sh", "cat", "echo"):
        (tree / "bin" / name).symlink_to("busybox")
    with tarfile.open(scratch / "tree.tar", "w") as tar:
        tar.add(tree, ".")
    return scratch / "tree.tar"


def test_docker_containerd_and_people_at_one_daemon(served: Served, busybox: Path, tmp_path: Path) -> None:
    served("import", busybox, "busybox:1")
    assert served.run("busybox:1", "echo by docker >/new; cat /new", "--name", "box") == "by docker"
    served("commit", "box", "busybox:2")

    served.unionfs("image", "import", busybox, "busybox:1")
    served.unionfs("save", "busybox:1", f"oci:{tmp_path}/layout:1")
    archive = tmp_path / "archive.tar"
    name = "docker.io/library/busybox:1"
    source = f"oci:{tmp_path}/layout:1"
    harness.run("skopeo", "--insecure-policy", "copy", source, f"docker-archive:{archive}:{name}")
    served.ctr("images", "import", "--snapshotter", "unionfs", archive)
    run = ["run", "--rm", "--snapshotter", "unionfs", name]
    assert served.ctr(*run, "one", "/bin/sh", "-c", "echo by containerd >/new; cat /new") == "by containerd"

    info = json.loads(served.unionfs("info", "--json"))
    assert info["images"] == 1  # each engine keeps its own names; the layers are in one store
    assert info["layers"] >= 6
    request = ["curl", "-sS", "--unix-socket", served.root / "rest.sock"]
    text = harness.run(*request, "http://localhost/metrics")
    assert 'unionfs_store_seconds_count{operation="create"}' in text
    events = harness.run(*request, "http://localhost/events?since=0&until=9999999999", "--max-time", "2", check=False)
    assert {"create", "apply", "mount", "commit"} <= {json.loads(line)["action"] for line in events.splitlines()}

    # The daemon is killed under both: containers that run go on, and the next daemon serves them.
    served.run("busybox:2", "busybox sleep 600", "--detach", "--name", "long")
    root = Path("/proc", served("inspect", "--format", "{{.State.Pid}}", "long"), "root")
    served.stop_plugin(signal.SIGKILL)
    assert (root / "new").read_text() == "by docker\n"
    (root / "meanwhile").write_text("by hand\n")
    served.start_plugin()
    assert served("exec", "long", "sh", "-c", "echo after >/after; cat /after /meanwhile").split() == [
        "after",
        "by",
        "hand",
    ]
    assert served.run("busybox:2", "cat /new", "--rm") == "by docker"
    # containerd takes its time to connect anew: until then it says "connection closed: unavailable"
    wait_for(lambda: "KEY" in served.ctr("snapshots", "--snapshotter", "unionfs", "ls"))
    assert served.ctr(*run, "two", "/bin/sh", "-c", "echo again") == "again"

    served("rm", "--force", "box", "long")
    served("rmi", "busybox:1", "busybox:2")
    served.unionfs("rmi", "busybox:1")
    served.ctr("images", "rm", "--sync", name)
    wait_for(lambda: json.loads(served.unionfs("info", "--json"))["layers"] == 0)
    assert os.listdir(served.root / "store/overlay/layers") == []


def test_dockerd_may_not_choose_for_the_daemon(scratch: Path, plugin_socket: None) -> None:
    served = Served(scratch)
    served.start_plugin()
    try:
        request = ["curl", "-sS", "--unix-socket", SOCKET, "-d", '{"Home": "/x", "Opts": ["driver=row"]}']
        answer = harness.run(*request, "http://localhost/GraphDriver.Init")
        assert "the store is the daemon's, with driver overlay" in json.loads(answer)["Err"]
    finally:
        served.stop_plugin()


def test_socket_in_use_is_told(scratch: Path) -> None:
    (scratch / "taken").write_text("mine")
    for option in ("--docker-plugin", "--containerd-snapshotter"):
        words = [UNIONFS, "daemon", "-H", f"unix://{scratch}/rest.sock", "--data-root", scratch / "store"]
        done = subprocess.run([*words, option, scratch / "taken"], capture_output=True, text=True, timeout=60)
        assert done.returncode == 1
        assert f"daemon: {option} {scratch}/taken: something that is not a socket is there" in done.stderr
        assert (scratch / "taken").read_text() == "mine"
        assert not (scratch / "rest.sock").exists()
