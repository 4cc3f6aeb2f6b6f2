"""The life of a mount as people drive it: background, umount, signals, a killed server, what it refuses."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.mounts import Maker, Union, escape, is_mounted, unionfs, wait_for
from support.procs import errno_of, storm
from support.trees import F, snapshot

pytestmark = pytest.mark.needs("ours")


def mount_args(u: Union) -> list[object]:
    argv: list[object] = ["mount", "--driver", u.target.driver, "--session", u.target.session]
    argv += ["--lower", ":".join(map(escape, u.lowers))]
    if u.upper:
        argv += ["--upper", u.upper, "--work", u.work]
    if u.target.data:
        argv += ["-o", f"data={u.target.data}"]
    return argv


def servers(path: Path) -> list[int]:
    """Processes of ours with that path in their command line."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            try:
                with open(f"/proc/{entry}/cmdline", "rb") as f:
                    if os.fsencode(path) in f.read().split(b"\0"):
                        found.append(int(entry))
            except OSError:
                continue
    return found


@pytest.fixture
def background(make_union: Maker) -> Iterator[Union]:
    u = make_union([{"a": "1", "d/x": "x"}], mount=False)
    done = unionfs(*mount_args(u), u.merged)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done
    yield u
    if is_mounted(u.merged):
        unionfs("umount", "--lazy", u.merged)
    wait_for(lambda: not servers(u.merged), "the server's end")


def test_background(background: Union) -> None:
    """mount returns when the mount answers; status, list and umount work on it; the server then is gone."""
    u = background
    assert (u / "a").read_text() == "1"
    (u / "new").write_text("n")
    status = u.status()
    assert status["pid"] in servers(u.merged)
    assert (
        not os.path.exists(f"/proc/{status['pid']}/fd/0") or os.readlink(f"/proc/{status['pid']}/fd/0") == "/dev/null"
    )
    listed = json.loads(unionfs("list", "--json").stdout)
    assert any(str(u.merged) in json.dumps(entry) for entry in listed)
    done = unionfs("umount", u.merged)
    assert (done.returncode, done.stderr) == (0, "")
    assert not is_mounted(u.merged)
    assert os.listdir(u.merged) == []
    assert (u.up / "new").read_text() == "n"


def test_umount_of_a_busy_mount(background: Union) -> None:
    """Refused in one line while a file is open, nothing lost; --lazy detaches, the server ends with the last user."""
    u = background
    fd = os.open(u / "new", os.O_CREAT | os.O_RDWR)
    done = unionfs("umount", u.merged)
    assert done.returncode != 0
    assert len(done.stderr.splitlines()) == 1
    assert is_mounted(u.merged)
    os.write(fd, b"still")
    done = unionfs("umount", "--lazy", u.merged)
    assert done.returncode == 0, done.stderr
    assert not is_mounted(u.merged)
    os.write(fd, b" here")
    os.close(fd)
    wait_for(lambda: not servers(u.merged), "the server's end")
    assert (u.up / "new").read_text() == "still here"


def test_umount_of_something_else(make_union: Maker, tmp_path: Path) -> None:
    for verb in ("umount", "status", "which"):
        done = unionfs(verb, tmp_path)
        assert done.returncode == 9, (verb, done)
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_unmount(make_union: Maker, number: signal.Signals) -> None:
    """SIGTERM and SIGINT unmount; with them nothing written is lost and nothing is left."""
    u = make_union([{"a": "1"}])
    with open(u / "a", "a") as f:
        f.write("2")
    assert u.process is not None
    u.process.send_signal(number)
    wait_for(lambda: not is_mounted(u.merged), "the unmount")
    u.wait_ended()
    assert (u.up / "a").read_text() == "12"


def test_sigterm_with_open_file(make_union: Maker) -> None:
    """A busy mount is detached after a grace; the open file still works until it is closed."""
    u = make_union([{"a": "1"}])
    fd = os.open(u / "a", os.O_RDWR)
    assert u.process is not None
    u.process.send_signal(signal.SIGTERM)
    wait_for(lambda: not is_mounted(u.merged), "the unmount")
    os.write(fd, b"2")
    assert os.pread(fd, 1, 0) == b"2"
    os.close(fd)
    u.wait_ended()
    assert (u.up / "a").read_text() == "2"


def test_killed_then_remounted(make_union: Maker) -> None:
    """SIGKILL in the middle of work: clients get an error; the next mount cleans work and has all that was done."""
    u = make_union([{"a": "1", "d/x": "x", "big": F(os.urandom(8 << 20))}])
    before = (u / "big").read_bytes()
    (u / "new").write_text("n")
    os.rename(u / "d", u / "moved")
    os.unlink(u / "a")
    fd = os.open(u / "new", os.O_RDWR)
    gone = os.open(u / "gone", os.O_RDWR | os.O_CREAT)
    os.unlink(u / "gone")
    assert u.process is not None
    u.process.kill()
    u.process.wait()
    assert errno_of(os.stat, u / "other") in (107, 103)
    os.close(fd)
    os.close(gone)
    u.kill()
    (u.work / "work").mkdir(exist_ok=True)  # type: ignore[operator]
    (u.work / "work/leftover").write_text("half a copy")  # type: ignore[operator]
    (u.work / "work/#dir").mkdir()  # type: ignore[operator]
    (u.work / "work/#dir/x").write_text("")  # type: ignore[operator]
    u.mount()
    assert sorted(os.listdir(u.merged)) == ["big", "moved", "new"]
    assert (u / "new").read_text() == "n"
    assert (u / "big").read_bytes() == before
    assert os.listdir(u / "moved") == ["x"]


