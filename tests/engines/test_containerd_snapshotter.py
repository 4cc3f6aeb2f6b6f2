"""containerd with our proxy snapshotter: a real containerd and runc, driven by ctr; a container of two layers."""

from __future__ import annotations

import gzip
import hashlib
import io
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
from .test_docker_plugin import end, wait_for

BUSYBOX = Path("/bin/busybox")
UNIONFS = Path(sys.executable).with_name("unionfs")
IMAGE = "example.org/two:1"

pytestmark = [needs("containerd", "ctr", "runc", "busybox"), pytest.mark.timeout(600)]

CONFIG = """
version = 2
root = "{root}/root"
state = "{root}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
[grpc]
  address = "{root}/containerd.sock"
[proxy_plugins]
  [proxy_plugins.unionfs]
    type = "snapshot"
    address = "{root}/snapshotter.sock"
"""


class Containerd:
    def __init__(self, root: Path, driver: str) -> None:
        self.root, self.driver = root, driver
        self.plugin: subprocess.Popen[bytes] | None = None
        self.daemon: subprocess.Popen[bytes] | None = None
        (root / "config.toml").write_text(CONFIG.format(root=root))

    def start_plugin(self) -> None:
        self.plugin = self._start(
            UNIONFS, "plugin", "containerd", "--debug", "--data-root", self.root / "data",
            "--storage-driver", self.driver, "--socket", self.root / "snapshotter.sock",
        )
        wait_for(lambda: harness.answers(self.root / "snapshotter.sock"), self.plugin, self.root / "log")

    def start(self) -> None:
        self.daemon = self._start("containerd", "--config", self.root / "config.toml")
        wait_for(
            lambda: harness.answers(self.root / "containerd.sock") and bool(self("version")),
            self.daemon,
            self.root / "log",
        )

    def _start(self, *argv: str | Path) -> subprocess.Popen[bytes]:
        with (self.root / "log").open("a") as out:
            return subprocess.Popen(
                [str(word) for word in argv], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(self.root)}, start_new_session=True,
            )

    def stop_plugin(self, how: int = signal.SIGTERM) -> None:
        assert self.plugin is not None
        end(self.plugin, how)

    def stop(self, how: int = signal.SIGTERM) -> None:
        assert self.daemon is not None
        end(self.daemon, how)

    def __call__(self, *argv: str | Path) -> str:
        return harness.run("ctr", "--address", self.root / "containerd.sock", "--namespace", "test", *argv)

    def run(self, container: str, script: str, *options: str) -> str:
        return self(
            "run", "--snapshotter", "unionfs", "--null-io" if "--detach" in options else "--net-host", *options,
            IMAGE, container, "/bin/sh", "-ec", script,
        )

    def snapshots(self, *argv: str | Path) -> str:
        return self("snapshots", "--snapshotter", "unionfs", *argv)

    def kinds(self) -> dict[str, tuple[str, str]]:
        """key -> parent, kind"""
        found = {}
        for line in self.snapshots("list").splitlines()[1:]:
            words = line.split()
            found[words[0]] = (words[1] if len(words) == 3 else "", words[-1])
        return found


@pytest.fixture(params=["overlay", "aufs", "row", "vfs"])
def containerd(scratch: Path, request: pytest.FixtureRequest) -> Iterator[Containerd]:
    engine = Containerd(scratch, request.param)
    try:
        engine.start_plugin()
        engine.start()
        archive = image_archive(scratch / "image.tar")
        engine("images", "import", "--snapshotter", "unionfs", archive)
        yield engine
        engine("images", "remove", "--sync", IMAGE)
        assert engine.kinds() == {}
        engine.stop()
        assert list((scratch / "data" / request.param / "layers").iterdir()) == []
        engine.stop_plugin()
    except BaseException:
        print((scratch / "log").read_text()[-8000:])
        raise
    finally:
        for process in (engine.daemon, engine.plugin):
            if process is not None and process.poll() is None:
                end(process, signal.SIGTERM)
    harness.wait_until_clean(scratch)


