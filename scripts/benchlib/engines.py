"""podman and dockerd side by side: the same images and commands, interleaved, on each storage that they can have.

Every storage has an engine of its own below one directory; all dockerds run for the whole time, idle but for their
turn. A round asks each storage in turn for every row, beginning with another one each time.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles

from engines import harness

import unionfs

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(sys.executable).parent  # bytecode beside the sources, as pip leaves it, or start-up is not what it is
PLUGINS = Path("/run/docker/plugins")
DOCKER = "/usr/bin/docker" if os.path.exists("/usr/bin/docker") else "docker"

ROWS = {
    "build": "build of a Dockerfile with three steps (COPY, RUN, RUN), no cache",
    "run": "container from start to exit (run --rm true)",
    "commit": "commit of a container that changed a few files",
    "rm": "rm of a stopped container",
    "big": "container that changes 4 KiB in the middle of a {mib} MiB file of its image, start to exit",
}
DOCKERFILE = """\
FROM {base}
COPY data /data
RUN echo two >> /data && rm /etc/debian_version && chmod 700 /srv
RUN rm -r /etc/default && mkdir /etc/default && touch /etc/default/only && mv /etc/security /etc/moved
"""
CHANGE = "rm /etc/issue; echo new > /srv/new; echo more >> /etc/profile; mkdir /srv/dir; mv /etc/init.d /srv/dir"


class Engine:
    """An engine with one storage. `call` runs its client."""

    def __init__(self, engine: str, storage: str, root: Path) -> None:
        self.engine, self.storage, self.root = engine, storage, root
        self.env: dict[str, str] = {}
        self.client = "podman" if engine == "podman" else DOCKER
        self.limits = harness.LIMITS if engine == "podman" else []
        self.network = [] if engine == "podman" else ["--network=none"]
        root.mkdir()

    def call(self, *argv: str | Path) -> str:
        return harness.run(self.client, *argv, env=self.env, timeout=900)

    def create(self, name: str, script: str, image: str = "base:1") -> None:
        self.call("run", "--name", name, *self.network, *self.limits, image, "sh", "-ec", script)

    def measure(self, row: str, context: Path) -> float:
        """Seconds of the one command that the row is about."""
        if row == "build":
            words = ["build", "--no-cache", "--quiet", "--tag", "built:1", *self.network, *self.limits, context]
            took = self._timed(*words)
            self.call("rmi", "--force", "built:1")
            return took
        if row == "run":
            return self._timed("run", "--rm", *self.network, *self.limits, "base:1", "true")
        if row == "big":
            change = "dd if=/dev/urandom of=/big bs=4096 count=1 seek=1000 conv=notrunc 2>/dev/null"
            return self._timed("run", "--rm", *self.network, *self.limits, "big:1", "sh", "-ec", change)
        self.create("changed", CHANGE)
        if row == "commit":
            took = self._timed("commit", "changed", "committed:1")
            self.call("rmi", "--force", "committed:1")
            self.call("rm", "changed")
            return took
        return self._timed("rm", "changed")

    def _timed(self, *argv: str | Path) -> float:
        start = time.perf_counter()
        self.call(*argv)
        return time.perf_counter() - start

    def used(self) -> str:
        """What a container says its root is: the proof of what was measured."""
        out = self.call("run", "--rm", *self.network, *self.limits, "base:1", "grep", " / ", "/proc/mounts")
        return next(line.split()[2] for line in out.splitlines() if line.split()[1:2] == ["/"])


@contextmanager
def podman(storage: str, root: Path) -> Iterator[Engine]:
    engine = Engine("podman", storage, root)
    program = {"unionfs": PROGRAMS / "unionfs-fuse-overlayfs", "fuse-overlayfs": shutil.which("fuse-overlayfs")}
    engine.env = harness.containers_environment(root, Path(program.get(storage) or "none"))
    if storage not in program:
        driver = "vfs" if storage == "vfs" else "overlay"
        (root / "storage.conf").write_text(
            f'[storage]\ndriver = "{driver}"\nrunroot = "{root}/run"\ngraphroot = "{root}/graph"\n'
        )
    try:
        yield engine
    finally:
        engine.call("rm", "--force", "--all")
        engine.call("rmi", "--force", "--all")


@contextmanager
def docker(storage: str, root: Path, options: list[str]) -> Iterator[Engine]:
    engine = Engine("docker", storage, root)
    with ExitStack() as stack:
        driver = {"overlay2 (kernel)": "overlay2"}.get(storage, storage)
        if storage.startswith("unionfs"):
            ours = "row" if storage.endswith("row") else "overlay"
            driver = f"unionfs-bench-{ours}"
            where = PLUGINS / f"{driver}.sock"
            words = [PROGRAMS / "unionfs", "plugin", "docker", "--socket", where, "--storage-driver", ours]
            for option in options:
                words += ["--storage-opt", option]
            stack.enter_context(process(words, root / "plugin-log", where))
        at = root / "socket"
        engine.env = {
            **os.environ,
            "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "DOCKER_HOST": f"unix://{at}",
            "DOCKER_CONFIG": str(root / "client"),
            "DOCKER_BUILDKIT": "0",
        }
        words = [
            "dockerd", "--experimental", f"--storage-driver={driver}", "--iptables=false", "--ip6tables=false",
            "--bridge=none", f"--data-root={root}/data", f"--exec-root={root}/exec", f"--pidfile={root}/pid",
            f"--host={engine.env['DOCKER_HOST']}",
        ]  # fmt: skip
        stack.enter_context(process(words, root / "log", at))
        assert driver == engine.call("info", "--format", "{{.Driver}}")
        yield engine
        for container in engine.call("ps", "--all", "--quiet").split():
            engine.call("rm", "--force", container)
        engine.call("system", "prune", "--all", "--force")


@contextmanager
def process(words: list[str | Path], log: Path, where: Path) -> Iterator[None]:
    """A server, from when its socket answers."""
    with log.open("w") as out:
        server = subprocess.Popen(
            [str(word) for word in words], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 60
        while not harness.answers(where):
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench-engines", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="samples of each row (default 5)")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"of {', '.join(ROWS)}")
    parser.add_argument("--engines", default="podman,docker")
    parser.add_argument("--storages", help="only these")
    parser.add_argument("--storage-opt", action="append", default=[], help="of our plugin, e.g. sync=off")
    parser.add_argument("--big", type=int, default=1024, metavar="MIB", help="size of the big file (default 1024)")
    parser.add_argument("--dir", default="/var/tmp", help="where everything is kept (default /var/tmp)")
    parser.add_argument("--note", default="", help="a line for the head of the table")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write table.md and results.json there")
    args = parser.parse_args(argv)
    unknown = set(args.rows.split(",")) - set(ROWS)
    if unknown:
        parser.error(f"--rows: {', '.join(sorted(unknown))}: of {', '.join(ROWS)}")
    return args


STORAGES = {
    "podman": ("unionfs", "fuse-overlayfs", "overlay (kernel)", "vfs"),
    "docker": ("unionfs", "unionfs row", "fuse-overlayfs", "overlay2 (kernel)", "vfs"),
}


def main(argv: list[str]) -> int:
    args = parse(argv)
    if os.geteuid():
        sys.exit("bench-engines: the engines need root")
    compileall.compile_dir(Path(unionfs.__file__).parent, quiet=1)
    base = harness.debian_tarball()
    root = Path(tempfile.mkdtemp(prefix="bench-engines-", dir=args.dir))
    results: dict[str, dict[str, dict[str, list[float]]]] = {}
    used: dict[str, dict[str, str]] = {}
    try:
        for name in args.engines.split(","):
            results[name], used[name] = bench(name, args, base, root)
    finally:
        harness.sweep(root)
    head = {
        "date": time.strftime("%Y-%m-%d"), "rounds": args.rounds, "note": args.note, "big_mib": args.big,
        "load": f"{os.getloadavg()[1]:.1f}",
        "machine": f"{os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}",
        "versions": versions(), "plugin_options": args.storage_opt, "roots": used,
    }  # fmt: skip
    text = table(head, results)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "table.md").write_text(text)
        (args.out / "results.json").write_text(json.dumps({**head, "seconds": results}, indent=1) + "\n")
    print(text)
    return 0


def bench(
    name: str, args: argparse.Namespace, base: Path, root: Path
) -> tuple[dict[str, dict[str, list[float]]], dict[str, str]]:
    wanted = args.storages.split(",") if args.storages else STORAGES[name]
    rows = args.rows.split(",")
    samples: dict[str, dict[str, list[float]]] = {row: {} for row in rows}
    context = root / f"{name}-context"
    context.mkdir()
    (context / "data").write_text("one\n")
    (context / "Dockerfile").write_text(DOCKERFILE.format(base="localhost/base:1" if name == "podman" else "base:1"))
    with ExitStack() as stack:
        engines = []
        for storage in STORAGES[name]:
            if storage not in wanted:
                continue
            place = root / f"{name}{len(engines)}"
            make: Callable[[], object] = podman if name == "podman" else docker
            options = [args.storage_opt] if name == "docker" else []
            engine = stack.enter_context(make(storage, place, *options))  # type: ignore[call-arg,operator]
            say(f"{name} {storage}: images")
            engine.call("import", base, "base:1")
            if "big" in rows:
                big_image(engine, base, args.big)
            engines.append(engine)
        used = {engine.storage: engine.used() for engine in engines}
        for number in range(args.rounds):
            for row in rows:
                for engine in engines[number % len(engines) :] + engines[: number % len(engines)]:
                    took = engine.measure(row, context)
                    samples[row].setdefault(engine.storage, []).append(took)
                    say(f"{name} round {number + 1} {row} {engine.storage}: {took * 1000:.0f} ms")
    return samples, used


def big_image(engine: Engine, base: Path, mib: int) -> None:
    """The base image with a big file on top, as a build leaves it."""
    engine.create("big", f"head -c {mib << 20} /dev/urandom > /big")
    engine.call("commit", "big", "big:1")
    engine.call("rm", "big")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def versions() -> dict[str, str]:
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return {
        "unionfs": commit.stdout.strip() or "?",
        "fuse-overlayfs": harness.run("fuse-overlayfs", "--version").partition("overlayfs: version ")[2].split()[0],
        "podman": harness.run("podman", "--version").split()[-1],
        "docker": harness.run("dockerd", "--version").split()[2].rstrip(","),
    }


def table(head: dict[str, object], results: dict[str, dict[str, dict[str, list[float]]]]) -> str:
    lines = [
        f"Measured on {head['date']}: {head['machine']}; medians of {head['rounds']} interleaved rounds ± half the "
        f"distance between the quartiles; everything on one disk; load average {head['load']}.",
        ", ".join(f"{key} {value}" for key, value in head["versions"].items())  # type: ignore[attr-defined]
        + (f"; plugin options {head['plugin_options']}" if head["plugin_options"] else "") + ".",
    ]  # fmt: skip
    if head["note"]:
        lines.append(str(head["note"]))
    for name, rows in results.items():
        storages = list(next(iter(rows.values())))
        lines += ["", f"### {name}", "", f"| ms | {' | '.join(storages)} | unionfs / fuse-overlayfs |"]
        lines.append("|---|" + "---:|" * (len(storages) + 1))
        for row, samples in rows.items():
            cells = [f"{median(one) * 1000:.0f} ±{spread(one) * 1000:.0f}" for one in samples.values()]
            ratio = "-"
            if {"unionfs", "fuse-overlayfs"} <= set(samples):
                ratio = f"{median(samples['unionfs']) / median(samples['fuse-overlayfs']):.2f}"
            lines.append(f"| {ROWS[row].format(mib=head['big_mib'])} | {' | '.join(cells)} | {ratio} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4)
    return (high - low) / 2
