"""Docker with our graph driver plugin: dockerd finds it by its socket, as on a user's machine."""

from __future__ import annotations

import fcntl
import http.client
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from . import harness
from .conftest import needs
from .test_docker import client, release_data_root

pytestmark = [needs("dockerd", "docker", "containerd", "runc", "debootstrap"), pytest.mark.timeout(600)]

SOCKET = Path("/run/docker/plugins/unionfs.sock")
UNIONFS = Path(sys.executable).with_name("unionfs")


class Docker:
    """A dockerd with its plugin, each of which can be restarted."""

    def __init__(self, root: Path, *options: str) -> None:
        self.root = root
        self.options = options
        self.log = root / "log"
        self.env = {
            **os.environ,
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "DOCKER_HOST": f"unix://{root}/socket",
            "DOCKER_CONFIG": str(root / "client"),
            "DOCKER_BUILDKIT": "0",
            "TMPDIR": str(root),
        }
        self.plugin: subprocess.Popen[bytes] | None = None
        self.daemon: subprocess.Popen[bytes] | None = None

    def __call__(self, *argv: str | Path) -> str:
        return harness.run(client(), *argv, env=self.env)

    def run(self, image: str, script: str, *options: str) -> str:
        return self("run", "--network=none", "--pull=never", *options, image, "sh", "-ec", script)

    def start_plugin(self, *arguments: str | Path) -> None:
        with (self.root / "plugin-log").open("a") as out:
            self.plugin = subprocess.Popen(
                [UNIONFS, "plugin", "docker", "--debug", *arguments],
                stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )
        wait_for(lambda: harness.answers(SOCKET), self.plugin, self.root / "plugin-log")

    def stop_plugin(self, how: int = signal.SIGTERM) -> None:
        assert self.plugin is not None
        end(self.plugin, how)

    def start(self) -> None:
        with self.log.open("a") as out:
            self.daemon = subprocess.Popen(
                [
                    "dockerd", "--experimental", "--storage-driver=unionfs", "--iptables=false", "--ip6tables=false",
                    "--bridge=none", f"--data-root={self.root}/data", f"--exec-root={self.root}/exec",
                    f"--pidfile={self.root}/pid", f"--host=unix://{self.root}/socket", *self.options,
                ],
                env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )
        wait_for(lambda: harness.answers(self.root / "socket") and bool(self("version")), self.daemon, self.log)

    def stop(self, how: int = signal.SIGTERM) -> None:
        assert self.daemon is not None
        pid = self.root / "exec" / "containerd" / "containerd.pid"
        containerd = int(pid.read_text())
        end(self.daemon, how)
        if how == signal.SIGKILL:  # the containerd that dockerd started outlives it, and the next can't talk to it
            os.kill(containerd, how)
            wait_for(lambda: not Path(f"/proc/{containerd}").exists())
            pid.unlink()

    @property
    def layers(self) -> int:
        """How many the driver has, from its lines in `docker info`."""
        status = json.loads(self("info", "--format", "{{json .DriverStatus}}"))
        return int(dict(status)["Layers"])


def wait_until_empty(docker: Docker) -> None:
    """dockerd may take a moment to let go of what it has just removed."""
    deadline = time.monotonic() + 15
    while docker.layers and time.monotonic() < deadline:
        time.sleep(0.2)
    assert docker.layers == 0


def end(process: subprocess.Popen[bytes], how: int) -> None:
    process.send_signal(how)
    try:
        process.wait(60)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        raise AssertionError(f"{process.args!r} did not stop") from None


def wait_for(
    condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None, log: Path = Path("/dev/null")
) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            if condition():
                return
        except AssertionError:
            pass
        assert (process is None or process.poll() is None) and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


