"""Extended attributes, POSIX ACLs, file capabilities, setuid and setgid bits, permission checks."""

from __future__ import annotations

import os
import stat

import pytest
from support.mounts import Maker, Union
from support.procs import GROUP, USER, child, errno_of
from support.sys import (
    ACL_ACCESS,
    ACL_DEFAULT,
    ACL_GROUP,
    ACL_GROUP_OBJ,
    ACL_MASK,
    ACL_OTHER,
    ACL_USER,
    ACL_USER_OBJ,
    NO_ID,
    acl,
    capability,
)
from support.trees import WHITEOUT, D, F, L, Node, opaque

XATTR_CREATE, XATTR_REPLACE = 1, 2
MINE = {"uid": USER, "gid": GROUP}


def test_set_get_list_remove(make_union: Maker) -> None:
    u = make_union(
        [
            {
                "low": F("x", xattrs={"user.a": b"1", "trusted.t": b"2"}),
                "d": D(xattrs={"user.d": b"3"}),
                "l": L("low"),
                "c": Node("c", 1, 3, xattrs={"trusted.dev": b"4"}),
            }
        ],
        {"up": "y"},
    )
    for name in ("low", "up", "d"):
        path = u / name
        os.setxattr(path, "user.new", b"value")
        os.setxattr(path, "user.empty", b"")
        os.setxattr(path, "user.big", b"v" * 3000)
        os.setxattr(path, "trusted.x", bytes(range(256)))
        os.setxattr(path, "security.test", b"s")
        assert errno_of(os.setxattr, path, "user.new", b"", XATTR_CREATE) == 17
        assert errno_of(os.setxattr, path, "user.none", b"", XATTR_REPLACE) == 61
        os.setxattr(path, "user.new", b"replaced", XATTR_REPLACE)
        assert errno_of(os.getxattr, path, "user.none") == 61
        assert errno_of(os.removexattr, path, "user.none") == 61
        assert errno_of(os.setxattr, path, "bad.name", b"") == 95
        assert errno_of(os.setxattr, path, "user." + "n" * 251, b"") == 34
    os.removexattr(u / "low", "user.a")
    os.setxattr(u / "l", "trusted.link", b"L", follow_symlinks=False)
    assert errno_of(os.setxattr, u / "l", "user.link", b"", follow_symlinks=False) == 1
    os.setxattr(u / "c", "trusted.dev", b"5")
    for _ in range(2):
        for name in ("low", "up", "d"):
            assert os.getxattr(u / name, "user.new") == b"replaced"
            assert os.getxattr(u / name, "user.empty") == b""
            assert os.getxattr(u / name, "user.big") == b"v" * 3000
            assert os.getxattr(u / name, "trusted.x") == bytes(range(256))
        assert sorted(os.listxattr(u / "low")) == [
            "security.test",
            "trusted.t",
            "trusted.x",
            "user.big",
            "user.empty",
            "user.new",
        ]
        assert sorted(os.listxattr(u / "d")) == [
            "security.test",
            "trusted.x",
            "user.big",
            "user.d",
            "user.empty",
            "user.new",
        ]
        assert os.listxattr(u / "l", follow_symlinks=False) == ["trusted.link"]
        assert os.getxattr(u / "c", "trusted.dev") == b"5"
        u.remount()


def test_no_trusted_for_users(make_union: Maker) -> None:
    """trusted.* is not for ordinary users: neither readable nor settable."""
    u = make_union([{"f": F("x", 0o666, USER, GROUP, {"trusted.t": b"1", "user.u": b"2"})}])
    assert "user.u" in child(os.listxattr, u / "f", uid=USER)
    assert child(errno_of, os.getxattr, u / "f", "trusted.t", uid=USER) in (1, 61)
    assert child(errno_of, os.setxattr, u / "f", "trusted.n", b"", uid=USER) == 1
    assert child(errno_of, os.setxattr, u / "f", "user.n", b"", uid=USER) == 0


