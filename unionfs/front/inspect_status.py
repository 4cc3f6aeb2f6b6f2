"""`unionfs status`: what one mount is made of and what it has done."""

from __future__ import annotations

from unionfs.errors import EXIT_OK
from unionfs.front import control
from unionfs.front.args import Command, Option, Parsed
from unionfs.front.inspect_list import duration
from unionfs.front.mounts import mount_of
from unionfs.session.mount import show

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

COMMAND = Command(
    "unionfs status",
    "Shows layers, driver, session, data path, cache and message counters, and copied-up bytes of a mount.",
    [Option("-j --json", "as JSON")],
    "PATH",
    1,
    1,
    "PATH is the mountpoint or anything below it.",
)


def run(parsed: Parsed) -> int:
    mount, _ = mount_of(parsed.arguments[0])
    status = control.ask(mount, "status", 30.0)
    if "json" in parsed:
        import json

        print(json.dumps(status, indent=2))
        return EXIT_OK
    print(text(status), end="")
    return EXIT_OK


def text(status: dict[str, Any]) -> str:
    rows: list[tuple[str, str]] = [
        ("mountpoint", _path(status["mountpoint"]) + (" (read-only)" if status["read_only"] else "")),
        ("driver", status["driver"]),
        ("session", status["session"]),
        ("server", f"process {status['pid']}, up {duration(status['uptime'])}"),
    ]
    rooms = {row["path"]: row for row in status["statistics"]["core"]["layers"] if "free" in row}
    rows += [("branch", f"{_path(path)} {mode}".rstrip() + _room(rooms.get(path))) for path, mode in status["branches"]]
    if status["upper"] is not None:
        rows += [("upper", _path(status["upper"])), ("work", _path(status["work"]))]
    rows += [("lower", _path(path)) for path in status["lowers"]]
    rows += [("option", f"{name}={value}" if value else name) for name, value in sorted(status["options"].items())]
    for part, figures in status["statistics"].items():
        rows += [(f"{part} {name}", value) for name, value in _flat(figures)]
    width = max(len(name) for name, _ in rows)
    return "".join(f"{name:<{width}}  {value}\n" for name, value in rows)


def _room(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    free = "does not answer" if row["free"] is None else f"{row['free'] / (1 << 30):.1f} GiB free"
    return f" ({free}, {row['known']} known)"


def _flat(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name} ")
        elif isinstance(value, list):
            if value and isinstance(value[0], dict):
                continue  # layers: they have rows of their own
            yield prefix + name, " ".join(map(str, value))
        else:
            yield prefix + name, f"{value:.3f}" if isinstance(value, float) else str(value)


def _path(path: str) -> str:
    return show(path.encode("utf-8", "surrogateescape"))