def test_killed_in_copy_up(make_union: Maker) -> None:
    """Killed at a random moment of many copy-ups: each file is whole, old or new."""
    content = os.urandom(3 << 20)
    u = make_union([{f"f{i}": F(content) for i in range(12)}], compare=False)

    def work(number: int) -> None:
        if number == 0:
            time.sleep(0.03)
            assert u.process is not None
            os.kill(u.process.pid, signal.SIGKILL)
            return
        for i in range(number - 1, 12, 3):
            if errno_of(lambda i=i: _poke(u / f"f{i}")):
                return

    storm(4, work)
    assert u.process is not None
    u.process.wait()
    u.kill()
    u.mount()
    for i in range(12):
        data = (u / f"f{i}").read_bytes()
        assert len(data) == len(content)
        assert data[3:] == content[3:]
        assert data[:3] in (content[:3], b"new")


def _poke(path: Path) -> None:
    with open(path, "r+b") as f:
        f.write(b"new")


def test_upper_in_use(make_union: Maker) -> None:
    """A second mount of the same upper, or of its work, is refused while the first lives, and works after it."""
    u = make_union([{"a": "1"}])
    second = u.base / "second"
    second.mkdir()
    done = unionfs(*mount_args(u), second)
    assert done.returncode == 4, done
    assert len(done.stderr.splitlines()) == 1
    assert not is_mounted(second)
    other = u.base / "other"
    other.mkdir()
    done = unionfs(
        "mount", "--session", u.target.session, "--lower", escape(u.lower), "--upper", other, "--work", u.work, second
    )
    assert done.returncode == 4, done
    assert (u / "a").read_text() == "1"
    u.umount()
    u.mount()


def test_mountpoint_taken(make_union: Maker) -> None:
    u = make_union([{"a": "1"}])
    other = make_union([{"b": "2"}], mount=False)
    done = unionfs(*mount_args(other), u.merged)
    assert done.returncode == 5, done
    assert (u / "a").read_text() == "1"


def test_lowers_shared(make_union: Maker) -> None:
    """Many mounts may share lowers."""
    first = make_union([{"a": "1", "d/x": "x"}])
    second = make_union([{}], mount=False)
    second.lowers = first.lowers
    second.remember_lowers()
    second.mount()
    (first / "a").write_text("first")
    (second / "a").write_text("second")
    os.unlink(second / "d/x")
    assert (first / "a").read_text() == "first"
    assert (first / "d/x").read_text() == "x"
    assert os.listdir(second / "d") == []


def test_paths_renamed_while_mounted(make_union: Maker) -> None:
    """Layers are held by descriptor: renaming what is above them, or chdir of the caller, changes nothing."""
    u = make_union([{"a": "1", "d/x": "x"}], compare=False)
    moved = u.base / "renamed"
    os.rename(u.lower, moved)
    assert (u / "d/x").read_text() == "x"
    with open(u / "a", "a") as f:
        f.write("2")
    assert (u / "a").read_text() == "12"
    os.rename(moved, u.lower)
    u.remember_lowers()


def test_which_and_diff(make_union: Maker) -> None:
    u = make_union([{"a": "1", "d/x": "x"}, {"a": "0", "low": "l"}])
    (u / "a").write_text("changed")
    os.unlink(u / "low")
    (u / "d/new").write_text("n")
    diff = unionfs("diff", u.merged)
    assert diff.returncode == 0, diff
    assert sorted(diff.stdout.splitlines()) == ["A /d/new", "C /a", "C /d", "D /low"]
    which = unionfs("which", u / "a")
    assert which.returncode == 0
    assert str(u.upper) in which.stdout
    assert str(u.lowers[1]) in which.stdout


def test_odd_layer_paths(make_union: Maker) -> None:
    """Layer paths with colon, comma, backslash, space, quotes, newline and bytes that are no UTF-8."""
    u = make_union([{}], mount=False, compare=False)
    names = ["a:b", "c,d", "e\\f", "g h", "q\"'", "n\nl", os.fsdecode(b"\xff\xfe")]
    u.lowers = []
    for i, name in enumerate(names):
        (u.base / name).mkdir()
        (u.base / name / f"f{i}").write_text(name.encode("utf-8", "surrogateescape").hex())
        u.lowers.append(u.base / name)
    u.remember_lowers()
    u.upper = u.base / "up:per,\\"
    u.upper.mkdir()
    u.mount()
    assert sorted(os.listdir(u.merged)) == [f"f{i}" for i in range(len(names))]
    (u / "new").touch()
    assert os.listdir(u.upper) == ["new"]


def test_default_work_and_relative_paths(make_union: Maker) -> None:
    u = make_union([{"a": "1"}], mount=False)
    argv = [
        "mount",
        "--driver",
        u.target.driver,
        "--session",
        u.target.session,
        "--lower",
        "lower0",
        "--upper",
        "upper",
        "merged",
    ]
    done = unionfs(*argv, cwd=u.base)
    assert done.returncode == 0, done.stderr
    with open(u / "a", "a") as f:
        f.write("2")
    assert unionfs("umount", "merged", cwd=u.base).returncode == 0
    assert (u.up / "a").read_text() == "12"
    before = snapshot(u.up)
    u.mount()
    assert (u / "a").read_text() == "12"
    assert snapshot(u.up).keys() == before.keys()
