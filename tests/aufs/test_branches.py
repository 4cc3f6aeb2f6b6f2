"""Several branches on real mounts: where things go, what the format is, what full, dead and unfit branches do."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from support.mounts import UNIONFS, is_mounted, wait_for
from support.procs import USER, child, errno_of
from support.sys import mount, umount

from aufs.harness import HELPER, Aufs, command, look
from unionfs.errors import EXIT_BUSY, EXIT_LAYER, EXIT_USAGE

Make = Callable[..., Aufs]


def names(path: Path) -> list[str]:
    return sorted(name for name in os.listdir(path) if not name.startswith(".wh..wh."))


# --- format ---


def test_format(make_aufs: Make, session: str) -> None:
    u = make_aufs(session=session)
    u.branch_dir("img", {"f": "f", "d/x": "x", "e/y": "y", "h": "h"})
    u.mount("a=rw", "img=ro+wh")
    os.unlink(u / "f")
    shutil.rmtree(u / "d")
    os.mkdir(u / "d")
    shutil.rmtree(u / "e")
    (u / "e").write_text("a file now")
    assert names(u.base / "a") == [".wh.e", ".wh.f", "d", "e"] or names(u.base / "a") == [".wh.f", "d", "e"]
    assert os.listdir(u.base / "a/d") == [".wh..wh..opq"]
    st = (u.base / "a/.wh.f").lstat()
    assert stat.S_ISREG(st.st_mode) and st.st_size == 0
    assert os.listdir(u / "d") == []
    for name in (".wh.f", ".wh.new", ".wh..wh..opq", ".wh..wh.plnk"):
        assert errno_of(os.stat, u / name) == 2
        assert errno_of(os.mkdir, u / name) == 1
        assert errno_of(os.rename, u / "h", u / name) == 1
        assert errno_of(os.link, u / "h", u / name) == 1
        assert errno_of(os.symlink, "x", u / name) == 1
    assert sorted(os.listdir(u.merged)) == ["d", "e", "h"]
    os.mknod(u / "zero", stat.S_IFCHR | 0o600, 0)
    assert stat.S_ISCHR((u / "zero").lstat().st_mode)  # to aufs a device like any other
    assert errno_of(os.mkdir, u / ("n" * 252)) == 36
    os.mkdir(u / ("n" * 251))
    assert os.statvfs(u.merged).f_namemax == 251
    u.umount()
    assert not [name for name in os.listdir(u.base / "a") if name.startswith(".wh..wh.")]


def test_whiteouts_of_read_only_branches(make_aufs: Make) -> None:
    """Only with +wh: without it they are neither honoured nor shown."""
    u = make_aufs()
    u.branch_dir("top", {".wh.f": "", "d/.wh..wh..opq": "", "d/new": "n"})
    u.branch_dir("low", {"f": "f", "d/old": "o"})
    for mode, root, d in (("ro", ["d", "f"], ["new", "old"]), ("ro+wh", ["d"], ["new"]), ("rr+wh", ["d"], ["new"])):
        u.mount(f"top={mode}", "low=ro")
        assert (sorted(os.listdir(u.merged)), sorted(os.listdir(u / "d"))) == (root, d)
        u.umount()
    u.mount("top=ro+wh", "low=ro", options="shwh")
    assert sorted(os.listdir(u.merged)) == [".wh.f", "d"]
    assert not (u / "f").exists()


def test_hard_link_over_copy_up(make_aufs: Make) -> None:
    """A pseudo-link: names in different branches are one inode, over a remount too."""
    u = make_aufs()
    u.branch_dir("img", {"f": "f"})
    os.link(u.base / "img/f", u.base / "img/g")
    os.mkdir(u.base / "img/d")
    os.link(u.base / "img/f", u.base / "img/d/h")
    u.mount("a=rw", "b=rw", "img=ro")
    number = (u / "g").stat().st_ino
    with open(u / "f", "a") as f:
        f.write("+")
    for _ in range(2):
        assert {(u / name).read_text() for name in ("f", "g", "d/h")} == {"f+"}
        assert {((u / name).stat().st_ino, (u / name).stat().st_nlink) for name in ("f", "g", "d/h")} == {(number, 3)}
        u.umount()
        u.mount("a=rw", "b=rw", "img=ro")
    for name in ("f", "g", "d/h"):
        os.unlink(u / name)
    u.umount()
    assert [name for name in os.listdir(u.base / "a") if name.startswith(".wh..wh.")] == []


@pytest.mark.parametrize("options", ["", "noxino"])
def test_inode_numbers(make_aufs: Make, options: str) -> None:
    u = make_aufs()
    u.branch_dir("img", {"f": "f", "d/g": "g"})
    u.mount("a=rw", "img=ro", options=options)
    before = {name: (u / name).stat().st_ino for name in ("f", "d", "d/g")}
    for name in ("f", "d/g"):
        with open(u / name, "a") as f:
            f.write("+")
    assert {name: (u / name).stat().st_ino for name in before} == before
    u.umount()
    u.mount("a=rw", "img=ro", options=options)
    after = {name: (u / name).stat().st_ino for name in before}
    assert (after == before) == (options == "")
    assert not [name for name in os.listxattr(u / "f") if "unionfs" in name]


# --- where ---


def test_tdp_and_in_place(make_aufs: Make) -> None:
    u = make_aufs()
    u.branch_dir("a", {"d/x": "a"})
    u.branch_dir("b", {"e/y": "b", "low": "b"})
    u.branch_dir("img", {"d/z": "img", "e/w": "img", "only/v": "img"})
    u.mount("a=rw", "b=rw", "img=ro")
    (u / "d/new").write_text("1")
    (u / "e/new").write_text("2")
    (u / "only/new").write_text("3")
    (u / "low").write_text("in place")
    with open(u / "only/v", "a") as f:
        f.write("+")
    assert names(u.base / "a") == ["d"] and names(u.base / "a/d") == ["new", "x"]
    assert names(u.base / "b/e") == ["new", "y"]
    assert names(u.base / "b/only") == ["new", "v"]
    assert (u.base / "b/low").read_text() == "in place"
    os.unlink(u / "low")
    assert names(u.base / "b") == ["e", "only"]  # nothing below: no whiteout
    os.unlink(u / "e/w")
    assert names(u.base / "a/e") == [".wh.w"]  # topmost writable


def test_whiteout_beats_policy(make_aufs: Make) -> None:
    """What an upper branch has deleted is made anew there, or in a branch above it, whatever the policy says."""
    u = make_aufs()
    u.branch_dir("img", {f"f{i}": "x" for i in range(6)} | {"d/x": "x"})
    u.mount("a=rw", "b=rw", "img=ro", options="create=rr")
    for i in range(6):
        os.unlink(u / f"f{i}")
    shutil.rmtree(u / "d")
    os.mkdir(u / "d")
    for i in range(6):
        (u / f"f{i}").write_text("new")
        (u / f"d/f{i}").write_text("new")
    assert names(u.base / "b") == []
    assert {(u / f"f{i}").read_text() for i in range(6)} == {"new"}
    assert sorted(os.listdir(u / "d")) == [f"f{i}" for i in range(6)]


def test_rename_over_a_file_of_an_upper_branch(make_aufs: Make) -> None:
    """A temporary file of a lower branch replaces a file of an upper one: as rename is, in one step."""
    u = make_aufs()
    u.branch_dir("a", {"d/conf": "old"})
    u.branch_dir("b", {"d/tmp": "new", "d/second": "2"})
    u.mount("a=rw", "b=rw")
    number = (u / "d/tmp").stat().st_ino
    with open(u / "d/tmp", "a") as held:
        os.rename(u / "d/tmp", u / "d/conf")
        held.write("er")
    assert (u / "d/conf").read_text() == "newer"
    assert (u / "d/conf").stat().st_ino == number
    assert (names(u.base / "a/d"), names(u.base / "b/d")) == (["conf"], ["second"])
    os.mkdir(u / "e")
    assert errno_of(os.rename, u / "d", u / "f") == 18  # a directory of two branches


def test_read_only_mounts(make_aufs: Make) -> None:
    u = make_aufs()
    u.branch_dir("img", {"f": "f", "d/g": "g"})
    u.mount("img=ro")
    assert errno_of(lambda: (u / "f").write_text("x")) == 30
    assert errno_of(os.unlink, u / "f") == 30
    assert errno_of(os.mkdir, u / "n") == 30
    assert errno_of(os.chmod, u / "f", 0o600) == 30
    u.umount()
    u.mount("img=ro", "a=rw")  # what is above can't be changed, beside it there is room
    assert errno_of(lambda: (u / "f").write_text("x")) == 30
    assert errno_of(os.unlink, u / "f") == 30
    (u / "new").write_text("n")
    (u / "d/new").write_text("n")
    assert names(u.base / "a") == ["d", "new"]
    os.unlink(u / "new")
    assert errno_of(os.rename, u / "d/new", u / "f") == 30
    u.umount()
    u.mount("a=rw", "img=ro", options="ro")
    assert errno_of(lambda: (u / "new").write_text("x")) == 30


# --- space ---


@pytest.fixture
def small(make_aufs: Make):  # type: ignore[no-untyped-def]
    """A union whose topmost branch is 1 MiB."""
    u = make_aufs()
    top = u.branch_dir("top")
    mount("none", str(top), "tmpfs", "size=1m")
    yield u
    if u.process is not None:
        u.umount()
    umount(top, 2)


def test_full_branch(small: Aufs) -> None:
    """The next create goes elsewhere; so does a copy-up."""
    u = small
    u.branch_dir("img", {"big": "i" * 600_000})
    u.mount("top=rw", "b=rw", "img=ro")
    assert errno_of(lambda: (u / "filler").write_bytes(b"x" * (1 << 21))) == 28
    for i in range(300):
        os.mkdir(u / f"d{i}")
        (u / f"d{i}/f").write_text("here")
    with open(u / "big", "a") as f:
        f.write("+")
    assert (u.base / "b/big").stat().st_size == 600_001
    assert not (u.base / "top/big").exists()
    assert {(u / f"d{i}/f").read_text() for i in range(300)} == {"here"}
    assert u.ask("status")["statistics"]["core"]["driver_status"]["full"] == [str(u.base / "top")]


def test_move_on_full(small: Aufs) -> None:
    u = small
    u.mount("top=rw", "b=rw", options="moveonenospc")
    fd = os.open(u / "log", os.O_CREAT | os.O_RDWR)
    os.fchmod(fd, 0o640)
    os.setxattr(u / "log", "trusted.kept", b"1")
    number = os.fstat(fd).st_ino
    block = os.urandom(1 << 16)
    for i in range(40):
        at = 0
        while at < len(block):
            at += os.pwrite(fd, block[at:], (i << 16) + at)
    os.fsync(fd)
    assert os.pread(fd, 1 << 22, 0) == block * 40
    assert (u / "log").read_bytes() == block * 40
    assert (u.base / "b/log").read_bytes() == block * 40
    assert not (u.base / "top/log").exists()
    st = os.fstat(fd)
    assert (st.st_ino, st.st_mode & 0o777, os.getxattr(u / "log", "trusted.kept")) == (number, 0o640, b"1")
    os.close(fd)


def test_sum(small: Aufs) -> None:
    u = small
    u.mount("top=rw", "b=rw")
    assert os.statvfs(u.merged).f_blocks == os.statvfs(u.base / "top").f_blocks
    u.umount()
    u.mount("top=rw", "b=rw", options="sum")
    merged, parts = os.statvfs(u.merged), [os.statvfs(u.base / name) for name in ("top", "b")]
    total = sum(s.f_blocks * s.f_frsize for s in parts)
    assert abs(merged.f_blocks * merged.f_frsize - total) < 1 << 16


# --- options and bad input ---


def test_option_syntaxes(make_aufs: Make) -> None:
    u = make_aufs()
    for name in ("a", "b:c", "im=g"):
        u.branch_dir(name, {"from " + name: "x"})
    base = u.base
    wanted = [[f"{base}/a", "rw"], [f"{base}/b:c", "rw"], [f"{base}/im=g", "ro+wh"]]
    listed = f"{base}/a=rw:{base}/b\\:c=rw:{base}/im=g=ro+wh"
    for words in (f"br:{listed}", f"br={listed}", f"dirs={listed}"):
        argv = [HELPER, "none", str(u.merged), "-o", f"driver=aufs,create=mfs,{words}"]
        subprocess.run(argv, check=True, timeout=60)
        assert u.ask("status")["branches"] == wanted
        command("umount", u.merged)
    command("mount", "--driver", "aufs", "--lower", base / "im=g", "--upper", base / "a", u.merged)
    (u / "new").write_text("x")
    rows = command("which", u / "new").stdout
    command("umount", u.merged)
    assert str(base / "a") in rows
    assert (base / "a/new").exists()


def test_warn_perm(make_aufs: Make) -> None:
    u = make_aufs()
    u.branch_dir("other").chmod(0o700)
    u.branch_dir("like")
    u.mount("a=rw", "like=ro", "other=ro", options="warn_perm")
    u.branch_dir("third").chmod(0o711)
    u.change(("append", None, "third", "ro"))
    u.umount()
    said = [line for line in u.log.read_text().splitlines() if "warn_perm" in line]
    assert [str(u.base / "other") in said[0], str(u.base / "third") in said[1], "700 0:0" in said[0]] == [True] * 3
    u.mount("a=rw", "other=ro")
    u.umount()
    assert u.log.read_text().count("warn_perm") == 2


def test_dirperm1(make_aufs: Make) -> None:
    """A directory that is closed in a lower branch and open in the topmost one is open."""
    u = make_aufs()
    u.branch_dir("img", {"d/f": "f"})
    (u.base / "img/d").chmod(0o700)
    u.base.chmod(0o755)
    u.mount("a=rw", "img=ro", options="dirperm1")
    assert errno_of(child, os.stat, u / "d/f", uid=USER) == 13
    os.chmod(u / "d", 0o755)
    assert child(lambda: (u / "d/f").read_text(), uid=USER) == "f"
    assert (u.base / "img/d").stat().st_mode & 0o777 == 0o700


def test_diropq(make_aufs: Make) -> None:
    u = make_aufs()
    for word, marked in (("always", True), ("whiteouted", False)):
        u.mount(f"{word}=rw", "img=ro", options=f"diropq={word}")
        os.mkdir(u / "new")
        u.umount()
        assert (u.base / word / "new/.wh..wh..opq").exists() == marked


def test_noplink(make_aufs: Make) -> None:
    u = make_aufs()
    u.branch_dir("img", {"f": "f"})
    os.link(u.base / "img/f", u.base / "img/g")
    u.mount("a=rw", "img=ro", options="noplink")
    with open(u / "f", "a") as f:
        f.write("+")
    u.drop_caches()
    assert (u / "f").read_text() == "f+" and (u / "g").read_text() == "f"


ACCEPTED = (
    "create_policy=mfs,copyup_policy=bu", "copyup=bup", "dirwh=3,rdcache=10,rdblk=4096,rdhash=32", "rdblk=def,acl,dio",
    "nosum,noshwh,nodirren,nowarn_perm", "wsum,xino,plink,verbose", "quiet,notrunc_xib,moveonenospc=off",
)  # fmt: skip


@pytest.mark.parametrize("options", ACCEPTED)
def test_accepted_options(make_aufs: Make, options: str) -> None:
    u = make_aufs()
    u.branch_dir("img", {"d/f": "f"})
    u.mount("a=rw", "b=rw", "img=ro", options=options)
    with open(u / "d/f", "a") as f:
        f.write("+")
    assert (u / "d/f").read_text() == "f+"
    assert u.ask("status")["statistics"]["core"]["driver_status"]["create"] == ("mfs" if "mfs" in options else "tdp")


BAD = (
    (["a=rw", "a=ro"], "", EXIT_LAYER, "also"),
    (["a=rw", "a/in=ro"], "", EXIT_LAYER, "inside"),
    (["a=rw", "none=ro"], "", EXIT_LAYER, "none"),
    (["a=rw", "file=ro"], "", EXIT_LAYER, "not a directory"),
    (["a=wr"], "", EXIT_USAGE, "wr"),
    (["a=rw+coo_all"], "", EXIT_USAGE, "coo_all"),
    (["a=rw"], "create=mfss", EXIT_USAGE, "mfs"),
    (["a=rw"], "cpup=up", EXIT_USAGE, "cpup=up"),
    (["a=rw"], "shwh", EXIT_USAGE, "shwh"),
    (["a=rw"], "diropq=never", EXIT_USAGE, "diropq"),
    (["a=rw"], "udba=often", EXIT_USAGE, "udba"),
    (["a=rw"], "udba=notify,guard=on", EXIT_USAGE, "guard"),
    (["a=rw"], "udba=reval,writeback=1", EXIT_USAGE, "writeback"),
    (["a=rw"], "xino=/x", EXIT_USAGE, "xino=/x"),
    (["a=rw"], "dirwh=many", EXIT_USAGE, "dirwh=many"),
    (["a=rw"], "nodirperm1", EXIT_USAGE, "nodirperm1"),
    (["a=rw"], "trunc_xib", EXIT_USAGE, "no table file"),
    (["a=rw"], "coo=all", EXIT_USAGE, "first write"),
    (["a=rw"], "fhsm_sec=3", EXIT_USAGE, "daemon"),
    (["a=rw"], "create=mfs,create_policy=rr", EXIT_USAGE, "the same option"),
    (["a=rw"], "creat=mfs", EXIT_USAGE, "did you mean create"),
)


@pytest.mark.parametrize("branches, options, code, said", BAD)
def test_bad_mounts(make_aufs: Make, branches: list[str], options: str, code: int, said: str) -> None:
    u = make_aufs()
    u.branch_dir("a", {"in/x": "x"})
    (u.base / "file").write_text("")
    argv = [part for branch in branches for part in ("--branch", f"{u.base}/{branch}")]
    done = command("mount", "--driver", "aufs", *argv, *(["-o", options] if options else []), u.merged, check=False)
    assert done.returncode == code and said in done.stderr and len(done.stderr.splitlines()) == 1, done
    assert not is_mounted(u.merged)
    assert os.listdir(u.base / "a") == ["in"]


def test_branch_in_use_by_another_mount(make_aufs: Make) -> None:
    u = make_aufs()
    u.mount("a=rw", "b=rw")
    other = make_aufs()
    done = command("mount", "--driver", "aufs", "--branch", f"{u.base}/b=rw", other.merged, check=False)
    assert done.returncode == EXIT_BUSY and str(u.base / "b") in done.stderr
    shared = make_aufs()
    shared.mount("c=rw")
    shared.ask("branch", changes=[["append", None, str(u.base / "b"), "ro"]])  # reading is for everybody


def test_overlay_takes_no_branches(make_aufs: Make) -> None:
    u = make_aufs()
    u.branch_dir("a")
    done = command("mount", "--branch", f"{u.base}/a=rw", u.merged, check=False)
    assert done.returncode == EXIT_USAGE and "aufs" in done.stderr


def test_dead_branch(make_aufs: Make) -> None:
    """A branch whose filesystem died: what is above it works, the rest says so, the branch can be taken away."""
    u = make_aufs()
    u.branch_dir("top", {"d/f": "top", "t": "top"})
    u.branch_dir("low", {"l": "low", "d/l": "low"})
    inner = make_aufs()
    inner.branch_dir("x", {"d/g": "x", "g": "x"})
    inner.mount("x=ro")
    (u.base / "dead").symlink_to(inner.merged)
    u.mount("top=rw", "dead=ro", "low=ro")
    assert (u / "g").read_text() == "x"
    assert inner.process is not None
    inner.process.kill()
    inner.process.wait()
    inner.process = None
    u.drop_caches()
    try:
        assert (u / "t").read_text() == "top"
        assert (u / "d/f").read_text() == "top"
        with open(u / "t", "a") as f:
            f.write("+")
        u.change(("del", None, "dead", ""))
        assert (u / "l").read_text() == "low"
        assert sorted(look(u.merged)) == ["d", "d/f", "d/l", "l", "t"]
        done = command("branch", "add", u.merged, f"{inner.merged}=ro", check=False)
        assert done.returncode == EXIT_LAYER and str(inner.merged) in done.stderr
    finally:
        wait_for(lambda: not is_mounted(inner.merged) or umount(inner.merged, 2) is None, "the dead mount to go")


def test_many_branches(make_aufs: Make) -> None:
    """Sixty-four of them: all seen, the topmost wins."""
    u = make_aufs()
    for i in range(64):
        u.branch_dir(f"b{i}", {f"f{i}": str(i), "all": str(i), "d/all": str(i), f"d/f{i}": ""})
    u.mount("a=rw", *(f"b{i}=ro" for i in range(64)))
    assert (u / "all").read_text() == "0"
    assert len(os.listdir(u / "d")) == 65
    assert (u / "f63").read_text() == "63"
    assert errno_of(os.stat, u / "none") == 2


def test_which_and_diff(make_aufs: Make) -> None:
    u = make_aufs()
    u.branch_dir("b", {"d/mine": "b"})
    u.branch_dir("img", {"f": "f", "gone": "g", "d/x": "x"})
    u.mount("a=rw", "b=rw", "img=ro")
    os.unlink(u / "gone")
    with open(u / "f", "a") as f:
        f.write("+")
    (u / "d/new").write_text("n")
    rows = u.ask("which", path="/gone")
    assert [(row["state"], row["branch"]) for row in rows] == [
        ("whiteout", str(u.base / "a")), ("shadowed", str(u.base / "img"))]  # fmt: skip
    rows = u.ask("which", path="/f")
    assert [(row["state"], row["permission"]) for row in rows] == [("shown", "rw"), ("shadowed", "ro")]
    (u / "d/x").read_text()
    layers = u.ask("status")["statistics"]["core"]["layers"]
    assert [(row["permission"], row["known"] > 0) for row in layers] == [("rw", True), ("rw", True), ("ro", True)]
    assert all(abs(row["free"] - shutil.disk_usage(u.base).free) < 1 << 30 for row in layers)
    shown = command("status", u.merged).stdout
    assert f"{u.base}/b rw (" in shown and "GiB free" in shown
    changed = [tuple(row) for row in u.ask("diff")]
    assert changed == [("C", "/d"), ("A", "/d/mine"), ("A", "/d/new"), ("C", "/f"), ("D", "/gone")]


assert UNIONFS and sys