@pytest.mark.needs("kernel_format")
def test_private_ones_hidden(make_union: Maker) -> None:
    """What the format keeps in xattrs is not shown, can't be read, set or removed by users of the mount."""
    u = make_union([{"d/x": "x", "f": "f", "g": "g"}], {"o": opaque(), "o/y": "y"})
    os.rename(u / "d", u / "moved")
    os.chmod(u / "f", 0o600)
    os.link(u / "g", u / "g2")
    for name in ("moved", "f", "g", "o", "."):
        assert [x for x in os.listxattr(u / name) if "overlay" in x] == [], name
        for key in ("opaque", "redirect", "origin", "metacopy", "impure", "nlink"):
            assert errno_of(os.getxattr, u / name, "trusted.overlay." + key) != 0, (name, key)
    u.umount()
    assert any("overlay" in x for x in os.listxattr(u.up / "moved"))


@pytest.mark.needs("ours")
def test_forged_private_xattrs(make_union: Maker) -> None:
    """A user of the mount can't write the format's own attributes, in any spelling, into upper."""
    u = make_union([{"d/secret": "x", "e/y": "y"}], compare=False)
    for key in (
        "trusted.overlay.redirect",
        "trusted.overlay.opaque",
        "user.overlay.redirect",
        "user.fuseoverlayfs.opaque",
    ):
        number = errno_of(os.setxattr, u / "e", key, b"/d")
        if number == 0:  # stored under another name: then shown as set, and without effect
            assert os.getxattr(u / "e", key) == b"/d"
    u.remount()
    assert os.listdir(u / "e") == ["y"]


