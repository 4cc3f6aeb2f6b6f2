"""podman on our mount program: import, run, install, commit, diff, build, overlay volumes, clean-up.

Not here: rootful `--uidmap`. podman 4.3 hands an id-mapped lower *and* uidmapping= to the mount program, which
maps twice; no mount program can serve that (containers/storage 1.46 repaired it).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from . import harness
from .conftest import needs

pytestmark = [needs("podman", "runc", "debootstrap"), pytest.mark.timeout(600)]

Podman = Callable[..., str]


@pytest.fixture
def podman(
    request: pytest.FixtureRequest, scratch: Path, mount_program: Path, debian: Path
) -> Iterator[Podman]:
    """A parameter is a list of mount options."""
    env = harness.containers_environment(scratch, mount_program, mountopt=getattr(request, "param", ""))

    def podman(*argv: str | Path) -> str:
        return harness.run("podman", *argv, env=env)

    assert str(mount_program) in podman("info")
    podman("import", "--quiet", debian, "base:1")
    yield podman
    podman("rm", "--force", "--all")
    podman("rmi", "--force", "--all")
    harness.wait_until_clean(scratch)


def in_container(podman: Podman, image: str, script: str, *options: str) -> str:
    return podman("run", *options, *harness.LIMITS, image, "sh", "-ec", script)


@pytest.mark.parametrize("podman", ["", "session=pyfuse3", "data=cached"], indirect=True)
def test_install_commit_run(podman: Podman, request: pytest.FixtureRequest, mount_program: Path) -> None:
    out = in_container(podman, "base:1", INSTALL, "--name", "first")
    if mount_program.name == "unionfs-fuse-overlayfs":
        assert_used(mount_program.with_name("unionfs"), podman, request.node.callspec.params["podman"])
    root_mount = next(line for line in out.splitlines() if line.split()[1] == "/")
    assert root_mount.split()[2].startswith("fuse."), root_mount
    podman("commit", "--quiet", "first", "installed:1")
    assert "first" in podman("ps", "--all", "--format", "{{.Names}}")
    out = in_container(podman, "installed:1", CHECK, "--rm")
    assert "Status: install ok installed" in out
    assert "gone" in out


def assert_used(unionfs: Path, podman: Podman, option: str) -> None:
    """The mount says itself that it has the session or data mode that was asked for."""
    status = json.loads(harness.run(unionfs, "status", "--json", podman("mount", "first")))
    podman("umount", "first")
    name, _, value = option.partition("=")
    assert status.get(name or "session") == (value or "direct")


INSTALL = """
grep ' / ' /proc/mounts
apt-get install -y /opt/debs/*.deb >/tmp/log 2>&1 || { cat /tmp/log; exit 1; }
echo made > /etc/made
rm /etc/debian_version
rm -r /usr/share/common-licenses
mkdir /usr/share/common-licenses
chmod 700 /srv
ln /etc/made /etc/made-too
ln -s made /etc/made-link
"""

CHECK = """
dpkg --status less cpio libsigsegv2 | grep Status
dpkg --verify less cpio libsigsegv2
less --version >/dev/null
readlink -e /usr/bin/pager >/dev/null
ldconfig -p | grep -q libsigsegv
test -e /etc/debian_version || echo gone
test -z "$(ls /usr/share/common-licenses)"
test "$(stat -c %a /srv)" = 700
test "$(stat -c %h:%s /etc/made-too)" = 2:5
test "$(cat /etc/made-link)" = made
"""


def test_diff_names_what_changed(podman: Podman) -> None:
    in_container(
        podman, "base:1", "rm /etc/debian_version; echo x > /srv/new; echo y >> /etc/profile; chmod 711 /opt",
        "--name", "first",
    )
    changes = set(podman("diff", "first").splitlines())
    assert {"D /etc/debian_version", "A /srv/new", "C /etc/profile", "C /opt"} <= changes
    # Nothing that was only read or listed may show up, and none of our own bookkeeping.
    assert {line[2:] for line in changes} <= {
        "/etc", "/etc/debian_version", "/srv", "/srv/new", "/etc/profile", "/opt",
        "/etc/mtab", "/run", "/run/.containerenv", "/run/secrets",
    }


def test_dockerfile_build(podman: Podman, scratch: Path) -> None:
    context = scratch / "context"
    context.mkdir()
    (context / "data").write_text("one\n")
    (context / "Dockerfile").write_text(
        "FROM localhost/base:1\n"
        "COPY data /data\n"
        "RUN echo two >> /data && rm /etc/debian_version\n"
        "RUN rm -r /etc/default && mkdir /etc/default && touch /etc/default/only && mv /etc/security /etc/moved\n"
    )
    podman("build", "--quiet", "--layers", *harness.LIMITS, "--tag", "built:1", context)
    out = in_container(
        podman, "built:1",
        "cat /data; ls /etc/default; test ! -e /etc/debian_version; test ! -e /etc/security; ls /etc/moved", "--rm",
    )
    assert out.split()[:3] == ["one", "two", "only"]
    assert "limits.conf" in out or "namespace.init" in out


def test_overlay_volume(podman: Podman, scratch: Path) -> None:
    source = scratch / "volume"
    source.mkdir()
    (source / "kept").write_text("as it was\n")
    out = in_container(podman, "base:1", "cat /v/kept; echo changed > /v/kept; cat /v/kept; touch /v/new", "--rm",
                       "--volume", f"{source}:/v:O")
    assert out == "as it was\nchanged"
    assert [child.name for child in source.iterdir()] == ["kept"]
    assert (source / "kept").read_text() == "as it was\n"


def test_killed_container_leaves_nothing(podman: Podman, scratch: Path) -> None:
    podman("run", "--detach", "--name", "long", *harness.LIMITS, "base:1", "sleep", "1000")
    assert harness.mounts_below(scratch)
    podman("kill", "long")
    podman("wait", "long")
    podman("rm", "--force", "long")
    harness.wait_until_clean(scratch)
