"""How a daemon starts, what it says, where its settings come from, and how it ends."""

from __future__ import annotations

import grp
import json
import os
import signal
import socket
import stat
import subprocess
from pathlib import Path

import pytest
from daemon_harness import Daemon, clean_environment, mounts_below, unionfs, wait_until

from unionfs.daemon import choice
from unionfs.daemon.config import read_config, read_file
from unionfs.daemon.listen import PORT, TLS_PORT, split_tcp
from unionfs.daemon.logs import LOG, Journal
from unionfs.errors import EXIT_BUSY, EXIT_NO_FUSE, EXIT_USAGE, MountError
from unionfs.front.cli import main


def test_log_of_a_start_and_a_stop(daemon: Daemon) -> None:
    daemon.start()
    assert daemon.stop(signal.SIGINT) == 0
    words = [line.split(None, 2)[1:] for line in daemon.log.splitlines()]
    said = [message for _, message in words]
    assert said[0].startswith("unionfs ")
    assert said[1] == "storage driver overlay: detected: the first of overlay, aufs, row, vfs that this host can serve"
    assert said[2] == f"loading layers from {daemon.root}"
    assert said[3] == "initialised: 0 layers, 0 mounts found serving"
    assert f"listening on {daemon.host}" in said
    assert said[-3:] == ["ready", "SIGINT: stopping", "stopped"]
    assert not daemon.socket.exists()
    daemon.start()
    assert "storage driver overlay: it has storage there from before" in daemon.log


def test_named_driver(daemon: Daemon) -> None:
    daemon.start("--storage-driver", "vfs")
    assert "storage driver vfs: named on the command line\n" in daemon.log
    assert daemon.curl("/info").json["storage_driver"] == "vfs"
    daemon.stop()
    daemon.start("--storage-driver", "overlay")
    assert "named on the command line; what vfs stored there is not visible to it" in daemon.log
    daemon.stop()
    code, said = daemon.refuses()
    assert code == EXIT_USAGE
    assert f"{daemon.root} holds storage of several drivers: overlay, vfs. Name the one" in said


def test_a_driver_that_the_host_can_not_serve(daemon: Daemon) -> None:
    code, said = daemon.refuses("--storage-driver", "btrfs")
    assert code == EXIT_NO_FUSE
    assert "storage driver btrfs: the data root" in said
    assert said.endswith("This host can serve: overlay, aufs, row, vfs")


def test_without_fuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "FUSE", str(tmp_path / "absent"))
    assert choice.choose(str(tmp_path), "", "").driver == "vfs"
    with pytest.raises(MountError, match=r"overlay: .*No such file.*This host can serve: vfs"):
        choice.choose(str(tmp_path), "overlay", "on the command line")


def test_two_daemons_on_one_data_root(running: Daemon) -> None:
    other = Daemon(running.base)
    other.socket, other.log_path = running.base / "other.sock", running.base / "other.log"
    code, said = other.refuses("--storage-driver", "vfs")
    assert code == EXIT_BUSY
    assert running.process is not None
    assert f"is in use by another daemon (process {running.process.pid})" in said
    assert running.curl("/version").status == 200


def test_two_daemons_on_one_socket(running: Daemon) -> None:
    other = Daemon(running.base)
    other.root, other.log_path = running.base / "other", running.base / "other.log"
    code, said = other.refuses()
    assert code == EXIT_BUSY
    assert "another process listens there" in said
    assert running.curl("/version").status == 200


def test_socket_left_by_a_killed_daemon(daemon: Daemon) -> None:
    daemon.start()
    daemon.stop(signal.SIGKILL)
    assert daemon.socket.exists()
    daemon.start()
    assert daemon.curl("/version").status == 200


@pytest.mark.parametrize(
    ("host", "said"),
    [
        ("unix://relative", "the path must be absolute"),
        ("unix:///" + "a" * 110, "longer than the 107 bytes"),
        ("tcp://127.0.0.1:port", "'port' is not a port"),
        ("tcp://127.0.0.1:70000", "'70000' is not a port"),
        ("tcp://::1:2375", "an IPv6 address is written"),
        ("tcp://192.0.2.1:0", "Cannot assign requested address"),
        ("fd://", "systemd handed over no socket"),
        ("http://x", "must be unix:///PATH, tcp://IP:PORT or fd://"),
    ],
)
def test_addresses_that_can_not_be(daemon: Daemon, host: str, said: str) -> None:
    _, message = daemon.refuses(hosts=(daemon.host, host))
    assert message.startswith(f"unionfs: daemon: -H {host}: ")
    assert said in message
    assert not daemon.socket.exists()


