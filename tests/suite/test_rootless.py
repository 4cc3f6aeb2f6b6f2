"""Without root: an ordinary user through fusermount3, the root of a user namespace, and the options that map owners."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest
from support.mounts import Maker, Union, is_mounted, unionfs
from support.procs import child, errno_of, in_user_namespace
from support.sys import capability
from support.trees import WHITEOUT, D, F, Hard, L, Tree, opaque

pytestmark = pytest.mark.needs("ours")

LOWERS: list[Tree] = [
    {
        "f": "f",
        "d/x": "x",
        "d/y": "y",
        "gone/a": "a",
        "l": L("f"),
        "big": F(os.urandom(2 << 20)),
        "h1": "h",
        "h2": Hard("h1"),
        "moving/sub/z": "z",
        "w": WHITEOUT,
        "top": opaque("user.overlay."),
        "top/new": "n",
        ".wh.dotted": "",
    },
    {"w": "hidden", "top/old": "o", "dotted": "hidden", "d/low": "low"},
]


def owned(make_union: Maker, uid: int, lowers: list[Tree]) -> Union:
    """Layers that belong to an ordinary user, not mounted."""
    u = make_union(lowers, mount=False, compare=False)
    subprocess.run(["chown", "-R", f"{uid}:{uid}", u.base], check=True)
    u.remember_lowers()
    return u


def workout(u: Union) -> None:
    """What rootless people do, and what must hold after a remount. Runs as the user in question."""
    assert sorted(os.listdir(u.merged)) == ["big", "d", "f", "gone", "h1", "h2", "l", "moving", "top"]
    assert os.listdir(u / "top") == ["new"]
    with open(u / "f", "a") as f:
        f.write("+")
    os.chmod(u / "big", 0o600)
    os.unlink(u / "d/x")
    os.unlink(u / "gone/a")
    os.rmdir(u / "gone")
    os.mkdir(u / "gone")
    os.rename(u / "moving", u / "moved")
    os.rename(u / "d/low", u / "d/renamed")
    with open(u / "h1", "a") as f:
        f.write("+")
    os.symlink("f", u / "new link")
    os.mkfifo(u / "fifo")
    os.setxattr(u / "f", "user.x", b"1")
    numbers = {name: (u / name).lstat().st_ino for name in ("f", "big", "moved", "moved/sub/z", "h1", "d/renamed")}
    for remounted in (False, True):
        assert (u / "f").read_text() == "f+"
        assert os.getxattr(u / "f", "user.x") == b"1"
        assert (u / "big").stat().st_mode & 0o777 == 0o600
        if not u.target.lacks("metacopy"):
            assert (u.up / "big").stat().st_blocks * 512 < 1 << 20, "a metadata change copied the data"
        assert len((u / "big").read_bytes()) == 2 << 20
        assert sorted(os.listdir(u / "d")) == ["renamed", "y"]
        assert (u / "d/renamed").read_text() == "low"
        assert os.listdir(u / "gone") == []
        assert (u / "moved/sub/z").read_text() == "z"
        assert errno_of(os.stat, u / "moving") == 2
        assert (u / "h2").read_text() == "h+"
        assert (u / "h2").stat().st_ino == (u / "h1").stat().st_ino
        assert stat.S_ISFIFO((u / "fifo").lstat().st_mode)
        assert sorted(os.listdir(u.merged)) == [
            "big",
            "d",
            "f",
            "fifo",
            "gone",
            "h1",
            "h2",
            "l",
            "moved",
            "new link",
            "top",
        ]
        assert {name: (u / name).lstat().st_ino for name in numbers} == numbers
        if not remounted:
            u.remount()
    with open(u / "big", "r+b") as f:
        f.write(b"data now")
    assert (u / "big").read_bytes()[:10][:8] == b"data now"


@pytest.mark.needs("rootless")
def test_ordinary_user(make_union: Maker, ordinary_user: int) -> None:
    """Through fusermount3, with whiteouts that need no mknod, xattrs that need no privilege."""
    u = owned(make_union, ordinary_user, LOWERS)

    def inside() -> None:
        u.mount()
        try:
            workout(u)
        finally:
            u.umount()

    child(inside, uid=ordinary_user)
    u.user = ordinary_user
    u.mount()
    assert errno_of(os.stat, u / "f") == 13, "root sees a mount without allow_other"


def test_ordinary_user_umount(make_union: Maker, ordinary_user: int) -> None:
    """The user's own commands: mount in the background, status, umount; another user may do neither."""
    u = make_union([{"a": "1"}], user=ordinary_user, mount=False)
    as_user = {"user": ordinary_user, "group": ordinary_user, "extra_groups": []}
    done = unionfs(
        "mount",
        "--session",
        u.target.session,
        "--lower",
        u.lower,
        "--upper",
        u.upper,
        "--work",
        u.work,
        u.merged,
        **as_user,
    )
    assert (done.returncode, done.stderr) == (0, "")
    try:
        status = unionfs("status", "--json", u.merged, **as_user)
        assert status.returncode == 0, status
        assert child(lambda: (u / "a").read_text(), uid=ordinary_user) == "1"
        assert child(errno_of, os.stat, u / "a", uid=ordinary_user + 1) == 13
    finally:
        done = unionfs("umount", u.merged, **as_user)
    assert (done.returncode, done.stderr) == (0, "")
    assert not is_mounted(u.merged)


