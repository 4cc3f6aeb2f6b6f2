"""Going to the background: what the caller waits for, and what the server keeps of it."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest
from support.commands import BIN, Place
from support.mounts import is_mounted, wait_for


def fds_of(pid: int) -> dict[int, str]:
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        try:
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
        except FileNotFoundError:
            continue
    return found


def test_the_callers_pipes_end_when_mount_returns(place: Place) -> None:
    """Engines wait for the end of stderr, not for the process alone: subprocess.run with pipes does the same."""
    place.mount()
    assert is_mounted(place.merged)
    assert (place.merged / "a").read_text() == "lower a"
    place.umount()


def test_the_server_keeps_nothing_of_its_caller(place: Place) -> None:
    stray = place.base / "stray"
    with open(stray, "w") as stream:
        os.set_inheritable(stream.fileno(), True)
        place.mount(pass_fds=[stream.fileno()])
    pid = place.server()
    fds = fds_of(pid)
    assert fds[0] == fds[1] == "/dev/null"
    assert not [link for link in fds.values() if link.startswith("pipe:") or link == str(stray)]
    assert os.readlink(f"/proc/{pid}/cwd") == "/"
    assert os.getsid(pid) == pid
    with open(f"/proc/{pid}/status") as status:
        assert "Umask:\t0000\n" in status.readlines()
    place.umount()


def test_killed_while_the_caller_waits(place: Place) -> None:
    """A server that dies before it is ready: an error, and nothing stays mounted. Here, of a broken driver."""
    code = (
        "import os, sys; from unionfs.front import cli; from unionfs import assemble\n"
        "assemble.make_session = lambda *a: os.kill(os.getpid(), 9)\n"
        "sys.exit(cli.main())"
    )
    argv = [BIN / "python", "-c", code, "mount", "--lower", place.lower, place.merged]
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "killed by signal 9" in done.stderr
    assert not is_mounted(place.merged)


def test_an_error_of_the_serving_process_reaches_the_caller(place: Place) -> None:
    done = place.run("mount", "-o", "data=passthrough,writeback=1", "--lower", place.lower, place.merged)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "exclude each other" in done.stderr
    assert not is_mounted(place.merged)


def test_default_work_directory(place: Place) -> None:
    done = place.run("mount", "--lower", place.lower, "--upper", place.upper, place.merged)
    assert (done.returncode, done.stderr) == (0, "")
    assert (place.base / ".upper.work").is_dir()
    (place.merged / "a").write_text("changed")
    place.umount()
    assert (place.upper / "a").read_text() == "changed"


def test_a_mount_that_fails_late_leaves_no_work_directory(place: Place) -> None:
    """Root without CAP_SYS_ADMIN: mount(2) is refused when the layers are open already."""
    argv = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin", BIN / "unionfs", "mount"]
    argv += ["--lower", place.lower, "--upper", place.upper, place.merged]
    done = subprocess.run([str(word) for word in argv], capture_output=True, text=True, timeout=60)
    assert done.returncode == 6, done
    assert done.stderr.count("\n") == 1 and str(place.merged) in done.stderr
    assert not is_mounted(place.merged)
    assert not (place.base / ".upper.work").exists()
    assert os.listdir(place.upper) == []


def test_sigusr1_dumps_stacks_to_the_log(place: Place) -> None:
    log = place.base / "server.log"
    place.mount("-o", f"log={log}")
    os.kill(place.server(), signal.SIGUSR1)
    wait_for(lambda: "most recent call first" in log.read_text(), "stacks in the log")
    assert (place.merged / "a").read_text() == "lower a"
    place.umount()


def test_without_a_log_option_the_log_is_beside_the_socket_and_goes_with_it(place: Place) -> None:
    place.mount()
    pid = place.server()
    log = fds_of(pid)[2]
    assert log.endswith(".sock.log")
    os.kill(pid, signal.SIGUSR1)
    wait_for(lambda: "most recent call first" in Path(log).read_text(), "stacks in the log")
    place.umount()
    assert not Path(log).exists() and not Path(log.removesuffix(".log")).exists()


def test_a_dead_mount_is_named_and_can_be_unmounted(place: Place) -> None:
    place.mount()
    pid = place.server()
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: not os.path.exists(f"/proc/{pid}/fd/0"), "the end of the server")
    done = place.run("mount", "--lower", place.lower, place.merged)
    assert done.returncode == 5 and "server died" in done.stderr and "unionfs umount" in done.stderr
    listed = place.run("list")
    assert f"{place.merged}  " in listed.stdout and "no answer" in listed.stdout
    place.umount()
    assert not is_mounted(place.merged)
    place.mount()
    place.umount()


def test_upper_is_free_when_umount_returns(place: Place) -> None:
    for turn in range(5):
        place.mount()
        (place.merged / f"n{turn}").write_text("x")
        place.umount()


def test_a_busy_mount_names_its_users(place: Place) -> None:
    place.mount()
    sleeper = subprocess.Popen(["sleep", "600"], cwd=place.merged)
    try:
        done = place.run("umount", place.merged)
        assert done.returncode == 4
        assert f"sleep ({sleeper.pid})" in done.stderr and done.stderr.count("\n") == 1
    finally:
        sleeper.kill()
        sleeper.wait()
    done = place.run("umount", "--timeout", "30", place.merged)
    assert (done.returncode, done.stderr) == (0, "")


def test_foreground_tells_systemd(place: Place) -> None:
    import socket

    address = place.base / "notify"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(address))
        listener.settimeout(60)
        argv = [str(BIN / "unionfs"), "mount", "-f", "--lower", str(place.lower), str(place.merged)]
        server = subprocess.Popen(argv, env={**os.environ, "NOTIFY_SOCKET": str(address)})
        try:
            assert listener.recv(100) == b"READY=1"
            assert is_mounted(place.merged)
        finally:
            server.send_signal(signal.SIGTERM)
            assert server.wait(60) == 0
    assert not is_mounted(place.merged)


ODD_NAMES = ["with:colon", "with,comma", "with\\backslash", "with space", 'with"quote', "new\nline", "not-utf8-\udcff"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_names_of_every_kind(place: Place, name: str) -> None:
    from unionfs.front.options import escape

    lower, upper, merged = (place.base / f"{name}{part}" for part in "lum")
    for path in (lower, upper, merged):
        path.mkdir()
    (lower / "x").write_text("x")
    done = place.run("mount", "--lower", f"{escape(str(lower))}:{place.lower}", "--upper", upper, merged)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(os.listdir(merged)) == ["a", "x"]
    assert place.run("status", merged).returncode == 0
    (merged / "new").write_text("n")
    assert place.run("diff", merged).stdout == "A /new\n"
    place.umount(merged)
    options = f"lowerdir={escape(str(lower))},upperdir={escape(str(upper))},workdir={place.work}"
    done = place.fuse_overlayfs("-o", options, merged)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(os.listdir(merged)) == ["new", "x"]
    place.umount(merged)


def test_500_lowers(place: Place) -> None:
    layers = []
    for index in range(500):
        layer = place.base / f"l{index:03}"
        layer.mkdir()
        (layer / f"f{index}").write_text(str(index))
        (layer / "all").write_text(str(index))
        layers.append(str(layer))
    place.lower.rename(place.base / "unused")
    place.lower = ":".join(layers)  # type: ignore[assignment]
    place.mount()
    assert len(os.listdir(place.merged)) == 501
    assert (place.merged / "all").read_text() == "0"
    assert (place.merged / "f499").read_text() == "499"
    place.umount()
    done = place.run("mount", "--lower", ":".join([*layers, str(place.base / "unused")]), place.merged)
    assert done.returncode == 3 and "limit is 500" in done.stderr


def test_debug_traces_on_stderr(place: Place) -> None:
    trace = place.base / "trace"
    with open(trace, "w") as stderr:
        argv = [BIN / "unionfs", "mount", "-d", "--lower", place.lower, place.merged]
        server = subprocess.Popen([str(word) for word in argv], stderr=stderr)
    wait_for(lambda: is_mounted(place.merged) or server.poll() is not None, "the mount")
    assert (place.merged / "a").read_text() == "lower a"
    server.send_signal(signal.SIGINT)
    assert server.wait(60) == 0
    assert "LOOKUP" in trace.read_text()
    assert not is_mounted(place.merged)
