"""Changes made directly in a branch: not looked for (udba=none), seen at the next access (reval), told (notify)."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.mounts import wait_for
from support.procs import errno_of

from aufs.harness import Aufs, look, merge

Make = Callable[..., Aufs]
TREES = {
    "a": {"d/mine": "a mine"},
    "b": {"d/in b": "b", "e/f": "b e/f"},
    "img": {"f": "img f", "d/x": "img x", "d/s/deep": "img deep", "g": "img g", "e/g": "img e/g"},
}


@pytest.fixture(params=["reval", "notify"])
def udba(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def union(make_aufs: Make, udba: str, session: str = "direct", data: str = "", more: str = "") -> Aufs:
    u = make_aufs(session=session, data=data)
    for name, tree in TREES.items():
        u.branch_dir(name, tree)
    return u.mount("a=rw", "b=rw", "img=ro+wh", options=f"udba={udba}{more}")


def settle(u: Aufs, udba: str, condition: Callable[[], bool], what: str) -> None:
    """With reval the next access has to see it; an event takes its time."""
    if udba == "reval":
        assert condition(), what
        return

    def holds() -> bool:
        try:
            return condition()
        except OSError:
            return False

    wait_for(holds, what, 20)


def outside(u: Aufs) -> dict[str, object]:
    return dict(u.ask("status")["statistics"]["core"]["outside"])


def replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent.parent / f"{path.name}.tmp"
    temporary.write_text(text)
    os.rename(temporary, path)


def restore(kept: Path, branch: Path) -> None:
    """What is not as it was, and nothing else."""
    wanted, now = look(kept), {path: text for path, text in look(branch).items() if not path.startswith(".wh..wh.")}
    for path in sorted(now.keys() - wanted.keys(), reverse=True):
        (os.rmdir if now[path] is None else os.unlink)(branch / path)
    for path, text in sorted(wanted.items()):
        if text is not None and now.get(path) != text:
            (branch / path).write_bytes(text)


CHANGES: dict[str, tuple[Callable[[Path], object], Callable[[Aufs], bool]]] = {
    "a file": (lambda at: (at / "b/new").write_text("new"), lambda u: (u / "new").read_text() == "new"),
    "content": (lambda at: (at / "img/f").write_text("other"), lambda u: (u / "f").read_text() == "other"),
    "longer": (lambda at: (at / "img/f").write_text("f" * 9000), lambda u: (u / "f").read_text() == "f" * 9000),
    "another file": (lambda at: replace(at / "img/d/x", "IMG X"), lambda u: (u / "d/x").read_text() == "IMG X"),
    "hides": (lambda at: (at / "a/f").write_text("a f"), lambda u: (u / "f").read_text() == "a f"),
    "mode": (lambda at: (at / "img/f").chmod(0o600), lambda u: (u / "f").stat().st_mode & 0o777 == 0o600),
    "gone": (lambda at: (at / "img/f").unlink(), lambda u: not (u / "f").exists()),
    "moved": (
        lambda at: os.rename(at / "img/f", at / "img/d/f"),
        lambda u: not (u / "f").exists() and (u / "d/f").read_text() == "img f",
    ),
    "whiteout": (lambda at: (at / "a/.wh.f").touch(), lambda u: not (u / "f").exists()),
    "directory": (lambda at: (at / "img/f").unlink() or (at / "img/f").mkdir(), lambda u: os.listdir(u / "f") == []),
    "joins": (
        lambda at: replace(at / "a/d/s/more", "more"),
        lambda u: sorted(os.listdir(u / "d/s")) == ["deep", "more"] and (u / "d/s/more").read_text() == "more",
    ),
    "opaque": (lambda at: (at / "a/d/.wh..wh..opq").touch(), lambda u: os.listdir(u / "d") == ["mine"]),
    "opaque root": (
        lambda at: (at / "a/.wh..wh..opq").touch(),
        lambda u: os.listdir(u.merged) == ["d"] and os.listdir(u / "d") == ["mine"],
    ),
    "tree": (
        lambda at: shutil.rmtree(at / "img/d"),
        lambda u: sorted(os.listdir(u / "d")) == ["in b", "mine"] and errno_of(os.stat, u / "d/s/deep") == 2,
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_seen(make_aufs: Make, session: str, udba: str, what: str) -> None:
    """Whatever the kernel and we had remembered: names, absences, listings, attributes, pages."""
    u = union(make_aufs, udba, session)
    for _ in range(2):
        look(u.merged)
        assert [errno_of(os.stat, u / name) for name in ("new", "d/f", "d/s/more")] == [2, 2, 2]
    change, seen = CHANGES[what]
    time.sleep(0.02)  # a clock tick: the change has another mtime
    change(u.base)
    settle(u, udba, lambda: seen(u), what)
    wanted = merge([(u.base / "a", "rw"), (u.base / "b", "rw"), (u.base / "img", "ro+wh")])
    settle(u, udba, lambda: look(u.merged) == wanted, "all of it")


@pytest.mark.parametrize("what", ["a file", "content", "gone", "joins"])
def test_undone_and_done_again(make_aufs: Make, udba: str, what: str) -> None:
    u = union(make_aufs, udba)
    kept = u.base / "kept"
    for name in TREES:
        shutil.copytree(u.base / name, kept / name, symlinks=True)
    change, seen = CHANGES[what]
    before = look(u.merged)
    for _ in range(5):
        time.sleep(0.02)
        change(u.base)
        settle(u, udba, lambda: seen(u), what)
        time.sleep(0.02)
        for name in TREES:
            restore(kept / name, u.base / name)
        settle(u, udba, lambda: look(u.merged) == before, "the first state")


def test_none_looks_for_nothing(make_aufs: Make) -> None:
    u = union(make_aufs, "none")
    before = look(u.merged)
    (u.base / "img/f").write_text("img F")
    (u.base / "b/new").write_text("new")
    time.sleep(0.1)
    assert look(u.merged) == before
    assert "outside" not in u.ask("status")["statistics"]["core"]


@pytest.mark.parametrize("data", ["noopen", "cached", "passthrough"])
def test_data_modes(make_aufs: Make, udba: str, data: str) -> None:
    """An open file, and a mapped page of the next open."""
    u = union(make_aufs, udba, data=data)
    with open(u / "g", "rb") as f:
        assert os.pread(f.fileno(), 100, 0) == b"img g"
        time.sleep(0.02)
        (u.base / "img/g").write_text("IMG G!")
        settle(u, udba, lambda: os.pread(f.fileno(), 100, 0) == b"IMG G!", "the open file")
        assert os.fstat(f.fileno()).st_size == 6
    replace(u.base / "img/g", "third")
    settle(u, udba, lambda: (u / "g").read_text() == "third", "the file in its place")
    with open(u / "g", "a") as f:  # copies up
        f.write("+")
    assert (u / "g").read_text() == "third+" and (u.base / "a/g").read_text() == "third+"
    (u.base / "a/g").unlink()
    settle(u, udba, lambda: (u / "g").read_text() == "third", "the file below")


def test_open_file_that_others_take_away(make_aufs: Make, session: str, udba: str) -> None:
    """Its bytes stay for who has read from it; the name is another file's, or nobody's."""
    u = union(make_aufs, udba, session)
    with open(u / "f") as f, open(u / "d/x") as x:
        assert (f.read(), x.read()) == ("img f", "img x")
        replace(u.base / "img/f", "second f, longer")
        (u.base / "img/d/x").unlink()
        settle(u, udba, lambda: (u / "f").read_text() == "second f, longer", "the new file")
        settle(u, udba, lambda: not (u / "d/x").exists(), "the absence")
        assert os.pread(f.fileno(), 100, 0) == b"img f"
        assert os.pread(x.fileno(), 100, 0) == b"img x"


def test_working_directory(make_aufs: Make, session: str, udba: str) -> None:
    """By a directory's descriptor, with no lookup of what leads to it."""
    u = union(make_aufs, udba, session)
    here = os.open(u / "d/s", os.O_RDONLY)
    try:
        assert os.listdir(here) == ["deep"]
        replace(u.base / "b/d/s/other", "b")
        settle(u, udba, lambda: sorted(os.listdir(here)) == ["deep", "other"], "the listing")
        replace(u.base / "a/d/s/third", "a")
        settle(u, udba, lambda: os.stat("third", dir_fd=here).st_size == 1, "the name")
        os.close(os.open("made", os.O_CREAT | os.O_WRONLY, dir_fd=here))
        assert (u.base / "a/d/s/made").exists()
    finally:
        os.close(here)


