"""Branches that come, change and go under a mounted union, with files open and processes at work."""

from __future__ import annotations

import os
import random
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.procs import errno_of

from aufs.harness import HELPER, Aufs, command, look, merge
from unionfs.errors import EXIT_BUSY, EXIT_LAYER, EXIT_USAGE, MountError

Make = Callable[..., Aufs]


def refused(union: Aufs, *row: object) -> MountError:
    with pytest.raises(MountError) as caught:
        union.change(row)  # type: ignore[arg-type]
    return caught.value


def test_add_and_delete_are_seen_at_once(make_aufs: Make, session: str) -> None:
    """Names, absences, listings, attributes and contents that the kernel had cached."""
    u = make_aufs(session=session)
    u.branch_dir("top", {"d/mine": "top"})
    u.branch_dir("low", {"a": "low a", "d/f": "low f", "gone": "low"})
    u.branch_dir("x", {"a": "x a: longer", "d/f/deep": "x", "d/new": "x new", "only": "x", ".wh.gone": "", "e/g": "x"})
    u.mount("top=rw", "low=ro")
    before = look(u.merged)
    absent = ("d/new", "only", "d/f/deep", "e", "e/g")
    for _ in range(3):
        assert [errno_of(os.stat, u / name) for name in absent] == [2, 2, 20, 2, 2]
        assert (u / "a").stat().st_size == 5
        assert sorted(os.listdir(u / "d")) == ["f", "mine"]
        assert u.change(("insert", 1, "x", "ro+wh")) == ["top=rw", "x=ro+wh", "low=ro"]
        assert (u / "a").read_text() == "x a: longer"
        assert (u / "a").stat().st_size == 11
        assert sorted(os.listdir(u / "d")) == ["f", "mine", "new"]
        assert os.listdir(u / "d/f") == ["deep"]
        assert not (u / "gone").exists()
        assert (u / "e/g").read_text() == "x"
        assert u.change(("del", None, "x", "")) == ["top=rw", "low=ro"]
        assert look(u.merged) == before


def test_open_files_stay(make_aufs: Make, session: str) -> None:
    """A descriptor keeps its file when another branch hides it, and still writes to it."""
    u = make_aufs(session=session)
    u.branch_dir("low", {"f": "low", "d/g": "low g"})
    u.branch_dir("x", {"f": "x", ".wh.d": ""})
    u.mount("rw=rw", "low=ro")
    (u / "mine").write_text("mine")
    with open(u / "f") as f, open(u / "mine", "a") as mine, open(u / "d/g") as g:
        u.change(("prepend", None, "x", "ro+wh"))
        assert (u / "f").read_text() == "x"
        assert not (u / "d").exists()
        assert (f.read(), g.read()) == ("low", "low g")
        mine.write("+")
        mine.flush()
        u.change(("del", None, "x", ""))
        assert (u / "mine").read_text() == "mine+"
        assert (u / "f").read_text() == "low"


