"""The control socket, over real sockets."""

from __future__ import annotations

import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from unionfs.errors import EXIT_BUSY, EXIT_FAILURE, EXIT_NOT_OURS, EXIT_USAGE, MountError
from unionfs.front import control
from unionfs.front.mounts import Mount

DEVICE = os.makedev(0, 0xFFFFE)
MOUNT = Mount(b"/m", DEVICE, "fuse.unionfs", b"unionfs")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(control, "directories", lambda: [str(tmp_path / "none"), str(tmp_path / "run")])
    (tmp_path / "none").write_text("not a directory")
    return control.make_directory()


@pytest.fixture
def server(directory: str) -> Iterator[control.ControlServer]:
    server = control.ControlServer()
    server.register("echo", lambda **arguments: arguments)
    server.bind(directory, DEVICE)
    thread = threading.Thread(target=server.serve)
    thread.start()
    yield server
    server.close()
    thread.join(30)
    assert not thread.is_alive()


def test_directory_is_closed_to_others(directory: str) -> None:
    assert directory.endswith("/run")
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700
    os.chmod(directory, 0o755)
    control.make_directory()
    assert stat.S_IMODE(os.stat(directory).st_mode) == 0o700


def test_a_directory_that_is_a_symlink_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to("target")
    monkeypatch.setattr(control, "directories", lambda: [str(tmp_path / "link")])
    with pytest.raises(MountError, match="belongs to someone else"):
        control.make_directory()


def test_question_and_answer(server: control.ControlServer) -> None:
    assert stat.S_IMODE(os.stat(server.path).st_mode) == 0o600
    odd = b"a\nb\xff".decode("utf-8", "surrogateescape")
    assert control.ask(MOUNT, "echo", 30, path=odd, n=1) == {"path": odd, "n": 1}


def test_big_answers(server: control.ControlServer) -> None:
    server.register("many", lambda: ["x" * 100] * 50_000)
    assert len(control.ask(MOUNT, "many", 60)) == 50_000


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (MountError("no: busy", EXIT_BUSY), EXIT_BUSY, "no: busy"),
        (FileNotFoundError(2, "gone"), EXIT_FAILURE, "gone"),
        (ValueError("bad"), EXIT_USAGE, "bad"),
        (ZeroDivisionError("bug"), EXIT_FAILURE, "internal error"),
    ],
)
def test_what_a_handler_raises_reaches_the_client(
    server: control.ControlServer, error: Exception, code: int, text: str
) -> None:
    def handler() -> None:
        raise error

    server.register("fail", handler)
    with pytest.raises(MountError, match=text) as caught:
        control.ask(MOUNT, "fail", 30)
    assert caught.value.code == code
    assert str(caught.value).startswith("/m: ")


def test_unknown_verb(server: control.ControlServer) -> None:
    with pytest.raises(MountError, match="knows no 'nothing'"):
        control.ask(MOUNT, "nothing", 30)


def test_wrong_arguments(server: control.ControlServer) -> None:
    server.register("none", lambda: None)
    with pytest.raises(MountError) as caught:
        control.ask(MOUNT, "none", 30, extra=1)
    assert caught.value.code == EXIT_USAGE


@pytest.mark.parametrize("line", [b"\n", b"[]\n", b"{}\n", b'{"verb": []}\n', b"nonsense\n", b"\xff\n"])
def test_malformed_requests_are_answered(server: control.ControlServer, line: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(30)
        client.connect(server.path)
        client.sendall(line)
        assert b'"ok": false' in client.recv(1000)


def test_a_silent_client_holds_up_nobody(server: control.ControlServer) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.connect(server.path)
        assert control.ask(MOUNT, "echo", 30) == {}


def test_server_pid(server: control.ControlServer) -> None:
    connection = control.Connection(DEVICE)
    assert connection.server_pid == os.getpid()
    connection.close()


def test_nobody_there(directory: str) -> None:
    with pytest.raises(MountError) as caught:
        control.ask(MOUNT, "echo", 30)
    assert caught.value.code == EXIT_NOT_OURS


def test_close_removes_the_socket(directory: str) -> None:
    server = control.ControlServer()
    server.bind(directory, DEVICE)
    server.close()
    assert os.listdir(directory) == []


def test_what_a_killed_server_left_is_replaced(directory: str) -> None:
    left = control.ControlServer()
    left.bind(directory, DEVICE)
    again = control.ControlServer()
    again.bind(directory, DEVICE)
    thread = threading.Thread(target=again.serve, daemon=True)
    thread.start()
    again.register("new", lambda: True)
    assert control.ask(MOUNT, "new", 30) is True
    again.close()


def test_sweep_takes_the_dead_only(server: control.ControlServer, directory: str) -> None:
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(f"{directory}/0-77777.sock")
    dead.close()
    for name in ("0-77777.sock.log", "0-88888.sock.log", "notes.txt", os.path.basename(server.path) + ".log"):
        Path(directory, name).write_text("")
    for name, age in (("0-77777.sock.123", 3600), ("0-99999.sock.124", 0)):
        Path(directory, name).write_text("")
        os.utime(Path(directory, name), (time.time() - age,) * 2)
    control.sweep(directory)
    kept = os.path.basename(server.path)
    assert sorted(os.listdir(directory)) == sorted([kept, kept + ".log", "notes.txt", "0-99999.sock.124"])
    assert control.ask(MOUNT, "echo", 30) == {}


def test_close_ends_serving(server: control.ControlServer) -> None:
    server.close()
    results: list[Any] = []
    with pytest.raises(MountError):
        results.append(control.ask(MOUNT, "echo", 30))
    assert results == []


def test_a_stopped_server_holds_up_nobody_for_ever(directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queue is full and it takes nobody from it: connect(2) would wait for as long as it is stopped."""
    monkeypatch.setattr(control, "CONNECT_WAIT", 1)
    path = control.socket_path(directory, 77)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as stopped:
        stopped.bind(path)
        stopped.listen(0)
        waiting = []
        try:
            with pytest.raises(MountError, match="temporarily unavailable"):
                for _ in range(5):
                    waiting.append(control.Connection(77))
        finally:
            for connection in waiting:
                connection.close()
