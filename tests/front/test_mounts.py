"""Finding mounts by /proc/self/mountinfo."""

from __future__ import annotations

import pytest

from unionfs.errors import EXIT_NOT_OURS, MountError
from unionfs.front import mounts
from unionfs.session.mount import show


@pytest.fixture
def mountinfo(monkeypatch: pytest.MonkeyPatch) -> None:
    text = rb"""
22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 0:40 / /a\040b rw,relatime shared:1 master:2 - fuse.unionfs base\054x rw,user_id=0
31 22 0:41 / /m ro - fuse.unionfs unionfs rw
32 31 0:42 / /m rw - fuse.fuse-overlayfs fuse-overlayfs rw
33 31 0:43 / /m/inner rw - fuse.sshfs host: rw
34 22 0:41 /sub /bind rw - fuse.unionfs unionfs rw
""".lstrip()
    monkeypatch.setattr(mounts, "_read_mountinfo", lambda: text.splitlines())


@pytest.mark.usefixtures("mountinfo")
def test_fields_and_escapes() -> None:
    found = mounts.fuse_mounts()
    assert [mount.path for mount in found] == [b"/a b", b"/m", b"/m", b"/m/inner"]
    assert found[0].source == b"base,x"
    assert found[0].device == 40
    assert found[2].fstype == "fuse.fuse-overlayfs"


@pytest.mark.usefixtures("mountinfo")
@pytest.mark.parametrize(
    ("path", "device", "inside"),
    [
        ("/m", 42, b"/"),  # the upper one of two mounts on one directory
        ("/m/", 42, b"/"),
        ("/m/x/y", 42, b"/x/y"),
        ("/m/../m/x", 42, b"/x"),
        ("/m/inner/x", 43, b"/x"),
        ("/m/innermost", 42, b"/innermost"),
        ("/a b/c", 40, b"/c"),
    ],
)
def test_mount_of(path: str, device: int, inside: bytes) -> None:
    mount, rest = mounts.mount_of(path)
    assert (mount.device, rest) == (device, inside)


@pytest.mark.usefixtures("mountinfo")
def test_elsewhere() -> None:
    with pytest.raises(MountError, match="not on a unionfs mount") as caught:
        mounts.mount_of("/mm/x")
    assert caught.value.code == EXIT_NOT_OURS


def test_show_keeps_messages_on_one_line() -> None:
    assert show("/ä b".encode()) == "/ä b"
    assert show(b"/a\nb\xff") == "/a\\nb\\xff"