def test_umask(union: Union) -> None:
    """Files, directories, fifos and devices get the umask; symlinks don't."""
    os.umask(0o027)
    os.close(os.open(union / "f", os.O_CREAT | os.O_WRONLY, 0o666))
    os.mkdir(union / "d", 0o777)
    os.mkfifo(union / "p", 0o666)
    os.mknod(union / "c", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.symlink("f", union / "l")
    modes = {name: (union / name).lstat().st_mode & 0o7777 for name in "fdpcl"}
    assert modes == {"f": 0o640, "d": 0o750, "p": 0o640, "c": 0o640, "l": 0o777}


def test_setgid_directory(make_union: Maker) -> None:
    """New entries take the group of a setgid directory, directories its bit too; also where it is a lower's."""
    u = make_union([{"d": D(0o2777, 0, 777)}])
    for name in ("f", "sub", "p"):
        if name == "sub":
            child(os.mkdir, u / "d/sub", 0o755, **MINE)
        elif name == "f":
            child(lambda: os.close(os.open(u / "d/f", os.O_CREAT | os.O_WRONLY, 0o2775)), **MINE)
        else:
            child(os.mkfifo, u / "d/p", **MINE)
        st = (u / "d" / name).stat()
        assert (st.st_uid, st.st_gid) == (USER, 777), name
        assert bool(st.st_mode & stat.S_ISGID) == (name == "sub"), name
    child(os.mkdir, u / "d/sub/deeper", **MINE)
    assert (u / "d/sub/deeper").stat().st_gid == 777


def test_owner_of_new_entries(make_union: Maker) -> None:
    u = make_union([{"d": D(0o777)}])

    def make() -> None:
        os.close(os.open(u / "d/f", os.O_CREAT | os.O_WRONLY))
        os.mkdir(u / "d/s")
        os.symlink("x", u / "d/l")
        os.mkfifo(u / "d/p")

    child(make, **MINE)
    for name in "fslp":
        st = (u / "d" / name).lstat()
        assert (st.st_uid, st.st_gid) == (USER, GROUP), name


@pytest.mark.every_data_mode
@pytest.mark.needs("suid_clearing")
def test_suid_cleared(make_union: Maker) -> None:
    """Write, truncate and chown by an ordinary user clear setuid, and setgid of an executable; root keeps them."""
    spec = {
        name: F("x" * 10, mode, USER, GROUP)
        for name, mode in (
            ("write", 0o6777),
            ("trunc", 0o6777),
            ("chown", 0o6777),
            ("lock", 0o2767),
            ("root", 0o6777),
            ("otrunc", 0o6777),
        )
    }
    for layer in ("lower", "upper"):
        u = make_union([spec if layer == "lower" else {}], spec if layer == "upper" else {})

        def write(name: str, u: Union = u) -> None:
            fd = os.open(u / name, os.O_WRONLY)
            os.write(fd, b"y")
            os.close(fd)

        child(write, "write", uid=USER + 1)
        child(os.truncate, u / "trunc", 3, uid=USER + 1)
        child(os.chown, u / "chown", -1, 4321, uid=USER, gid=GROUP, groups=[4321])
        child(write, "lock", **MINE)
        child(lambda u=u: os.close(os.open(u / "otrunc", os.O_WRONLY | os.O_TRUNC)), uid=USER + 1)
        write("root")
        modes = {name: (u / name).stat().st_mode & 0o7777 for name in spec}
        assert modes == {
            "write": 0o777,
            "trunc": 0o777,
            "chown": 0o777,
            "lock": 0o2767,
            "root": 0o6777,
            "otrunc": 0o777,
        }, layer
        u.drop_caches()
        assert {name: (u / name).stat().st_mode & 0o7777 for name in spec} == modes


@pytest.mark.every_data_mode
def test_capabilities_dropped_by_write(make_union: Maker) -> None:
    cap = capability(1 << 10)
    u = make_union([{name: F("x", 0o777, xattrs={"security.capability": cap}) for name in ("w", "t", "c", "keep")}])
    with open(u / "w", "a") as f:
        f.write("y")
    os.truncate(u / "t", 0)
    os.chown(u / "c", 5, 5)
    os.chmod(u / "keep", 0o755)
    for name in "wtc":
        assert errno_of(os.getxattr, u / name, "security.capability") == 61, name
    assert os.getxattr(u / "keep", "security.capability") == cap
    os.setxattr(u / "w", "security.capability", cap)
    assert os.getxattr(u / "w", "security.capability") == cap
    u.remount()
    assert os.getxattr(u / "w", "security.capability") == cap


@pytest.mark.every_data_mode
@pytest.mark.needs("suid_clearing")
def test_bits_that_come_while_a_writer_has_the_file_open(make_union: Maker) -> None:
    """A descriptor that wrote before the file became setuid, or got capabilities, clears them with its next write."""
    u = make_union([{}], {name: F("x" * 10, 0o777, USER, GROUP) for name in ("suid", "sgid", "cap", "alloc")})
    cap = capability(1 << 10)

    def give(name: str) -> None:
        if name == "cap":
            os.setxattr(u / name, "security.capability", cap)
        else:
            os.chmod(u / name, 0o2777 if name == "sgid" else 0o4777)

    for name in ("suid", "sgid", "cap", "alloc"):
        go, done = os.pipe(), os.pipe()

        def writer(name: str = name, go: tuple[int, int] = go, done: tuple[int, int] = done) -> None:
            fd = os.open(u / name, os.O_WRONLY)
            for _ in range(3):
                os.write(fd, b"y")
            os.write(done[1], b".")
            os.read(go[0], 1)
            if name == "alloc":
                os.posix_fallocate(fd, 0, 4096)
            else:
                os.write(fd, b"z")

        pid = os.fork()
        if pid == 0:
            try:
                os.setgroups([])
                os.setresgid(GROUP + 1, GROUP + 1, GROUP + 1)
                os.setresuid(USER + 1, USER + 1, USER + 1)
                writer()
                os._exit(0)
            finally:
                os._exit(1)
        os.read(done[0], 1)
        give(name)
        os.write(go[1], b".")
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0, name
        for fd in (*go, *done):
            os.close(fd)
        for _ in range(2):
            if name == "cap":
                assert errno_of(os.getxattr, u / name, "security.capability") == 61
            else:
                assert (u / name).stat().st_mode & 0o7777 == 0o777, name
            u.drop_caches()


def test_chmod_clears_setgid_for_others(make_union: Maker) -> None:
    u = make_union([{"f": F("x", 0o644, USER, 777)}])
    child(os.chmod, u / "f", 0o2755, **MINE)
    assert (u / "f").stat().st_mode & 0o7777 == 0o755
    child(os.chmod, u / "f", 0o2755, uid=USER, gid=GROUP, groups=[777])
    assert (u / "f").stat().st_mode & 0o7777 == 0o2755


def test_permission_checks(make_union: Maker) -> None:
    u = make_union(
        [
            {
                "closed": D(0o700),
                "closed/f": "x",
                "secret": F("s", 0o600),
                "ro": F("r", 0o444),
                "exec": D(0o711),
                "exec/f": "x",
                "grp": F("g", 0o640, 0, 777),
                "mine": F("m", 0o200, USER, GROUP),
            }
        ]
    )

    def opened(name: str, flags: int = os.O_RDONLY) -> int:
        return errno_of(lambda: os.close(os.open(u / name, flags)))

    assert child(opened, "closed/f", **MINE) == 13
    assert child(opened, "secret", **MINE) == 13
    assert child(opened, "ro", **MINE) == 0
    assert child(opened, "ro", os.O_WRONLY, **MINE) == 13
    assert child(opened, "exec/f", **MINE) == 0
    assert child(errno_of, os.listdir, u / "exec", **MINE) == 13
    assert child(opened, "grp", **MINE) == 13
    assert child(opened, "grp", uid=USER, groups=[777]) == 0
    assert child(opened, "mine", **MINE) == 13
    assert child(opened, "mine", os.O_WRONLY, **MINE) == 0
    assert child(errno_of, os.mkdir, u / "new", **MINE) == 13
    assert child(errno_of, os.unlink, u / "ro", **MINE) == 13
    assert child(errno_of, os.chmod, u / "ro", 0o777, **MINE) == 1
    assert child(errno_of, os.chown, u / "mine", 0, -1, **MINE) == 1
    assert child(errno_of, os.utime, u / "ro", (1, 1), **MINE) == 1
    assert child(os.access, u / "mine", os.W_OK, **MINE) is True
    assert child(os.access, u / "mine", os.R_OK, **MINE) is False


def rights(user: int, named: int, group: int, mask: int, other: int) -> bytes:
    return acl(
        (ACL_USER_OBJ, user, NO_ID),
        (ACL_USER, named, USER),
        (ACL_GROUP_OBJ, group, NO_ID),
        (ACL_GROUP, 0, 777),
        (ACL_MASK, mask, NO_ID),
        (ACL_OTHER, other, NO_ID),
    )


def test_access_acl(make_union: Maker) -> None:
    """A named user gets what the ACL gives; chmod changes the mask; kept over copy-up and remount."""
    u = make_union([{"low": F("x", 0o600, xattrs={ACL_ACCESS: rights(6, 4, 0, 4, 0)})}], {"up": F("y", 0o600)})
    os.setxattr(u / "up", ACL_ACCESS, rights(6, 6, 0, 6, 0))

    def opened(name: str, flags: int, uid: int = USER) -> int:
        return child(errno_of, lambda: os.close(os.open(u / name, flags)), uid=uid)

    for _ in range(2):
        assert opened("low", os.O_RDONLY) == 0
        assert opened("low", os.O_RDWR) == 13
        assert opened("low", os.O_RDONLY, USER + 1) == 13
        assert opened("up", os.O_RDWR) == 0
        u.remount()
    os.chmod(u / "up", 0o640)
    assert os.getxattr(u / "up", ACL_ACCESS) == rights(6, 6, 0, 4, 0)
    assert opened("up", os.O_RDWR) == 13
    os.setxattr(u / "low", ACL_ACCESS, rights(6, 6, 4, 6, 4))
    assert (u / "low").stat().st_mode & 0o777 == 0o664
    for _ in range(2):
        assert opened("low", os.O_RDWR) == 0
        assert os.getxattr(u / "low", ACL_ACCESS) == rights(6, 6, 4, 6, 4)
        u.remount()
    os.removexattr(u / "low", ACL_ACCESS)
    assert opened("low", os.O_RDWR) == 13
    plain = acl((ACL_USER_OBJ, 6, NO_ID), (ACL_GROUP_OBJ, 0, NO_ID), (ACL_OTHER, 4, NO_ID))
    os.setxattr(u / "low", ACL_ACCESS, plain)
    assert (u / "low").stat().st_mode & 0o777 == 0o604
    assert child(errno_of, os.setxattr, u / "low", ACL_ACCESS, plain, uid=USER) == 1


@pytest.mark.needs("default_acl")
def test_default_acl(make_union: Maker) -> None:
    """A default ACL is inherited and replaces the umask; directories pass it on; a lower's counts too."""
    default = rights(7, 6, 5, 7, 0)
    u = make_union([{"low": D(0o777, xattrs={ACL_DEFAULT: default})}], {"up": D(0o777)})
    os.setxattr(u / "up", ACL_DEFAULT, default)
    os.umask(0o077)
    for top in ("low", "up"):
        os.close(os.open(u / top / "f", os.O_CREAT | os.O_WRONLY, 0o666))
        os.mkdir(u / top / "d", 0o777)
        os.mkfifo(u / top / "p", 0o666)
        os.close(os.open(u / top / "d/deep", os.O_CREAT | os.O_WRONLY, 0o640))
    for _ in range(2):
        for top in ("low", "up"):
            assert (u / top / "f").stat().st_mode & 0o777 == 0o660, top
            assert (u / top / "d").stat().st_mode & 0o777 == 0o770, top
            assert (u / top / "p").stat().st_mode & 0o777 == 0o660, top
            assert (u / top / "d/deep").stat().st_mode & 0o777 == 0o640, top
            assert os.getxattr(u / top / "d", ACL_DEFAULT) == default
            assert os.getxattr(u / top / "f", ACL_ACCESS) == rights(6, 6, 5, 6, 0)
            assert errno_of(os.getxattr, u / top / "f", ACL_DEFAULT) == 61
        u.remount()
    os.removexattr(u / "up", ACL_DEFAULT)
    os.close(os.open(u / "up/plain", os.O_CREAT | os.O_WRONLY, 0o666))
    assert (u / "up/plain").stat().st_mode & 0o777 == 0o600


def test_many_and_large(make_union: Maker) -> None:
    """As many attributes as the branch takes, listed completely, through a copy-up."""
    xattrs = {f"user.key{i:03}": b"v" * 10 for i in range(60)}
    u = make_union([{"f": F("x", xattrs=xattrs), "w": WHITEOUT}])
    os.chmod(u / "f", 0o600)
    for _ in range(2):
        assert sorted(os.listxattr(u / "f")) == sorted(xattrs)
        u.remount()
    assert errno_of(os.setxattr, u / "f", "user.toobig", b"v" * 65537) == 7
    assert errno_of(os.setxattr, u / "f", "user.full", b"v" * 60000) in (0, 28, 7)
    assert os.getxattr(u / "f", "user.key000") == b"v" * 10


def test_value_of_4000_bytes(make_union: Maker) -> None:
    """The largest that ext4 takes in one block, kept over copy-up and settable anew."""
    value = bytes(range(250)) * 16
    u = make_union([{"f": F("x", xattrs={"user.big": value})}], {"g": "y"})
    os.chmod(u / "f", 0o600)
    os.setxattr(u / "g", "user.big", value)
    for _ in range(2):
        assert os.getxattr(u / "f", "user.big") == os.getxattr(u / "g", "user.big") == value
        u.remount()
