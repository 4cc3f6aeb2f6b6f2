"""podman as an ordinary user: the mount program runs as root of a user namespace.

The user exists only in a private mount namespace with its own /etc/passwd and /etc/subuid, so the machine is left
as it was. All steps run in that one namespace, as podman's pause process lives in it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from . import harness
from .conftest import needs

pytestmark = [
    needs("podman", "runc", "newuidmap", "setpriv", "debootstrap"),
    pytest.mark.skipif(
        not os.path.exists("/proc/self/ns/user")
        or Path("/proc/sys/user/max_user_namespaces").read_text().strip() == "0",
        reason="this kernel gives no user namespaces",
    ),
    pytest.mark.timeout(600),
]

UID = 60001

AS_ROOT = """
set -e
mount --make-rprivate /
mount --bind {root}/passwd /etc/passwd
mount --bind {root}/group /etc/group
mount --bind {root}/subids /etc/subuid
mount --bind {root}/subids /etc/subgid
# The program may lie below a directory that the user may not enter.
mount --bind {prefix} {root}/prefix
exec setpriv --reuid {uid} --regid {uid} --clear-groups sh -e {root}/as-user
"""

AS_USER = """
cd {root}/home
podman info
podman import --quiet {root}/debian.tar base:1
podman run --name first {limits} base:1 sh -ec '
    grep " / " /proc/mounts
    apt-get install -y /opt/debs/*.deb >/tmp/log 2>&1 || {{ cat /tmp/log; exit 1; }}
    rm /etc/debian_version
    rm -r /etc/default; mkdir /etc/default; touch /etc/default/only
    chown 5:6 /srv; chmod 2711 /srv'
podman diff first | grep -x "D /etc/debian_version"
podman commit --quiet first second:1
podman run --rm {limits} second:1 sh -ec '
    dpkg --verify less cpio libsigsegv2
    less --version >/dev/null
    test ! -e /etc/debian_version
    stat -c "%u:%g %a" /srv
    ls /etc/default'
podman rm --all --force >/dev/null
podman rmi --all --force >/dev/null
podman system migrate
"""


def test_rootless_podman(scratch: Path, mount_program: Path, debian: Path) -> None:
    for name in ("home", "xdg", "prefix"):
        (scratch / name).mkdir()
    os.chown(scratch / "home", UID, UID)
    os.chown(scratch / "xdg", UID, UID)
    (scratch / "xdg").chmod(0o700)
    (scratch / "passwd").write_text(
        f"{Path('/etc/passwd').read_text()}unionfs-rootless:x:{UID}:{UID}::{scratch}/home:/bin/sh\n"
    )
    (scratch / "group").write_text(f"{Path('/etc/group').read_text()}unionfs-rootless:x:{UID}:\n")
    (scratch / "subids").write_text("unionfs-rootless:300000:65536\n")
    (scratch / "debian.tar").symlink_to(debian)
    program = scratch / "program"
    prefix = mount_program.parent.parent
    interpreter = "" if prefix == Path("/usr") else f"{scratch}/prefix/bin/python "
    program.write_text(f'#!/bin/sh\nexec {interpreter}{scratch}/prefix/bin/{mount_program.name} "$@"\n')
    program.chmod(0o755)
    (scratch / "as-root").write_text(AS_ROOT.format(root=scratch, prefix=prefix, uid=UID))
    (scratch / "as-user").write_text(AS_USER.format(root=scratch, limits=" ".join(harness.LIMITS)))

    env = harness.containers_environment(scratch, program, data=scratch / "home")
    env.update(HOME=f"{scratch}/home", XDG_RUNTIME_DIR=f"{scratch}/xdg")
    out = harness.run("unshare", "--mount", "sh", scratch / "as-root", env=env, timeout=400)
    assert f"Executable: {program}" in out
    root_mount = next(line for line in out.splitlines() if line.split()[1:2] == ["/"])
    assert root_mount.split()[2].startswith("fuse."), root_mount
    assert out.splitlines()[-2:] == ["5:6 2711", "only"]
    harness.wait_until_clean(scratch)