def test_what_others_put_there_is_not_removed(make_aufs: Make, udba: str) -> None:
    """A directory that was empty when it was last listed, and is not now."""
    u = union(make_aufs, udba)
    os.mkdir(u / "mine")
    assert os.listdir(u / "mine") == []
    (u.base / "a/mine/precious").write_text("precious")
    assert errno_of(os.rmdir, u / "mine") == 39
    assert (u.base / "a/mine/precious").read_text() == "precious"
    os.mkdir(u / "over")
    (u.base / "a/over/precious").write_text("precious")
    os.mkdir(u / "from")
    assert errno_of(os.rename, u / "from", u / "over") == 39
    assert (u.base / "a/over/precious").read_text() == "precious"
    assert sorted(os.listdir(u.merged)) == ["d", "e", "f", "from", "g", "mine", "over"]


def test_own_changes_cost_no_invalidation(make_aufs: Make, session: str) -> None:
    """What we write in a branch comes back as events: they must not empty the kernel's caches."""
    u = union(make_aufs, "notify", session)
    for i in range(300):
        (u / f"d/n{i}").write_text(f"{i}" * 100)
        with open(u / f"d/n{i}", "a") as f:
            f.write("+")
    for i in range(0, 300, 3):
        os.rename(u / f"d/n{i}", u / f"d/r{i}")
    for i in range(1, 300, 3):
        os.unlink(u / f"d/n{i}")
    with open(u / "d/x", "a") as f:
        f.write("copied up")
    expected = look(u.merged)

    def quiet() -> bool:
        before = outside(u)["events"]
        time.sleep(0.1)
        return outside(u)["events"] == before

    wait_for(quiet, "the events to be over", 30)
    assert int(str(outside(u)["events"])) > 900
    assert int(str(outside(u)["renewed"])) < 60  # most are told from others' by a stat
    assert look(u.merged) == expected

    def messages() -> dict[str, int]:
        counts = u.ask("status")["statistics"]["session"]["messages"]
        return {name: counts.get(name, 0) for name in ("LOOKUP", "GETATTR", "READ")}

    before = messages()
    assert look(u.merged) == expected
    assert sum(messages().values()) - sum(before.values()) < 10


