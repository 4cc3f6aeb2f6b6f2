"""What the tests of snapshots share: a union on either session, a tree with all kinds of things, what it shows."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from rowmount import MIB, UNIONFS, Row, content, poke

SESSIONS = ("direct", "pyfuse3")


class Union(Row):
    session = "direct"

    def try_mount(self, *options: str | Path) -> subprocess.CompletedProcess[str]:
        return super().try_mount("--session", self.session, *options)


def snapshot(*words: object, ok: bool = True) -> str:
    done = subprocess.run([UNIONFS, "snapshot", *map(str, words)], capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) == ok, done
    return done.stdout if ok else done.stderr


def seen(top: Path) -> dict[str, tuple[object, ...]]:
    """All that a tree shows, but for times."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(top.rglob("*")):
        st = path.lstat()
        body: object = None
        if path.is_symlink():
            body = os.readlink(path)
        elif path.is_file():
            body = path.read_bytes()
        found[str(path.relative_to(top))] = (st.st_mode, st.st_nlink if path.is_file() else 0, st.st_uid, body)
    return found


def differences(one: dict[str, tuple[object, ...]], other: dict[str, tuple[object, ...]]) -> set[str]:
    """Names only: a failed comparison of contents would fill the screen."""
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


def populate(lower: Path) -> None:
    (lower / "big").write_bytes(content(MIB))
    (lower / "small").write_text("small")
    (lower / "dir").mkdir()
    (lower / "dir/x").write_text("x")
    (lower / "h1").write_text("hard")
    os.link(lower / "h1", lower / "h2")


def stages(row: Union) -> dict[str, dict[str, tuple[object, ...]]]:
    """Three snapshots of a tree in which all kinds of things change; descriptors stay open over them."""
    m = row.merged
    states = {}
    poke(m / "big", 0, b"one")
    (m / "new").write_text("new1")
    with open(m / "h2", "a") as f:
        f.write("+1")
    big, new = os.open(m / "big", os.O_RDWR), os.open(m / "new", os.O_RDWR)
    states["s1"] = seen(m)
    snapshot("create", m, "s1")
    assert not differences(seen(m), states["s1"])
    os.pwrite(big, b"two", 4096 * 3)
    os.pwrite(new, b"NEW2", 0)
    os.unlink(m / "small")
    with open(m / "h1", "a") as f:
        f.write("+2")
    os.rename(m / "dir", m / "dir2")
    (m / "dir2/y").write_text("y")
    os.link(m / "new", m / "newlink")
    os.chmod(m / "h1", 0o600)
    os.symlink("big", m / "link")
    states["s2"] = seen(m)
    assert states["s2"]["h1"] == states["s2"]["h2"]
    snapshot("create", m, "s2")
    poke(m / "big", 1, b"3")
    os.pwrite(big, b"two", 4096 * 7)
    os.ftruncate(big, 500_000)
    os.ftruncate(big, 600_000)
    with open(m / "newlink", "a") as f:
        f.write("more")
    os.rename(m / "dir2", m / "dir3")
    os.rename(m / "big", m / "dir3/moved")
    os.pwrite(big, b"four", 550_000)
    os.unlink(m / "h1")
    states["s3"] = seen(m)
    snapshot("create", m, "s3")
    os.close(big)
    os.close(new)
    return states
