"""buildah: an image of three layers on our mount program, read back through a mount, skopeo and umoci."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import harness
from .conftest import needs

pytestmark = [needs("buildah", "podman", "skopeo", "umoci", "debootstrap"), pytest.mark.timeout(600)]

# buildah's chroot isolation knows no other network than the host's; nothing here uses one.
RUN = ["--isolation", "chroot", "--network", "host"]


@pytest.fixture
def env(scratch: Path, mount_program: Path, debian: Path) -> Iterator[dict[str, str]]:
    env = harness.containers_environment(scratch, mount_program)
    harness.run("podman", "import", "--quiet", debian, "base:1", env=env)
    yield env
    harness.run("buildah", "rm", "--all", env=env)
    harness.run("buildah", "rmi", "--all", "--force", env=env)
    harness.wait_until_clean(scratch)


def test_three_layers(scratch: Path, env: dict[str, str]) -> None:
    def buildah(*argv: str | Path) -> str:
        return harness.run("buildah", *argv, env=env)

    payload = scratch / "payload"
    (payload / "sub").mkdir(parents=True)
    (payload / "sub" / "file").write_text("copied\n")

    def layer(base: str, tag: str, script: str, *, copy: bool = False) -> None:
        container = buildah("from", "--pull-never", base)
        if copy:
            buildah("copy", container, payload, "/srv/payload")
        buildah("run", *RUN, container, "--", "sh", "-ec", script)
        buildah("commit", "--quiet", container, tag)
        buildah("rm", container)

    layer("localhost/base:1", "one:1", "echo appended >> /srv/payload/sub/file; rm /etc/debian_version", copy=True)
    layer("localhost/one:1", "two:1",
          "rm -r /etc/default; mkdir /etc/default; echo only > /etc/default/only; mv /etc/security /etc/moved;"
          "chmod 600 /etc/issue; chown 1:2 /etc/issue; ln -s nowhere /dangling; mkfifo /fifo")
    layer("localhost/two:1", "three:1",
          "rm /srv/payload/sub/file; rmdir /srv/payload/sub; echo back > /etc/debian_version")

    container = buildah("from", "--pull-never", "localhost/three:1")
    merged = Path(buildah("mount", container))
    check_result(merged)
    buildah("umount", container)

    image = json.loads(harness.run("skopeo", "inspect", "--config", "containers-storage:localhost/three:1", env=env))
    assert len(image["rootfs"]["diff_ids"]) == 4
    oci = f"{scratch}/oci:three"
    harness.run("skopeo", "copy", "--quiet", "containers-storage:localhost/three:1", f"oci:{oci}", env=env)
    harness.run("umoci", "unpack", "--image", oci, scratch / "bundle")
    check_result(scratch / "bundle" / "rootfs")


def check_result(root: Path) -> None:
    assert (root / "etc/debian_version").read_text() == "back\n"
    assert [child.name for child in (root / "etc/default").iterdir()] == ["only"]
    assert not (root / "etc/security").exists()
    assert (root / "etc/moved/limits.conf").is_file()
    assert list((root / "srv/payload").iterdir()) == []
    issue = (root / "etc/issue").stat()
    assert (issue.st_mode & 0o7777, issue.st_uid, issue.st_gid) == (0o600, 1, 2)
    assert (root / "dangling").is_symlink()
    assert (root / "fifo").is_fifo()