def test_overflow(make_aufs: Make, session: str) -> None:
    """More changes than the kernel keeps events for: everything is looked at again."""
    u = union(make_aufs, "notify", session)
    queue = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())
    for name in ("f", "g", "d/x"):
        (u / name).read_text()
    look(u.merged)
    with open(u / "d/s/deep", "rb") as deep:
        deep.read()
        assert u.process is not None
        u.process.send_signal(signal.SIGSTOP)
        try:
            time.sleep(0.05)
            for i in range(queue // 2 + 100):
                (u.base / "b" / f"many{i % 400}").write_text("")
                (u.base / "b" / f"many{i % 400}").unlink()
            (u.base / "img/f").write_text("after the overflow")
            (u.base / "img/d/s/deep").write_text("deep, after")
            (u.base / "img/g").unlink()
            (u.base / "b/last").write_text("last")
        finally:
            u.process.send_signal(signal.SIGCONT)
        wait_for(lambda: outside(u)["overflows"] != 0, "the overflow")
        wait_for(lambda: os.pread(deep.fileno(), 100, 0) == b"deep, after", "the open file")
    wanted = merge([(u.base / "a", "rw"), (u.base / "b", "rw"), (u.base / "img", "ro+wh")])
    wait_for(lambda: look(u.merged) == wanted, "the whole tree", 20)


def test_watches_go_with_their_directories(make_aufs: Make) -> None:
    u = make_aufs()
    for i in range(50):
        u.branch_dir("img", {f"d{i}/f": "x"})
    u.mount("a=rw", "img=ro", options="udba=notify")
    look(u.merged)
    assert int(str(outside(u)["watches"])) >= 50
    u.drop_caches()
    wait_for(lambda: int(str(outside(u)["watches"])) < 20, "the watches to go")
    (u.base / "img/d7/new").write_text("new")
    assert (u / "d7/new").read_text() == "new"


def test_natively_read_only_branches_are_not_watched(make_aufs: Make) -> None:
    """rr promises that nobody can change it; a change of the permission makes it a branch like any other."""
    u = make_aufs()
    u.branch_dir("img", {f"d{i}/f": "x" for i in range(20)})
    u.mount("a=rw", "img=rr", options="udba=notify")
    look(u.merged)
    assert int(str(outside(u)["watches"])) < 20 and outside(u)["unwatched"] == []
    replace(u.base / "a/d2/new", "seen")
    settle(u, "notify", lambda: (u / "d2/new").read_text() == "seen", "the other branch's file")
    assert int(str(outside(u)["watches"])) < 20
    u.change(("mod", None, "img", "ro"))
    look(u.merged)
    (u.base / "img/d3/f").write_text("looked for")
    settle(u, "notify", lambda: (u / "d3/f").read_text() == "looked for", "the branch's own file")


LIMITED = """
import os, subprocess, sys, time
unionfs, base = sys.argv[1:]
open("/proc/sys/user/max_inotify_watches", "w").write("12")
argv = [unionfs, "mount", "--driver", "aufs", "-o", f"udba=notify,log={base}/log", "--branch", f"{base}/a=rw",
        "--branch", f"{base}/img=ro", f"{base}/merged"]
subprocess.run(argv, check=True, timeout=60)
try:
    for i in range(30):
        assert os.listdir(f"{base}/merged/d{i}") == ["f"]
        open(f"{base}/merged/d{i}/f").read()
    for i in range(30):
        with open(f"{base}/img/d{i}/f", "w") as f:
            f.write("changed")
        open(f"{base}/img/d{i}/new", "w").close()
        deadline = time.monotonic() + 20
        while sorted(os.listdir(f"{base}/merged/d{i}")) != ["f", "new"] or \\
                open(f"{base}/merged/d{i}/f").read() != "changed":
            assert time.monotonic() < deadline, i
    subprocess.run([unionfs, "status", f"{base}/merged"], check=True, timeout=60)
finally:
    subprocess.run([unionfs, "umount", f"{base}/merged"], check=True, timeout=60)
"""


def test_limit_of_watches(make_aufs: Make) -> None:
    """Where there are no more, a directory is looked at each time; it is said, and the status lists it."""
    u = make_aufs()
    u.branch_dir("img", {f"d{i}/f": "x" for i in range(30)})
    u.branch_dir("a")
    unionfs = os.path.join(os.path.dirname(sys.executable), "unionfs")
    argv = ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", LIMITED, unionfs, str(u.base)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "/d29" in next(line for line in done.stdout.splitlines() if "unwatched" in line)
    log = u.log.read_text()
    assert log.count("no more inotify watches") == 1 and "max_user_watches" in log


@pytest.mark.parametrize("seed", range(int(os.environ.get("UNIONFS_AUFS_SEEDS", "1"))))
def test_everybody_at_once(make_aufs: Make, session: str, udba: str, seed: int) -> None:
    """Random changes in the branches and through the mount at a time: whole files, and agreement in the end."""
    u = union(make_aufs, udba, session, more=",create=rr")
    paths = [folder + name for folder in ("", "d/", "d/s/", "e/", "n/") for name in ("f", "g", "x", "y", "s")]
    stop = threading.Event()
    problems: list[str] = []
    done = {"others": 0, "ours": 0, "read": 0}

    def guarded(work: Callable[[random.Random], None], seed: int) -> None:
        rng = random.Random(seed)
        while not stop.is_set():
            try:
                work(rng)
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError, FileExistsError):
                pass
            except OSError as error:
                if error.errno not in (39, 116, 18, 22):  # ENOTEMPTY; ESTALE: taken away; EXDEV; EINVAL: into itself
                    problems.append(f"{work.__name__}: {error!r}")
                    return
            except Exception as error:
                problems.append(f"{work.__name__}: {error!r}")
                return

    kept: list[int] = []  # so that no number of an inode is used again: as yet another file in place it can't be told

    def change(root: Path, scratch: Path, rng: random.Random) -> None:
        path = root / rng.choice(paths)
        if root != u.merged and path.is_file() and len(kept) < 800:
            kept.append(os.open(path, os.O_RDONLY))
        dice = rng.random()
        if dice < 0.5:
            text = f"{rng.randrange(10**6):07}" * rng.choice((1, 30, 900))
            scratch.write_text(text)
            os.rename(scratch, path)
        elif dice < 0.65:
            path.mkdir()
        elif dice < 0.8:
            path.unlink()
        elif dice < 0.9:
            path.rmdir()
        else:
            os.rename(path, root / rng.choice(paths))

    def others(rng: random.Random) -> None:
        branch = u.base / rng.choice(("a", "b", "img"))
        change(branch, u.base / "scratch", rng)
        done["others"] += 1
        time.sleep(0.002)

    def ours(rng: random.Random) -> None:
        change(u.merged, u / "scratch", rng)
        done["ours"] += 1

    def read(rng: random.Random) -> None:
        text = (u / rng.choice(paths)).read_text()
        assert text == text[:7] * (len(text) // 7) or text.startswith(("img", "a ", "b")), text[:50]
        os.listdir(u / rng.choice(("", "d", "d/s", "e")))
        done["read"] += 1

    jobs = (others, ours, read)
    threads = [threading.Thread(target=guarded, args=(work, seed * 10 + i)) for i, work in enumerate(jobs)]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 60
    while not (min(done.values()) > 150) and not problems and time.monotonic() < deadline:
        time.sleep(0.05)
    stop.set()
    for thread in threads:
        thread.join(60)
    for fd in kept:
        os.close(fd)
    assert not problems, problems
    assert min(done.values()) > 50, done

    wanted = merge([(u.base / "a", "rw"), (u.base / "b", "rw"), (u.base / "img", "ro+wh")])
    try:
        settle(u, udba, lambda: look(u.merged) == wanted, "agreement")
    finally:
        seen = look(u.merged)
        for path in sorted({*seen, *wanted}):
            if seen.get(path, b"?") != wanted.get(path, b"?"):
                print(path, "is", str(seen.get(path, "absent"))[:20], "not", str(wanted.get(path, "absent"))[:20])