@pytest.mark.needs("rootless")
def test_user_namespace(make_union: Maker, ordinary_user: int) -> None:
    """Root of a user namespace mounts directly; what it leaves works again for the same user outside."""
    u = owned(make_union, ordinary_user, LOWERS)

    def inside() -> None:
        u.mount()
        try:
            workout(u)
        finally:
            u.umount()

    in_user_namespace(inside, uid=ordinary_user)
    u.check_lowers()

    def outside() -> None:
        u.mount()
        assert (u / "f").read_text() == "f+"
        assert (u / "moved/sub/z").read_text() == "z"
        assert (u / "big").read_bytes()[:8] == b"data now"
        u.umount()

    child(outside, uid=ordinary_user)


@pytest.mark.needs("kernel_format")
@pytest.mark.needs("rootless")
def test_user_namespace_and_kernel(make_union: Maker, ordinary_user: int) -> None:
    """The kernel's userxattr overlay (no redirects, no metacopy) shows the same tree."""
    u = owned(make_union, ordinary_user, [{"f": "f", "d/x": "x", "d/y": "y", "o/z": "z"}, {"d/w": "w"}])

    def inside() -> None:
        from support.trees import differences, snapshot

        u.mount()
        with open(u / "f", "a") as f:
            f.write("+")
        os.unlink(u / "d/x")
        os.unlink(u / "o/z")
        os.rmdir(u / "o")
        os.mkdir(u / "o")
        (u / "o/new").write_text("n")
        ours = snapshot(u.merged)
        u.umount()
        with u.kernel_view("userxattr") as view:
            assert differences(ours, snapshot(view)) == []

    in_user_namespace(inside, uid=ordinary_user)


def owner(path: Path) -> tuple[int, int]:
    st = path.lstat()
    return st.st_uid, st.st_gid


def test_squash_to_root(make_union: Maker) -> None:
    u = make_union([{"f": F("x", 0o644, 5, 6), "d": D(uid=7)}], options="squash_to_root", compare=False)
    assert owner(u / "f") == (0, 0)
    child(lambda: os.close(os.open(u / "d/n", os.O_CREAT | os.O_WRONLY)), uid=0)
    assert owner(u / "d/n") == (0, 0)
    with open(u / "f", "a") as f:
        f.write("y")
    assert owner(u / "f") == (0, 0)
    assert (u / "f").read_text() == "xy"


def test_squash_to_ids(make_union: Maker) -> None:
    u = make_union([{"f": F("x", 0o644, 5, 6)}], options="squash_to_uid=1234,squash_to_gid=4321", compare=False)
    assert owner(u / "f") == (1234, 4321)
    os.mkdir(u / "d")
    assert owner(u / "d") == (1234, 4321)


def test_id_mapping(make_union: Maker) -> None:
    """Container ids outside, host ids on disk: `uidmapping=CONTAINER:HOST:COUNT` in triples."""
    u = make_union(
        [{"f": F("x", 0o644, 100010, 200020), "root": F("r", 0o644, 1000, 2000), "other": F("o", 0o644, 7, 7)}],
        options="uidmapping=0:1000:1:1:100001:65535,gidmapping=0:2000:1:1:200001:65535",
        compare=False,
    )
    assert owner(u / "f") == (10, 20)
    assert owner(u / "root") == (0, 0)
    os.chmod(u.merged, 0o777)
    (u / "mine").touch()
    child(lambda: (u / "users").touch(), uid=33, gid=34)
    os.chown(u / "f", 11, 21)
    assert owner(u / "f") == (11, 21)
    assert owner(u / "users") == (33, 34)
    u.umount()
    assert owner(u.up / "mine") == (1000, 2000)
    assert owner(u.up / "users") == (100033, 200034)
    assert owner(u.up / "f") == (100011, 200021)


@pytest.mark.parametrize("level", ["1", "2"])
def test_xattr_permissions(make_union: Maker, level: str) -> None:
    """Owner and mode kept in an xattr, real files plain: what a rootless store on any filesystem needs."""
    u = make_union([{"f": F("x", 0o644)}], options=f"xattr_permissions={level}", compare=False)
    os.chown(u / "f", 33, 34)
    os.chmod(u / "f", 0o4711)
    os.mkdir(u / "d", 0o700)
    os.chown(u / "d", 5, 6)
    os.mknod(u / "p", stat.S_IFIFO | 0o640)
    for _ in range(2):
        assert owner(u / "f") == (33, 34)
        assert (u / "f").stat().st_mode & 0o7777 == 0o4711
        assert owner(u / "d") == (5, 6)
        assert stat.S_ISFIFO((u / "p").lstat().st_mode)
        assert [x for x in os.listxattr(u / "f") if "override" in x or "containers" in x] == []
        u.remount()
    u.umount()
    names = [x for name in ("f", "d") for x in os.listxattr(u.up / name)]
    assert any("override_stat" in x for x in names), names


def test_security_xattrs_isolated(make_union: Maker) -> None:
    """xattr_permissions=2: security.* set on the mount is seen there, and means nothing to the host's kernel."""
    u = make_union([{"f": F("x", 0o755)}], options="xattr_permissions=2", compare=False)
    forged = "user.fuseoverlayfs.security.capability"  # where it is kept: believed, if a user could write there
    assert errno_of(os.setxattr, u / "f", forged, capability(1 << 21)) == 95
    os.setxattr(u / "f", "security.capability", capability(1 << 10))
    for _ in range(2):
        assert os.getxattr(u / "f", "security.capability") == capability(1 << 10)
        assert "security.capability" in os.listxattr(u / "f")
        assert [x for x in os.listxattr(u / "f") if "containers" in x] == []
        u.remount()
    u.umount()
    assert "security.capability" not in os.listxattr(u.up / "f")