@pytest.fixture
def plugin_socket() -> Iterator[None]:
    """The one place where dockerd looks for the plugin of this name is ours while the test runs."""
    SOCKET.parent.mkdir(parents=True, exist_ok=True)
    with open(SOCKET.parent / "unionfs-test.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        SOCKET.with_suffix(".sock.init").unlink(missing_ok=True)
        assert not harness.answers(SOCKET), f"a plugin serves {SOCKET} already: stop it to run these tests"
        yield


@pytest.fixture
def docker(scratch: Path, plugin_socket: None, debian: Path, request: pytest.FixtureRequest) -> Iterator[Docker]:
    """A parameter is the plugin's command line."""
    docker = Docker(scratch)
    try:
        docker.start_plugin(*getattr(request, "param", ()))
        docker.start()
        yield docker
        for container in docker("ps", "--all", "--quiet").split():
            docker("rm", "--force", container)
        docker("system", "prune", "--all", "--force")
        wait_until_empty(docker)
        docker.stop()
        docker.stop_plugin()
    finally:
        for process in (docker.daemon, docker.plugin):
            if process is not None and process.poll() is None:
                end(process, signal.SIGTERM)
    release_data_root(scratch / "data")
    harness.wait_until_clean(scratch)


def changes_of(docker: Docker, container: str) -> set[str]:
    return set(docker("diff", container).splitlines())


DRIVERS = [["--storage-driver", driver] for driver in ("overlay", "aufs", "row", "vfs")]


@pytest.mark.parametrize("docker", DRIVERS, indirect=True, ids=lambda words: words[1])
def test_import_run_diff_commit(docker: Docker, debian: Path, request: pytest.FixtureRequest) -> None:
    info = docker("info")
    driver = request.node.callspec.params["docker"][1]
    assert "Storage Driver: unionfs" in info
    assert f"Driver: {driver}" in info
    docker("import", debian, "base:1")
    out = docker.run(
        "base:1",
        "grep ' / ' /proc/mounts; apt-get install -y /opt/debs/*.deb >/tmp/log 2>&1 || { cat /tmp/log; exit 1; };"
        "rm /etc/debian_version; rm -r /etc/default; mkdir /etc/default; touch /etc/default/only",
        "--name", "first",
    )
    root_mount = next(line for line in out.splitlines() if line.split()[1:2] == ["/"])
    assert (root_mount.split()[2] == "fuse.unionfs") == (driver != "vfs"), root_mount
    changes = changes_of(docker, "first")
    assert {"D /etc/debian_version", "A /usr/bin/less", "A /etc/default/only"} <= changes
    assert not any(line.startswith("C /bin") for line in changes)
    docker("commit", "first", "second:1")
    out = docker.run(
        "second:1",
        "dpkg --verify less cpio libsigsegv2; less --version | head -1; ls /etc/default; test ! -e /etc/debian_version",
        "--rm",
    )
    assert (out.split()[0], out.split()[-1]) == ("less", "only")


def build(docker: Docker) -> None:
    context = docker.root / "context"
    context.mkdir()
    (context / "data").write_text("one\n")
    (context / "Dockerfile").write_text(
        "FROM base:1\n"
        "COPY data /data\n"
        "RUN echo two >> /data && rm /etc/debian_version && chmod 700 /srv && ln /data /same\n"
        "RUN rm -r /etc/default && mkdir /etc/default && touch /etc/default/only && mv /etc/security /etc/moved\n"
    )
    docker("build", "--network=none", "--tag", "built:1", context)


def check_built(docker: Docker, image: str) -> None:
    out = docker.run(
        image,
        "cat /data; ls /etc/default; stat -c %a /srv; ls /etc/moved/limits.conf; stat -c %h /same;"
        "test ! -e /etc/debian_version; test ! -e /etc/security",
        "--rm",
    )
    assert out.split() == ["one", "two", "only", "700", "/etc/moved/limits.conf", "2"]


def test_build_save_load(docker: Docker, debian: Path) -> None:
    docker("import", debian, "base:1")
    build(docker)
    check_built(docker, "built:1")
    layers = docker("inspect", "--format", "{{json .RootFS.Layers}}", "built:1")
    archive = docker.root / "saved.tar"
    docker("save", "--output", archive, "built:1", "base:1")
    docker("rmi", "--force", "built:1", "base:1")
    docker("system", "prune", "--all", "--force")
    wait_until_empty(docker)
    docker("load", "--input", archive)
    assert docker("inspect", "--format", "{{json .RootFS.Layers}}", "built:1") == layers
    check_built(docker, "built:1")


def test_sizes_metadata_and_removal(docker: Docker, debian: Path) -> None:
    docker("import", debian, "base:1")
    before = docker.layers
    docker("create", "--name", "one", "base:1", "true")
    docker.run("base:1", "head -c 300000 /dev/urandom > /srv/blob", "--name", "two")
    assert docker.layers == before + 4  # each with its -init
    assert int(docker("inspect", "--size", "--format", "{{.SizeRw}}", "two")) >= 300000
    paths = json.loads(docker("inspect", "--format", "{{json .GraphDriver.Data}}", "two"))
    assert {"LowerDir", "UpperDir", "MergedDir"} <= set(paths)
    assert Path(paths["UpperDir"], "srv", "blob").stat().st_size == 300000
    docker("cp", "two:/srv/blob", docker.root / "blob")
    docker("cp", docker.root / "blob", "one:/srv/copied")
    assert (docker.root / "blob").stat().st_size == 300000
    assert "A /srv/copied" in changes_of(docker, "one")
    docker("rm", "one", "two")
    assert docker.layers == before
    assert [path for path in harness.mounts_below(docker.root) if path.endswith("/merged")] == []


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
def test_restarts(docker: Docker, debian: Path, how: int) -> None:
    """Of dockerd and of the plugin, with a container that has stopped and one that runs."""
    docker("import", debian, "base:1")
    docker.run("base:1", "echo kept > /srv/kept", "--name", "stopped")
    docker.run("base:1", "trap exit TERM; while echo x >> /srv/on; do sleep 0.1; done", "--detach", "--name", "running")
    merged = Path(json.loads(docker("inspect", "--format", "{{json .GraphDriver.Data}}", "running"))["MergedDir"])
    docker.stop_plugin(how)
    # While there is no plugin the container goes on writing, and its mount shows it.
    size = (merged / "srv" / "on").stat().st_size
    wait_for(lambda: (merged / "srv" / "on").stat().st_size > size)
    docker.start_plugin()
    assert docker("exec", "running", "tail", "-n1", "/srv/on") == "x"
    docker.stop(how)
    docker.start()
    assert "Storage Driver: unionfs" in docker("info")
    docker("start", "stopped")
    docker("wait", "stopped")
    assert "A /srv/kept" in changes_of(docker, "stopped")
    docker("rm", "--force", "running")
    assert docker.run("base:1", "cat /etc/debian_version", "--rm")


class UnixConnection(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect(str(SOCKET))


def ask(method: str, message: Any) -> tuple[int, dict[str, Any]]:
    body = message if isinstance(message, bytes) else json.dumps(message).encode()
    connection = UnixConnection("localhost", timeout=60)
    connection.request("POST", f"/{method}", body)
    response = connection.getresponse()
    text = response.read()
    connection.close()
    return response.status, json.loads(text) if text.startswith(b"{") else {"body": text.decode()}


def test_bad_requests_are_refused(scratch: Path, plugin_socket: None) -> None:
    docker = Docker(scratch)
    docker.start_plugin()
    try:
        assert SOCKET.stat().st_mode & 0o777 == 0o600
        assert ask("Plugin.Activate", b"") == (200, {"Implements": ["GraphDriver"]})
        status, reply = ask("GraphDriver.Get", {"ID": "a" * 64})
        assert status == 400 and "Init" in reply["Err"]
        for home in ("", "relative", None, 7):
            assert ask("GraphDriver.Init", {"Home": home})[0] == 400
        assert ask("GraphDriver.Init", {"Home": f"{scratch}/home", "Opts": ["unionfs.sync"]})[0] == 400
        assert ask("GraphDriver.Init", {"Home": f"{scratch}/home", "Opts": ["unionfs.sink=off"]})[0] == 400
        assert ask("GraphDriver.Init", {"Home": f"{scratch}/home", "Opts": ["unionfs.sync=off"]}) == (200, {})
        assert ask("GraphDriver.Create", {"ID": "a" * 64}) == (200, {})
        assert ask("GraphDriver.Create", {"ID": "a" * 64})[0] == 409
        for id in ("../../etc", "", "a/b", ".", "x" * 200, "a\nb"):
            status, reply = ask("GraphDriver.Create", {"ID": id})
            assert status == 400 and "Err" in reply, id
        assert ask("GraphDriver.Create", {"ID": ["a"]})[0] == 400
        assert ask("GraphDriver.Create", {"ID": "b" * 64, "Parent": "c" * 64})[0] == 404
        assert ask("GraphDriver.Create", {"ID": "b" * 64, "StorageOpt": {"size": "big"}})[0] == 400
        assert ask("GraphDriver.Create", {"ID": "b" * 64, "StorageOpt": {"colour": "red"}})[0] == 400
        assert ask("GraphDriver.Create", {"ID": "b" * 64, "MountLabel": "system_u:x"})[0] == 501
        for body in (b"{", b"[]", b"7", b"\xff", b"[" * 100000):
            assert ask("GraphDriver.Exists", body)[0] == 400
        try:
            assert ask("GraphDriver.Exists", b" " * (2 << 20))[0] == 400
        except BrokenPipeError:
            pass  # refused before all of it was read
        assert ask(f"GraphDriver.ApplyDiff?id={'a' * 64}", b"no archive at all")[0] == 400
        assert ask("GraphDriver.ApplyDiff?id=../x", b"")[0] == 400
        assert ask("GraphDriver.Exists", {"ID": "a" * 64}) == (200, {"Exists": True})
        for _ in range(2):
            assert ask("GraphDriver.Remove", {"ID": "a" * 64}) == (200, {})
        assert ask("GraphDriver.Exists", {"ID": "a" * 64}) == (200, {"Exists": False})
        assert ask("GraphDriver.Cleanup", {}) == (200, {})
    finally:
        docker.stop_plugin()
    assert not SOCKET.exists()


def test_user_namespace(scratch: Path, plugin_socket: None) -> None:
    """What dockerd's --userns-remap asks for: container ids in archives and on disk, the host's in the mount."""
    maps = [{"container_id": 0, "host_id": 100000, "size": 1000}, {"container_id": 1000, "host_id": 70000, "size": 1}]
    docker = Docker(scratch)
    docker.start_plugin()
    try:
        bad = [{"ContainerID": 0, "HostID": 1, "Size": 1}]
        assert ask("GraphDriver.Init", {"Home": f"{scratch}/home", "UIDMaps": bad})[0] == 400
        assert ask("GraphDriver.Init", {"Home": f"{scratch}/home", "UIDMaps": maps, "GIDMaps": maps}) == (200, {})
        assert ask("GraphDriver.Create", {"ID": "base"}) == (200, {})
        archive = io.BytesIO()
        with tarfile.open(fileobj=archive, mode="w") as tar:
            for name, owner in (("root", 0), ("seven", 7), ("user", 1000)):
                info = tarfile.TarInfo(name)
                info.uid = info.gid = owner
                tar.addfile(info)
        assert ask("GraphDriver.ApplyDiff?id=base&parent=", archive.getvalue()) == (200, {"Size": 0})
        assert ask("GraphDriver.CreateReadWrite", {"ID": "top", "Parent": "base"}) == (200, {})
        merged = Path(ask("GraphDriver.Get", {"ID": "top"})[1]["Dir"])
        assert [(merged / name).stat().st_uid for name in ("root", "seven", "user")] == [100000, 100007, 70000]
        (merged / "new").touch()  # by the host's root, whom the container does not know
        assert (merged / "new").stat().st_uid == 0
        os.chown(merged / "new", 100007, 100000)
        upper = Path(ask("GraphDriver.GetMetadata", {"ID": "top"})[1]["Metadata"]["UpperDir"])
        assert ((upper / "new").stat().st_uid, (upper / "new").stat().st_gid) == (7, 0)
        assert ask("GraphDriver.Changes", {"ID": "top", "Parent": "base"})[1]["Changes"][-1] == {
            "Path": "/new", "Kind": 1
        }
        assert ask("GraphDriver.Put", {"ID": "top"}) == (200, {})
        for id in ("top", "base"):
            assert ask("GraphDriver.Remove", {"ID": id}) == (200, {})
    finally:
        docker.stop_plugin()
    harness.wait_until_clean(scratch)