@pytest.mark.parametrize(
    ("rest", "found"),
    [
        ("10.0.0.1:99", ("10.0.0.1", 99)),
        ("10.0.0.1", ("10.0.0.1", PORT)),
        (":99", ("127.0.0.1", 99)),
        ("", ("127.0.0.1", PORT)),
        ("[::1]:99", ("::1", 99)),
        ("[::1]", ("::1", PORT)),
        ("build.example.org", ("build.example.org", PORT)),
    ],
)
def test_tcp_addresses(rest: str, found: tuple[str, int]) -> None:
    assert split_tcp(rest, PORT) == found
    assert (PORT, TLS_PORT) == (2375, 2376)


def test_something_else_at_the_socket(daemon: Daemon) -> None:
    daemon.socket.write_text("mine")
    _, said = daemon.refuses()
    assert "something that is not a socket is there" in said
    assert daemon.socket.read_text() == "mine"


def test_unix_socket_is_for_its_group(daemon: Daemon) -> None:
    group = grp.getgrgid(1)
    daemon.start("--group", group.gr_name)
    status = daemon.socket.stat()
    assert (stat.S_IMODE(status.st_mode), status.st_uid, status.st_gid) == (0o660, 0, 1)
    words = ["curl", "-sS", "--unix-socket", str(daemon.socket), "http://localhost/version"]
    stranger = subprocess.run(words, user=12345, group=12345, extra_groups=[], capture_output=True, timeout=60)
    assert (stranger.returncode, stranger.stdout) == (7, b"")
    member = subprocess.run(words, user=12345, group=12345, extra_groups=[1], capture_output=True, timeout=60)
    assert b'"api_version"' in member.stdout


def test_no_such_group(daemon: Daemon) -> None:
    _, said = daemon.refuses("--group", "nobody-has-this")
    assert "--group nobody-has-this: there is no such group" in said


def test_without_the_default_group_root_alone(daemon: Daemon) -> None:
    try:
        wanted = grp.getgrnam("unionfs").gr_gid
    except KeyError:
        wanted = 0
    daemon.start()
    assert daemon.socket.stat().st_gid == wanted
    assert ("there is no group unionfs: only root may connect" in daemon.log) == (wanted == 0)


def test_several_sockets_and_a_warning(daemon: Daemon) -> None:
    daemon.start(hosts=(daemon.host, "tcp://127.0.0.1:0", "tcp://[::1]:0"))
    listening = daemon.curl("/info").json["listening"]
    assert len(listening) == 3
    for where in listening[1:]:
        url = where.replace("tcp://", "http://")
        assert daemon.curl("/version", url=url).status == 200
        assert f"!!! {where} is open, without TLS, to everyone who reaches it" in daemon.log
        assert unionfs("-H", where, "info").stdout.count("WARNING: ") == 2


def test_only_tcp_means_no_unix_socket(daemon: Daemon) -> None:
    daemon.start(hosts=("tcp://127.0.0.1:0",))
    assert daemon.log.count("listening on") == 1
    assert not daemon.socket.exists()


def test_socket_activation_and_readiness(daemon: Daemon) -> None:
    """As systemd does it: a listening socket as descriptor 3, told about on NOTIFY_SOCKET."""
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(str(daemon.base / "notify"))
    told.settimeout(60)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listening:
        listening.bind(str(daemon.socket))
        listening.listen()
        os.dup2(listening.fileno(), 200)
        script = 'exec 3<&200 200<&-; export LISTEN_PID=$$; exec "$@"'
        command = [*daemon.command(hosts=("fd://",))]
        environment = clean_environment(
            LISTEN_FDS="1", LISTEN_FDNAMES="unionfs.socket", NOTIFY_SOCKET=str(daemon.base / "notify")
        )
        with open(daemon.log_path, "wb") as log:
            daemon.process = subprocess.Popen(
                ["bash", "-c", script, "activate", *command], pass_fds=[200], env=environment, stderr=log
            )
        os.close(200)
        assert told.recv(4096).split(b"\n")[0] == b"READY=1"
        assert daemon.curl("/version").status == 200
        daemon.stop()
        assert told.recv(4096) == b"STOPPING=1"
        assert daemon.socket.exists()  # systemd's, not ours
    told.close()