def test_working_directory_stays(make_aufs: Make) -> None:
    u = make_aufs()
    u.branch_dir("low", {"d/f": "low"})
    u.branch_dir("x", {"d/g": "x"})
    u.mount("rw=rw", "low=ro")
    here = os.open(u / "d", os.O_RDONLY)
    try:
        u.change(("append", None, "x", "ro"))
        assert sorted(os.listdir(here)) == ["f", "g"]
        os.close(os.open("new", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        u.change(("del", None, "x", ""))
        assert sorted(os.listdir(here)) == ["f", "new"]
    finally:
        os.close(here)
    assert (u.base / "rw/d/new").exists()


@pytest.mark.parametrize("data", ["noopen", "cached", "passthrough"])
def test_busy_branch(make_aufs: Make, data: str) -> None:
    """What only the branch has and somebody uses keeps it, by name; --wait waits; the branch is free afterwards."""
    u = make_aufs(data=data)
    u.branch_dir("x", {"f": "x", "d/g": "x", "read": "x", "e/h": "x"})
    u.mount("rw=rw", "x=ro")
    (u / "read").read_text()
    f = os.open(u / "f", os.O_RDONLY)
    d = os.open(u / "d", os.O_RDONLY)
    error = refused(u, "del", None, "x", "")
    assert error.code == EXIT_BUSY
    assert "/f" in str(error) and "/d" in str(error) and "/read" not in str(error) and "/e" not in str(error)
    os.close(d)
    assert "/d" not in str(refused(u, "del", None, "x", ""))
    done = command("branch", "del", u.merged, u.base / "x", check=False)
    assert done.returncode == EXIT_BUSY and "/f" in done.stderr and len(done.stderr.splitlines()) == 1
    threading.Timer(0.5, os.close, (f,)).start()
    assert f"{u.base}/x=" not in command("branch", "del", "--wait", u.merged, u.base / "x").stdout
    assert os.listdir(u.merged) == []
    assert u.process is not None
    held = [os.readlink(f"/proc/{u.process.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{u.process.pid}/fd")
            if os.path.islink(f"/proc/{u.process.pid}/fd/{fd}")]  # fmt: skip
    assert not [path for path in held if path.startswith(str(u.base / "x"))]


def test_mapped_file_keeps_the_branch(make_aufs: Make) -> None:
    import mmap

    u = make_aufs()
    u.branch_dir("x", {"f": "mapped"})
    u.mount("rw=rw", "x=ro")
    with open(u / "f", "rb") as f:
        mapping = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
    assert refused(u, "del", None, "x", "").code == EXIT_BUSY
    mapping.close()
    u.change(("del", None, "x", ""))


def test_mod_to_read_only_and_back(make_aufs: Make, session: str) -> None:
    """Descriptors that were open for writing do not write to a branch that became read-only."""
    u = make_aufs(session=session)
    u.mount("a=rw", "b=rw", options="create=rr")
    for i in range(4):
        (u / f"f{i}").write_text("1")
    in_b = [name for name in os.listdir(u.base / "b") if name.startswith("f")]
    assert len(in_b) == 2
    with open(u / in_b[0], "a") as f:
        u.change(("mod", None, "b", "ro"))
        f.write("2")
        f.flush()
        assert (u / in_b[0]).read_text() == "12"
    assert (u.base / "b" / in_b[0]).read_text() == "1"
    assert (u.base / "a" / in_b[0]).read_text() == "12"
    assert not (u.base / "b/.wh..wh.orph").exists()
    u.change(("mod", None, "b", "rw"), ("mod", None, "a", "ro"))
    assert errno_of(lambda: (u / in_b[0]).write_text("x")) == 30  # its copy in a hides what b could take
    (u / in_b[1]).write_text("in place")
    assert (u.base / "b" / in_b[1]).read_text() == "in place"


def test_hard_links_of_a_branch_that_closes(make_aufs: Make, session: str) -> None:
    """Names that were linked by way of a pseudo-link are real in it then, and still one file to who has it open."""
    u = make_aufs(session=session)
    u.branch_dir("low", {"d/f": "low"})
    for name in ("g", "e h"):
        os.link(u.base / "low/d/f", u.base / "low" / name)
    u.mount("a=rw", "b=rw", "low=ro", options="cpup=bu")
    names = ("d/f", "g", "e h")
    with open(u / "g", "a") as g, open(u / "e h") as h:
        g.write("+")
        g.flush()
        number = (u / "e h").stat().st_ino
        for mode in ("ro", "rw", "ro"):
            u.change(("mod", None, "b", mode))
            assert {(u / name).read_text() for name in names} == {"low+"}
            assert {((u / name).stat().st_ino, (u / name).stat().st_nlink) for name in names} == {(number, 3)}
        assert h.read() == "low+"
    assert not [name for name in os.listdir(u.base / "b") if name.startswith(".wh..wh.")]
    assert {(u.base / "b" / name).read_text() for name in names} == {"low+"}
    with open(u / "d/f", "a") as f:
        f.write("+")
    assert {(u / name).read_text() for name in names} == {"low++"}


def test_remount_helper(make_aufs: Make) -> None:
    """aufs's own spellings, through the helper that mount(8) runs; left to right, all or nothing."""
    u = make_aufs()
    for name in ("x", "y", "z"):
        u.branch_dir(name, {name: name})
    u.mount("a=rw")

    def remount(words: str) -> subprocess.CompletedProcess[str]:
        argv = [HELPER, "none", str(u.merged), "-o", f"rw,relatime,user_id=0,group_id=0,remount,{words}"]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60)

    assert remount(f"add:1:{u.base}/x=ro,append:{u.base}/y=ro+wh,prepend={u.base}/z").returncode == 0
    assert [row[0] for row in u.ask("status")["branches"]] == [f"{u.base}/{name}" for name in "zaxy"]
    assert sorted(os.listdir(u.merged)) == ["x", "y", "z"]
    done = remount(f"del:{u.base}/x,mod:{u.base}/none=rw")
    assert done.returncode == EXIT_LAYER and "none" in done.stderr
    assert len(u.ask("status")["branches"]) == 4
    assert remount(f"mod:{u.base}/y=rw,del={u.base}/x,del:{u.base}/z").returncode == 0
    assert u.ask("status")["branches"] == [[f"{u.base}/a", "rw"], [f"{u.base}/y", "rw"]]
    for words in ("", "ad:1:/x", "add:/x=ro", "add:1:/x=wr", "create=rr"):
        done = remount(words)
        assert done.returncode in (EXIT_USAGE, EXIT_LAYER) and len(done.stderr.splitlines()) == 1, words


def test_bad_changes(make_aufs: Make) -> None:
    u = make_aufs()
    u.branch_dir("x", {"in/side": ""})
    u.mount("a=rw", "x=ro")
    u.branch_dir("y")
    os.symlink("x", u.base / "link")
    for row, code, said in (
        (("add", None, "none", "ro"), EXIT_LAYER, "none"),
        (("add", None, "x", "ro"), EXIT_LAYER, "also"),
        (("add", None, "link", "ro"), EXIT_LAYER, "also"),
        (("add", None, "x/in", "ro"), EXIT_LAYER, "inside"),
        (("add", None, "", "ro"), EXIT_LAYER, ""),
        (("add", None, "merged", "ro"), EXIT_LAYER, "mount"),
        (("insert", 7, "y", "ro"), EXIT_USAGE, "position"),
        (("add", None, "y", "wr"), EXIT_USAGE, "wr"),
        (("add", None, "y", "ro+coo_all"), EXIT_USAGE, "coo_all"),
        (("del", None, "y", ""), EXIT_LAYER, "not a branch"),
        (("mod", None, "y", "ro"), EXIT_LAYER, "not a branch"),
        (("take", None, "y", "ro"), EXIT_USAGE, "take"),
    ):
        error = refused(u, *row)
        assert error.code == code and said in str(error), (row, error)
        assert os.listdir(u.base / "y") == []
    u.change(("del", None, "x", ""))
    assert "last" in str(refused(u, "del", None, "a", ""))
    other = make_aufs()
    other.mount("b=rw")
    with pytest.raises(MountError) as caught:
        other.ask("branch", changes=[["add", None, str(u.base / "a"), "rw"]])
    assert caught.value.code == EXIT_BUSY


def test_hundred_changes_under_load(make_aufs: Make, session: str) -> None:
    """Readers, writers and listers while branches come and go a hundred times: no wrong byte, no strange error."""
    u = make_aufs(session=session)
    names = [f"f{i}" for i in range(30)]
    for branch in ("x", "y", "low"):
        tree = {f"{folder}{name}": f"{branch} {folder}{name} ".ljust(5000, branch[0]) for name in names
                for folder in ("", "d/", "d/e/")}  # fmt: skip
        u.branch_dir(branch, tree)
    u.branch_dir("z", {f".wh.{name}": "" for name in names[::3]} | {"d/.wh.e": "", "z": "z"})
    u.mount("a=rw", "b=rw", "low=ro", options="create=rr")
    stop = threading.Event()
    problems: list[str] = []
    done = {"read": 0, "write": 0, "list": 0, "kept": 0}

    def guarded(work: Callable[[random.Random], None], seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            try:
                work(rng)
            except FileNotFoundError:
                pass  # what a whiteout of z implies
            except Exception as error:
                problems.append(f"{work.__name__}: {error!r}")
                return

    def read(rng: random.Random) -> None:
        path = rng.choice(("", "d/", "d/e/")) + rng.choice(names)
        text = (u / path).read_text()
        assert text in {f"{branch} {path} ".ljust(5000, branch[0]) for branch in ("x", "y", "low")}, (path, text[:50])
        done["read"] += 1

    def kept(rng: random.Random) -> None:
        with open(u / ("d/" + rng.choice(names))) as f:
            first = os.pread(f.fileno(), 100, 0)
            time.sleep(0.01)
            assert os.pread(f.fileno(), 100, 0) == first
            assert os.fstat(f.fileno()).st_size == 5000
        done["kept"] += 1

    def write(rng: random.Random) -> None:
        path = u / f"new{rng.randrange(10**9)}"
        path.write_text("w" * 3000)
        with open(path, "a") as f:
            f.write("+")
        os.rename(path, str(path) + "r")
        assert (u / (path.name + "r")).read_text() == "w" * 3000 + "+"
        os.unlink(str(path) + "r")
        done["write"] += 1

    def listing(rng: random.Random) -> None:
        listed = os.listdir(u / rng.choice((".", "d")))
        assert len(set(listed)) == len(listed)
        done["list"] += 1

    jobs = (read, read, kept, write, listing)
    threads = [threading.Thread(target=guarded, args=(work, seed)) for seed, work in enumerate(jobs)]
    for thread in threads:
        thread.start()
    rng = random.Random(7)
    present: list[str] = []
    busy = changes = 0
    try:
        while changes < 100 and not problems:
            name = rng.choice(("x", "y", "z"))
            try:
                if name not in present:
                    u.change(("insert", rng.randint(0, 3), name, "ro+wh"))
                    present.append(name)
                elif rng.random() < 0.3:
                    u.change(("mod", None, name, rng.choice(("ro", "ro+wh", "rr+wh"))))
                else:
                    u.change(("del", None, name, ""))
                    present.remove(name)
            except MountError as error:
                assert error.code == EXIT_BUSY, error
                busy += 1
            changes += 1
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not problems, problems
    assert all(done.values()), done
    assert changes - busy >= 30, (changes, busy)
    rows = u.ask("status")["branches"]
    assert look(u.merged) == merge([(Path(path), mode) for path, mode in rows])
