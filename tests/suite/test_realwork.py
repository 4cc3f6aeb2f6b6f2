"""Real programs do real work on the mount: git, pip, gcc, sqlite3, tar, rm, cp, rsync-like copies, a shell pipeline."""

from __future__ import annotations

import ensurepip
import os
import sqlite3
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from support.mounts import Maker
from support.procs import storm
from support.trees import F, same_tree

GIT = [
    "git",
    "-c",
    "user.name=t",
    "-c",
    "user.email=t@example.org",
    "-c",
    "safe.directory=*",
    "-c",
    "init.defaultBranch=main",
    "-c",
    "maintenance.autoDetach=false",  # git 2.47 and newer go on in the background, and keep the mount busy
]


def run(*argv: object, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        [str(arg) for arg in argv], cwd=cwd, capture_output=True, text=True, timeout=140, env=os.environ | (env or {})
    )
    assert done.returncode == 0, f"{argv}: {done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.every_data_mode
def test_git(make_union: Maker) -> None:
    """A repository in the lower is cloned, branched, merged, packed and checked; the lower one is committed to."""
    u = make_union([{}], mount=False, compare=False)
    source = u.lower / "source"
    source.mkdir()
    run(*GIT, "init", "-q", source)
    for i in range(120):
        (source / f"dir{i % 7}").mkdir(exist_ok=True)
        (source / f"dir{i % 7}/file{i}").write_text(f"{i}\n" * (i + 1))
    run(*GIT, "add", ".", cwd=source)
    run(*GIT, "commit", "-qm", "first", cwd=source)
    u.remember_lowers()
    u.mount()
    run(*GIT, "clone", "-q", "--no-hardlinks", u / "source", u / "clone")
    clone = u / "clone"
    run(*GIT, "checkout", "-qb", "side", cwd=clone)
    (clone / "dir0/file0").write_text("changed\n")
    run(*GIT, "mv", "dir1", "moved", cwd=clone)
    run(*GIT, "commit", "-qam", "side", cwd=clone)
    run(*GIT, "checkout", "-q", "main", cwd=clone)
    (clone / "new").write_text("n")
    run(*GIT, "add", "new", cwd=clone)
    run(*GIT, "commit", "-qm", "new", cwd=clone)
    run(*GIT, "merge", "-q", "-m", "merged", "side", cwd=clone)
    run(*GIT, "gc", "-q", cwd=clone)
    run(*GIT, "fsck", "--strict", cwd=clone)
    assert run(*GIT, "status", "--porcelain", cwd=clone) == ""
    (u / "source/dir0/file0").write_text("direct\n")
    run(*GIT, "commit", "-qam", "in the union", cwd=u / "source")
    run(*GIT, "rm", "-rq", "dir2", cwd=u / "source")
    run(*GIT, "commit", "-qm", "removed", cwd=u / "source")
    run(*GIT, "pull", "-q", "--no-rebase", "--no-edit", "-X", "ours", cwd=clone)
    u.remount()
    run(*GIT, "fsck", "--strict", cwd=u / "source")
    assert run(*GIT, "status", "--porcelain", cwd=u / "source") == ""
    assert run(*GIT, "log", "--oneline", cwd=clone).count("\n") >= 5
    assert not (clone / "dir2").exists()


def wheel() -> Path:
    """A real package that needs no network: the pip that ensurepip carries."""
    places = [Path(ensurepip.__file__).parent / "_bundled", Path("/usr/share/python-wheels")]
    configured = sysconfig.get_config_var("WHEEL_PKG_DIR")
    if configured:
        places.append(Path(configured))
    return next(path for place in places for path in sorted(place.glob("pip-*.whl")))


def test_pip_and_venv(make_union: Maker) -> None:
    """python -m venv on the mount, pip in it installs a package, imports it, removes it and installs it again."""
    u = make_union([{}], compare=False)
    run(sys.executable, "-m", "venv", "--without-pip", u / "venv")
    python = u / "venv/bin/python"
    pip = ["-m", "pip", "--disable-pip-version-check", "--no-cache-dir"]
    run(python, wheel() / "pip", "install", "-q", "--no-index", wheel())
    assert "pip" in run(python, *pip, "list")
    u.remount()
    version = run(python, *pip, "--version")
    assert str(u.merged) in version
    assert (
        run(python, "-c", "import pip, pip._vendor.requests as r; print(r.__name__)").strip() == "pip._vendor.requests"
    )
    run(python, *pip, "uninstall", "-qy", "pip")
    assert not list((u / "venv").rglob("site-packages/pip*"))