def test_settings_from_file_and_environment(daemon: Daemon) -> None:
    file = daemon.base / "daemon.toml"
    file.write_text(f'storage-driver = "vfs"\nhost = ["{daemon.host}"]\nlog-level = "debug"\n')
    daemon.start("--config-file", file, hosts=(), UNIONFS_OPTS="--unmount-on-stop --storage-opt sync=off")
    info = daemon.curl("/info").json
    assert "DEBUG   GET /info: 200\n" in daemon.log
    assert info["storage_driver"] == "vfs"
    assert info["chosen"] == f"named in {file}"
    assert ["Sync", "off"] in info["status"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('log-level = "debug"', "log-level is set both on the command line and in"),
        ("host = 1", "host must be a list of texts, not 1"),
        ('tlsverify = "yes"', "tlsverify must be true or false, not 'yes'"),
        ('storage_driver = "vfs"', "unknown option 'storage_driver', did you mean storage-driver?"),
        ('storage-driver = "zfs"', "storage-driver is one of overlay, aufs, row, vfs, btrfs, not 'zfs'"),
        ("= 1", "is not TOML"),
    ],
)
def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, said: str) -> None:
    file = tmp_path / "daemon.toml"
    file.write_text(content)
    assert main(["daemon", "--config-file", str(file), "--log-level", "debug"]) == EXIT_USAGE
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--config-file", "/absent"], "config file /absent: No such file or directory"),
        (["--tlsverify"], "--tlsverify needs --tlscacert and --tlscert and --tlskey too"),
        (["--tlscert", "x"], "--tlscert needs --tlsverify"),
        (["--storage-opt", "size"], "--storage-opt size: must be KEY=VALUE"),
        (["--storage-driver", "zfs"], "--storage-driver is one of"),
        (["--log-file", "/x"], "--log-file is for --log-driver json-file"),
        (["--log-level", "info", "--log-level", "debug"], "log-level is given 2 times on the command line: keep one"),
        (["--data-rot", "x"], "unknown option --data-rot, did you mean --data-root?"),
        (["--data-root", "x", "--data-root", "y"], "data-root is given 2 times"),
    ],
)
def test_bad_command_lines(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["daemon", *argv]) == EXIT_USAGE
    assert said in capsys.readouterr().err


