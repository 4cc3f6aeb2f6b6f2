"""`Daemon`: a real `unionfs daemon` in a process of its own, asked with real curl. Its data root is a new directory."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MAIN = "import sys; from unionfs.front.cli import main; sys.exit(main())"
PATIENCE = 60.0


def clean_environment(**more: str) -> dict[str, str]:
    """Without what would point a client or a daemon somewhere."""
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("UNIONFS_", "LISTEN_", "NOTIFY_"))
    }
    return {**kept, "UNIONFS_HOST": "", **more}


def unionfs(*argv: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", MAIN, *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        env=clean_environment(**environment),
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def wait_until(what: str, true: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for: {what}"
        time.sleep(0.05)


def mounts_below(path: Path) -> list[str]:
    found = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        where = line.split()[4]
        if where.startswith(f"{path}/"):
            found.append(where)
    return found


class Answer:
    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def message(self) -> str:
        return str(self.json["message"])


class Daemon:
    def __init__(self, base: Path) -> None:
        self.base = base
        self.root = base / "data"
        self.socket = base / "unionfs.sock"
        self.log_path = base / "log"
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        return f"unix://{self.socket}"

    @property
    def log(self) -> str:
        return self.log_path.read_text()

    def command(self, *argv: object, hosts: tuple[str, ...] | None = None) -> list[str]:
        addresses = [word for host in ((self.host,) if hosts is None else hosts) for word in ("-H", host)]
        return [sys.executable, "-c", MAIN, "daemon", "--data-root", str(self.root), *addresses, *map(str, argv)]

    def launch(
        self, *argv: object, hosts: tuple[str, ...] | None = None, session: bool = False, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Starts it, in a session of its own if wanted, and does not wait."""
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(
                self.command(*argv, hosts=hosts),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=clean_environment(**environment),
                start_new_session=session,
            )
        return self.process

    def start(
        self, *argv: object, hosts: tuple[str, ...] | None = None, session: bool = False, **environment: str
    ) -> None:
        """Starts it and waits until it listens everywhere."""
        start = len(self.log) if self.log_path.exists() else 0
        process = self.launch(*argv, hosts=hosts, session=session, **environment)

        def ready() -> bool:
            assert process.poll() is None, self.log
            return "ready\n" in self.log[start:]

        wait_until("the daemon is ready", ready)

    def refuses(self, *argv: object, hosts: tuple[str, ...] | None = None, **environment: str) -> tuple[int, str]:
        """Exit code and last line of a daemon that must not start."""
        process = self.launch(*argv, hosts=hosts, **environment)
        code = process.wait(PATIENCE)
        assert code != 0, self.log
        assert "Traceback" not in self.log
        return code, self.log.splitlines()[-1]

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(PATIENCE)

    def curl(self, path: str, *argv: object, data: bytes | None = None, url: str = "http://localhost") -> Answer:
        """Over the unix socket, unless the arguments say otherwise."""
        where = ["--unix-socket", str(self.socket)] if url == "http://localhost" else []
        words = ["curl", "-sS", "--path-as-is", "-o", "-", "-w", "\n%{http_code}", "--max-time", "60", *where]
        done = subprocess.run(
            [*words, *map(str, argv), url + path], input=data, capture_output=True, timeout=PATIENCE + 30
        )
        assert done.returncode == 0, done.stderr
        body, _, status = done.stdout.rpartition(b"\n")
        return Answer(int(status), body)

    def post(self, path: str, body: object = None, method: str = "POST") -> Answer:
        data = b"" if body is None else json.dumps(body).encode()
        return self.curl(path, "-X", method, "-H", "Content-Type: application/json", "--data-binary", "@-", data=data)

    def put_tar(self, path: str, tar: bytes, *argv: object, method: str = "PUT") -> Answer:
        return self.curl(path, "-X", method, "-H", "Content-Type: application/x-tar", "-T", "-", *argv, data=tar)

    def layer(self, id: str, files: dict[str, bytes], parent: str = "") -> None:
        """A committed layer."""
        key = f"{id}-key"
        assert self.post("/layers", {"id": key, "parent": parent}).status == 201
        assert self.put_tar(f"/layers/{key}/content", tar_of(files)).status == 200
        assert self.post(f"/layers/{key}/commit", {"new_id": id}).status == 200

    def clean_up(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE)
        for path in mounts_below(self.base):
            subprocess.run(["umount", "-l", path], check=False)


def tar_of(files: dict[str, bytes]) -> bytes:
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return target.getvalue()


@contextmanager
def made(workspace: Path) -> Iterator[Daemon]:
    base = workspace / f"daemon-{os.urandom(4).hex()}"
    base.mkdir()
    daemon = Daemon(base)
    try:
        yield daemon
    finally:
        daemon.clean_up()
        shutil.rmtree(base, ignore_errors=True)
