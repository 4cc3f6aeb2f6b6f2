"""What the image and container verbs share: where images are, tables, sizes and progress bars.

Without `-H` (UNIONFS_HOST) a verb works on the data root itself, which is refused while a daemon holds it. With it the
daemon does the work: `unionfs.daemon.remote.Library` has the same `images` and `containers`.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from unionfs.errors import EXIT_BUSY, EXIT_FAILURE, EXIT_USAGE, MountError
from unionfs.front.args import Option, Parsed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO

    from unionfs.store.images import Progress
    from unionfs.store.library import Library

STORE = [
    Option("--data-root", "where images are (default /var/lib/unionfs; not root: $XDG_DATA_HOME/unionfs)", "DIR"),
    Option("--storage-driver", "overlay, aufs, row, vfs or btrfs (default: the one with images, or overlay)", "NAME"),
    Option("--storage-opt", "an option of the store; may be repeated", "NAME=VALUE"),
]
JSON = Option("-j --json", "as JSON")


@contextmanager
def library(parsed: Parsed) -> Iterator[Library]:
    """The images and containers that the command line means; a StoreError becomes a line and an exit code."""
    from unionfs.store.api import InUse, Invalid, StoreError

    try:
        with _open(parsed) as opened:
            yield opened
    except StoreError as error:
        code = EXIT_BUSY if isinstance(error, InUse) else EXIT_USAGE if isinstance(error, Invalid) else EXIT_FAILURE
        raise MountError(str(error), code) from None


def _open(parsed: Parsed) -> Library:
    if os.environ.get("UNIONFS_HOST"):
        from importlib import import_module

        given = [f"--{option.name}" for option in STORE if option.name in parsed]
        if given:
            raise MountError(f"{given[0]} is the daemon's to choose: leave it out with -H", EXIT_USAGE)
        remote: Library = import_module("unionfs.daemon.remote").Library()
        return remote
    from unionfs.daemon.choice import choose
    from unionfs.store.api import default_root
    from unionfs.store.library import Library

    root = os.path.abspath(parsed.get("data-root", default_root()))
    try:
        driver = choose(root, parsed.get("storage-driver"), "by --storage-driver").driver
    except MountError as error:
        raise MountError(str(error).removeprefix("daemon: "), error.code) from None
    return Library(root, driver, store_options(parsed))


def store_options(parsed: Parsed) -> dict[str, str]:
    options = {}
    for text in parsed.all("storage-opt"):
        name, equals, value = text.partition("=")
        if not equals:
            raise MountError(f"--storage-opt {text}: must be NAME=VALUE", EXIT_USAGE)
        options[name] = value
    return options


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """The first row is the heading; the last column is not padded."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip())


def print_json(rows: object) -> None:
    import json

    print(json.dumps(rows, indent=2))


def size(count: int) -> str:
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}TB"


def age(then: float) -> str:
    seconds = max(0, int(time.time() - then))
    for unit, length in (("day", 86400), ("hour", 3600), ("minute", 60)):
        if seconds >= length:
            count = seconds // length
            return f"{count} {unit}{'s' if count > 1 else ''} ago"
    return f"{seconds} seconds ago"


@contextmanager
def progress() -> Iterator[Progress | None]:
    """Bars on stderr if that is a terminal, and the library for them is there; else None."""
    if not sys.stderr.isatty():
        yield None
        return
    try:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
    except ImportError:
        yield None
        return
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    with Progress(*columns, console=Console(stderr=True)) as shown:
        tasks = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = shown.add_task(what, total=total or None)
            shown.update(tasks[what], completed=done)

        yield report


def write_stream(pieces: Iterator[bytes], target: str) -> None:
    """To a file, which appears when it is whole, or to standard output for "-"."""
    if target == "-":
        if sys.stdout.isatty():
            raise MountError("an archive is not for a terminal: redirect it, or give --output FILE", EXIT_USAGE)
        _write(pieces, sys.stdout.buffer)
        return
    unfinished = f"{target}.{os.getpid()}.tmp"
    try:
        with open(unfinished, "xb") as stream:
            _write(pieces, stream)
        os.replace(unfinished, target)
    except BaseException as error:
        if os.path.exists(unfinished):
            os.unlink(unfinished)
        if isinstance(error, OSError):
            raise MountError(f"{target}: {error.strerror or error}", EXIT_FAILURE) from None
        raise


def _write(pieces: Iterator[bytes], stream: IO[bytes]) -> None:
    for piece in pieces:
        stream.write(piece)