def test_environment_and_flag_name_the_same(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("UNIONFS_OPTS", "--log-level debug")
    assert main(["daemon", "--log-level", "info"]) == EXIT_USAGE
    said = capsys.readouterr().err
    assert "log-level is set both on the command line and in UNIONFS_OPTS: keep one of them" in said


def test_unknown_storage_option(daemon: Daemon) -> None:
    _, message = daemon.refuses("--storage-opt", "unknown=1")
    assert "storage option 'unknown'" in message


def test_data_root_that_can_not_be(daemon: Daemon) -> None:
    daemon.root = Path("/dev/null/x")
    _, message = daemon.refuses()
    assert "--data-root /dev/null/x: Not a directory" in message


def test_json_log(daemon: Daemon) -> None:
    file = daemon.base / "log.json"
    process = daemon.launch("--log-driver", "json-file", "--log-file", file)
    wait_until("it is ready", lambda: file.exists() and '"ready"' in file.read_text())
    daemon.stop()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert process.returncode == 0
    assert rows[-1]["message"] == "stopped"
    assert {"time", "level", "message"} == set(rows[0])
    assert daemon.log == ""


def test_journal_protocol(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as journal:
        journal.bind(str(tmp_path / "journal"))
        handler = Journal(str(tmp_path / "journal"))
        handler.handle(LOG.makeRecord(LOG.name, 30, "", 0, "two\nlines", (), None))
        assert journal.recv(4096) == (b"MESSAGE\n\x09\0\0\0\0\0\0\0two\nlines\nPRIORITY=4\nSYSLOG_IDENTIFIER=unionfs\n")
        handler.close()


def test_no_journal(daemon: Daemon) -> None:
    if os.path.exists("/run/systemd/journal/socket"):
        daemon.start("--log-driver", "journald")
    else:
        _, said = daemon.refuses("--log-driver", "journald")
        assert "--log-driver journald: /run/systemd/journal/socket: No such file" in said


def test_missing_packages_are_named(daemon: Daemon) -> None:
    (daemon.base / "hypercorn.py").write_text("raise ModuleNotFoundError('no', name='hypercorn')")
    _, said = daemon.refuses(PYTHONPATH=str(daemon.base))
    assert said == "unionfs: daemon: the Python package hypercorn is missing: pip install 'unionfs[daemon]'"


def test_mounts_stay_up_at_a_stop_or_go(daemon: Daemon) -> None:
    daemon.start()
    daemon.layer("base", {"f": b"x"})
    daemon.post("/layers", {"id": "work", "parent": "base"})
    tree = Path(daemon.post("/layers/work/mount").json["path"])
    assert daemon.stop(signal.SIGINT) == 0
    assert (tree / "f").read_bytes() == b"x"
    assert "stopped; 1 mounts are left serving" in daemon.log
    daemon.start("--unmount-on-stop")
    assert "initialised: 2 layers, 1 mounts found serving" in daemon.log
    assert daemon.stop() == 0
    assert "stopped; 1 mounts unmounted" in daemon.log
    assert mounts_below(daemon.root) == []


def test_a_second_signal_ends_it_at_once(daemon: Daemon) -> None:
    """The first waits for an upload that does not come to its end."""
    daemon.start()
    daemon.post("/layers", {"id": "key"})
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(daemon.socket))
        slow.sendall(b"PUT /layers/key/content HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\nbegun")
        wait_until("the upload has begun", lambda: 'method="POST"' in daemon.curl("/metrics").body.decode())
        assert daemon.process is not None
        daemon.process.send_signal(signal.SIGTERM)
        wait_until("it stops", lambda: "SIGTERM: stopping" in daemon.log)
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(60) == 1
    assert "SIGTERM again: leaving at once" in daemon.log
    daemon.start()
    assert daemon.curl("/layers/key", "-X", "DELETE").status == 204


def test_ctrl_c_in_a_terminal_leaves_the_mounts(daemon: Daemon) -> None:
    """A terminal sends SIGINT to the whole foreground process group."""
    daemon.start(session=True)
    daemon.layer("base", {"f": b"x"})
    daemon.post("/layers", {"id": "work", "parent": "base"})
    tree = Path(daemon.post("/layers/work/mount").json["path"])
    assert daemon.process is not None
    os.killpg(daemon.process.pid, signal.SIGINT)
    assert daemon.process.wait(60) == 0
    assert (tree / "f").read_bytes() == b"x"


def test_fsck_without_a_daemon(daemon: Daemon) -> None:
    daemon.start()
    daemon.layer("base", {"f": b"x"})
    busy = unionfs("daemon", "--fsck", "--data-root", daemon.root, check=False)
    assert (busy.returncode, busy.stdout) == (EXIT_BUSY, "")
    daemon.stop()
    assert unionfs("daemon", "--fsck", "--data-root", daemon.root).stdout == f"{daemon.root}: clean\n"
    (daemon.root / "overlay/layers/garbage").mkdir()
    found = unionfs("daemon", "--fsck", "--data-root", daemon.root, check=False)
    assert found.returncode == 1
    assert "garbage: belongs to no layer" in found.stdout
    assert found.stdout.endswith(f"{daemon.root}: 1 findings\n")
    unionfs("daemon", "--fsck", "--repair", "--data-root", daemon.root, check=False)
    assert unionfs("daemon", "--fsck", "--data-root", daemon.root).returncode == 0
    assert "--repair goes with --fsck" in unionfs("daemon", "--repair", check=False).stderr


def test_file_settings_are_read_as_flags(tmp_path: Path) -> None:
    file = tmp_path / "x.toml"
    file.write_text('tlsverify = false\nstorage-opt = "size=1g"\ndata-root = "/srv/x"\n')
    config = read_config([(f"in {file}", read_file(str(file)))])
    assert (config.tlsverify, config.storage_options, config.data_root) == (False, {"size": "1g"}, "/srv/x")
