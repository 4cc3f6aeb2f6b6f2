"""Docker's built-in fuse-overlayfs driver, with our executable under that name first on dockerd's PATH."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import harness
from .conftest import needs

pytestmark = [needs("dockerd", "docker", "containerd", "runc", "debootstrap"), pytest.mark.timeout(600)]

Docker = Callable[..., str]


def client() -> str:
    """The distribution's client where there is one: another may be too new for its daemon."""
    return "/usr/bin/docker" if os.path.exists("/usr/bin/docker") else "docker"


@pytest.fixture
def docker(scratch: Path, mount_program: Path, debian: Path) -> Iterator[Docker]:
    programs = scratch / "bin"
    programs.mkdir()
    (programs / "fuse-overlayfs").symlink_to(mount_program)
    socket = f"unix://{scratch}/socket"
    env = {
        **os.environ,
        "PATH": f"{programs}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "DOCKER_HOST": socket,
        "DOCKER_CONFIG": str(scratch / "client"),
        "DOCKER_BUILDKIT": "0",
        "TMPDIR": str(scratch),
    }
    log = scratch / "log"
    with log.open("w") as out:
        daemon = subprocess.Popen(
            [
                "dockerd", "--iptables=false", "--ip6tables=false", "--bridge=none", "--storage-driver=fuse-overlayfs",
                f"--data-root={scratch}/data", f"--exec-root={scratch}/exec", f"--pidfile={scratch}/pid",
                f"--host={socket}",
            ],
            env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
        )

    def docker(*argv: str | Path) -> str:
        return harness.run(client(), *argv, env=env)

    try:
        wait_until_up(daemon, docker, log)
        assert docker("info", "--format", "{{.Driver}}") == "fuse-overlayfs"
        docker("import", debian, "base:1")
        yield docker
        for container in docker("ps", "--all", "--quiet").split():
            docker("rm", "--force", container)
        for image in docker("images", "--quiet").split():
            docker("rmi", "--force", image)
    finally:
        daemon.send_signal(signal.SIGTERM)
        try:
            daemon.wait(30)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
    release_data_root(scratch / "data")
    harness.wait_until_clean(scratch)


def release_data_root(data: Path) -> None:
    """dockerd binds its data root to itself where the mount around it is not shared, and takes that back at its end
    only if the filesystem's own root is "/" (shouldUnmountRoot in its daemon_linux.go): not in a tree that was pivoted
    to, as scripts/clean-debian makes one."""
    if str(data) in harness.mounts_below(data.parent):
        subprocess.run(["umount", data], check=True)


def wait_until_up(daemon: subprocess.Popen[bytes], docker: Docker, log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        try:
            docker("version")
            return
        except AssertionError:
            assert daemon.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)


def in_container(docker: Docker, image: str, script: str, *options: str) -> str:
    return docker("run", "--network=none", "--pull=never", *options, image, "sh", "-ec", script)


def test_run_commit_diff(docker: Docker) -> None:
    out = in_container(
        docker, "base:1",
        "grep ' / ' /proc/mounts; apt-get install -y /opt/debs/*.deb >/tmp/log 2>&1 || { cat /tmp/log; exit 1; };"
        "rm /etc/debian_version; rm -r /etc/default; mkdir /etc/default; touch /etc/default/only",
        "--name", "first",
    )
    root_mount = next(line for line in out.splitlines() if line.split()[1:2] == ["/"])
    assert root_mount.split()[2].startswith("fuse."), root_mount
    changes = set(docker("diff", "first").splitlines())
    assert {"D /etc/debian_version", "A /usr/bin/less", "A /etc/default/only"} <= changes
    assert not any(line.startswith("C /bin") for line in changes)
    docker("commit", "first", "second:1")
    out = in_container(
        docker, "second:1",
        "dpkg --verify less cpio libsigsegv2; less --version | head -1; ls /etc/default; test ! -e /etc/debian_version",
        "--rm",
    )
    assert out.split()[0] == "less"
    assert out.split()[-1] == "only"


def test_build_three_steps(docker: Docker, scratch: Path) -> None:
    context = scratch / "context"
    context.mkdir()
    (context / "data").write_text("one\n")
    (context / "Dockerfile").write_text(
        "FROM base:1\n"
        "COPY data /data\n"
        "RUN echo two >> /data && rm /etc/debian_version && chmod 700 /srv\n"
        "RUN rm -r /etc/default && mkdir /etc/default && touch /etc/default/only && mv /etc/security /etc/moved\n"
    )
    docker("build", "--network=none", "--tag", "built:1", context)
    out = in_container(
        docker, "built:1",
        "cat /data; ls /etc/default; stat -c %a /srv; ls /etc/moved/limits.conf;"
        "test ! -e /etc/debian_version; test ! -e /etc/security",
        "--rm",
    )
    assert out.split() == ["one", "two", "only", "700", "/etc/moved/limits.conf"]
    archive = scratch / "saved.tar"
    docker("save", "--output", archive, "built:1")
    docker("rmi", "--force", "built:1")
    docker("load", "--input", archive)
    assert in_container(docker, "built:1", "cat /data", "--rm") == "one\ntwo"