def layer(*members: tuple[str, bytes | str | None]) -> bytes:
    """A tar: bytes are a file, a string is a hard link, None a directory."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.mode = 0o755
            if content is None:
                info.type = tarfile.DIRTYPE
            elif isinstance(content, str):
                info.type, info.linkname = tarfile.LNKTYPE, content
            else:
                info.size = len(content)
            tar.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return stream.getvalue()


def image_archive(path: Path) -> Path:
    """An OCI archive of two layers; the second deletes a file, hides a directory and changes a file of the first."""
    layers = [
        layer(
            ("bin", None), ("bin/busybox", BUSYBOX.read_bytes()), ("bin/sh", "bin/busybox"), ("tmp", None),
            ("etc", None), ("etc/gone", b"x"), ("etc/changed", b"old"), ("etc/dir", None), ("etc/dir/hidden", b"x"),
        ),
        layer(
            ("etc", None), ("etc/.wh.gone", b""), ("etc/changed", b"new"), ("etc/dir", None),
            ("etc/dir/.wh..wh..opq", b""), ("etc/dir/seen", b"x"),
        ),
    ]  # fmt: skip
    blobs: dict[str, bytes] = {}

    def blob(content: bytes, kind: str) -> dict[str, object]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[f"blobs/sha256/{digest}"] = content
        return {"mediaType": f"application/vnd.oci.image.{kind}", "digest": f"sha256:{digest}", "size": len(content)}

    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)
    config = {
        "architecture": machine, "os": "linux", "config": {"Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(one).hexdigest()}" for one in layers]},
    }  # fmt: skip
    manifest = {
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(json.dumps(config).encode(), "config.v1+json"),
        "layers": [blob(gzip.compress(one, mtime=0), "layer.v1.tar+gzip") for one in layers],
    }  # fmt: skip
    described = blob(json.dumps(manifest).encode(), "manifest.v1+json")
    described["annotations"] = {"io.containerd.image.name": IMAGE, "org.opencontainers.image.ref.name": "1"}
    index = {"schemaVersion": 2, "manifests": [described]}
    with tarfile.open(path, "w") as tar:
        for name, content in {
            "oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": json.dumps(index).encode(), **blobs
        }.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


LOOK = (
    "echo $(busybox cat /etc/changed) $(busybox ls /etc/dir); busybox test ! -e /etc/gone;"
    "busybox grep ' / ' /proc/mounts; echo mine > /mine"
)


def test_import_run_commit_remove(containerd: Containerd) -> None:
    kinds = containerd.kinds()
    assert sorted(kind for _, kind in kinds.values()) == ["Committed", "Committed"]
    (top,) = set(kinds) - {parent for parent, _ in kinds.values()}
    out = containerd.run("first", LOOK)
    assert out.splitlines()[0] == "new seen"
    assert ("fuse.unionfs" in out) == (containerd.driver != "vfs")
    assert containerd.kinds()["first"] == (top, "Active")
    size, inodes = containerd.snapshots("usage", "first").splitlines()[1].split()[-2:]
    assert int(inodes) >= 2 and size

    archive = containerd.root / "diff.tar"
    with archive.open("wb") as out_file:
        subprocess.run(
            ["ctr", "--address", containerd.root / "containerd.sock", "--namespace", "test", "snapshots",
             "--snapshotter", "unionfs", "diff", "first"], stdout=out_file, check=True, timeout=60,
        )  # fmt: skip
    with tarfile.open(archive) as tar:
        assert "mine" in [member.name.strip("/") for member in tar]

    containerd.snapshots("label", "first", "containerd.io/gc.root=1")  # or it goes with the container
    containerd("containers", "delete", "--keep-snapshot", "first")
    containerd.snapshots("commit", "frozen", "first")
    assert containerd.kinds()["frozen"] == (top, "Committed")
    assert "first" not in containerd.kinds()
    containerd.snapshots("prepare", "second", "frozen")
    words = containerd.snapshots("mounts", str(containerd.root / "there"), "second").split()
    (containerd.root / "there").mkdir()
    harness.run(*words)
    try:
        assert (containerd.root / "there" / "mine").read_text() == "mine\n"
        assert not (containerd.root / "there" / "etc" / "gone").exists()
    finally:
        harness.run("umount", containerd.root / "there")
    with pytest.raises(AssertionError, match="cannot remove snapshot with child"):
        containerd.snapshots("remove", "frozen")
    containerd.snapshots("remove", "second")
    containerd.snapshots("remove", "frozen")


@pytest.mark.parametrize("containerd", ["overlay"], indirect=True)
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_restarts_under_a_running_container(containerd: Containerd, how: int) -> None:
    script = "trap 'exit 0' TERM; while echo x >> /on; do busybox sleep 0.1; done"
    containerd.run("running", script, "--detach")
    merged = Path(containerd.snapshots("mounts", "/nowhere", "running").split()[3])
    wait_for(lambda: (merged / "on").exists())
    containerd.stop(how)
    containerd.stop_plugin(how)
    size = (merged / "on").stat().st_size
    wait_for(lambda: (merged / "on").stat().st_size > size)
    containerd.start_plugin()
    containerd.start()
    assert "RUNNING" in containerd("tasks", "list")
    assert containerd("tasks", "exec", "--exec-id", "look", "running", "/bin/busybox", "tail", "-n1", "/on") == "x"
    assert containerd.run("other", "busybox cat /etc/changed", "--rm") == "new"
    containerd("tasks", "kill", "--signal", "SIGKILL", "running")
    wait_for(lambda: "STOPPED" in containerd("tasks", "list"))
    containerd("tasks", "delete", "running")
    containerd("containers", "delete", "running")
    assert "running" not in containerd.kinds()


def test_setup_prints_what_the_tests_use(scratch: Path) -> None:
    printed = harness.run(UNIONFS, "setup", "containerd", "--socket", f"{scratch}/snapshotter.sock")
    (scratch / "config.toml").write_text(f"version = 2\n{printed}")
    dumped = harness.run("containerd", "--config", scratch / "config.toml", "config", "dump")
    assert f'address = "{scratch}/snapshotter.sock"' in dumped
    assert shutil.which(printed.split("plugin containerd")[0].split()[-1])
