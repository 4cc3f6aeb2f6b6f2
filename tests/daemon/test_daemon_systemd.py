"""The units, and socket activation by systemd's own tool."""

from __future__ import annotations

import subprocess
from pathlib import Path

from daemon_harness import Daemon, clean_environment, wait_until

UNITS = Path(__file__).parents[2] / "contrib" / "systemd"


def test_units_are_correct() -> None:
    words = ["systemd-analyze", "verify", "--man=no", UNITS / "unionfs.service", UNITS / "unionfs.socket"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")


def test_activated_by_the_first_connection(daemon: Daemon) -> None:
    words = ["systemd-socket-activate", "-l", str(daemon.socket), *daemon.command(hosts=("fd://",))]
    with open(daemon.log_path, "wb") as log:
        daemon.process = subprocess.Popen(words, env=clean_environment(), stdout=log, stderr=log)
    wait_until("it listens", daemon.socket.exists)
    assert " starting" not in daemon.log
    assert daemon.curl("/version").json["pid"] == daemon.process.pid
    assert "listening on fd://3 (unix://" in daemon.log
    assert daemon.stop() == 0