@pytest.mark.every_data_mode
def test_gcc(make_union: Maker) -> None:
    """A program of thirty units and a library, built by make with two jobs from a lower, then incrementally."""
    units = 30
    tree: dict[str, F | str] = {
        f"src/u{i}.c": f'#include "u.h"\nint f{i}(int x) {{ return x + {i}; }}\n' for i in range(units)
    }
    tree["src/u.h"] = "".join(f"int f{i}(int);\n" for i in range(units))
    tree["src/main.c"] = (
        '#include <stdio.h>\n#include "u.h"\nint main(void) { int x = 0;\n'
        + "".join(f"x = f{i}(x);\n" for i in range(units))
        + 'printf("%d\\n", x); return 0; }\n'
    )
    objects = " ".join(f"u{i}.o" for i in range(units))
    tree["src/Makefile"] = (
        f"main: main.o libu.a\n\tgcc -o main main.o libu.a\nlibu.a: {objects}\n\tar rcs libu.a $^\n"
        "%.o: %.c u.h\n\tgcc -O1 -c -o $@ $<\nclean:\n\trm -f *.o *.a main\n"
    )
    u = make_union([tree], compare=False)
    run("make", "-sj2", cwd=u / "src")
    assert run(u / "src/main").strip() == str(sum(range(units)))
    assert run("make", "-q", cwd=u / "src") == ""
    (u / "src/u3.c").write_text('#include "u.h"\nint f3(int x) { return x + 1000; }\n')
    assert run("make", "-sj2", cwd=u / "src") == ""
    assert run(u / "src/main").strip() == str(sum(range(units)) + 997)
    run("make", "-s", "clean", cwd=u / "src")
    u.remount()
    assert sorted(os.listdir(u / "src")) == sorted(name.removeprefix("src/") for name in tree)


@pytest.mark.every_data_mode
def test_sqlite(make_union: Maker) -> None:
    """WAL mode: a database that lies in the lower is written by four processes at once; integrity_check is ok."""
    u = make_union([{}], mount=False, compare=False)
    with sqlite3.connect(u.lower / "db") as db:
        db.execute("create table t (who int, n int, blob text)")
        db.executemany("insert into t values (-1, ?, ?)", [(i, "x" * 500) for i in range(500)])
    db.close()
    u.remember_lowers()
    u.mount()
    db = sqlite3.connect(u / "db")  # alone: the switch does not wait for others
    assert db.execute("pragma journal_mode=wal").fetchone() == ("wal",)
    db.close()

    def work(number: int) -> str:
        db = sqlite3.connect(u / "db", timeout=60, isolation_level=None)
        mode = str(db.execute("pragma journal_mode").fetchone()[0])
        for i in range(40):
            db.execute("begin immediate")
            db.execute("insert into t values (?, ?, ?)", (number, i, "y" * 300))
            db.execute("update t set n = n + 1 where who = -1 and n % 50 = ?", (i,))
            db.execute("commit")
        db.close()
        return mode

    assert set(storm(4, work)) == {"wal"}
    for _ in range(2):
        db = sqlite3.connect(u / "db")
        assert db.execute("pragma integrity_check").fetchone() == ("ok",)
        assert db.execute("select count(*) from t").fetchone() == (660,)
        assert db.execute("select count(*) from t where who >= 0").fetchone() == (160,)
        db.close()
        u.remount()
    db = sqlite3.connect(u / "db")
    db.execute("pragma journal_mode=delete")
    db.execute("vacuum")
    assert db.execute("pragma integrity_check").fetchone() == ("ok",)
    db.close()


def test_tar_and_rm(make_union: Maker) -> None:
    """A real tree packed, unpacked over a lower that has half of it, compared, and removed."""
    library = Path(os.__file__).parent
    u = make_union([{}], mount=False, compare=False)
    run("cp", "-a", library / "json", library / "email", u.lower)
    u.remember_lowers()
    u.mount()
    run("tar", "-cf", u / "t.tar", "-C", library, "json", "email", "asyncio", "logging")
    run("tar", "-xf", u / "t.tar", "-C", u.merged)
    for name in ("json", "email", "asyncio", "logging"):
        same_tree(library / name, u / name)
    run("cp", "-a", u / "email", u / "copy")
    same_tree(u / "email", u / "copy")
    run("mv", u / "asyncio", u / "json/asyncio")
    run("rm", "-rf", u / "email", u / "t.tar")
    u.remount()
    same_tree(library / "asyncio", u / "json/asyncio")
    assert sorted(os.listdir(u.merged)) == ["copy", "json", "logging"]
    run("rm", "-rf", *(u / name for name in os.listdir(u.merged)))
    assert os.listdir(u.merged) == []


def test_shell_tools(make_union: Maker) -> None:
    """find, du, grep, sort, install, truncate, dd, cp --sparse, ln, chmod -R, touch -r agree with a plain directory."""
    script = """
        set -e
        for i in 1 2 3; do mkdir -p a/$i; seq 100 > a/$i/seq; done
        cp -r a b; grep -rl 42 a | sort > found; find . -name seq | sort >> found
        install -m 750 found c/../bin 2>/dev/null || install -D -m 750 found x/bin
        dd if=/dev/zero of=hole bs=1k count=1 seek=999 status=none; cp --sparse=always hole hole2; truncate -s 5000 hole
        ln found hard; ln -s found soft; chmod -R g-w,o-rwx b; touch -r a/1/seq hole2; mv -T b a/2/b; rm -r a/1
        sort -r a/3/seq > r; sed -i s/1/one/ r; cat low/* | sort > lows; mv low/y low/z; echo more >> low/x; rm -r low/d
    """
    lower = {"low/x": "x\n", "low/y": "y\n", "low/d/e": "e"}
    u = make_union([lower])
    plain = u.base / "plain"
    run("cp", "-a", u.lower, plain)
    for place in (u.merged, plain):
        run("sh", "-c", script.replace("cat low/*", "cat low/x low/y"), cwd=place)
    same_tree(u.merged, plain, ignore=("mtime_ns",))
    assert (
        run("du", "-s", "--apparent-size", u / "a/3/seq").split()[0]
        == run("du", "-s", "--apparent-size", plain / "a/3/seq").split()[0]
    )
