"""`unionfs info`: the daemon, its storage driver and what it keeps."""

from __future__ import annotations

from unionfs.errors import EXIT_OK, MountError
from unionfs.front.args import Command, Option, Parsed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

COMMAND = Command(
    "unionfs info",
    "Shows the daemon's storage driver, what it keeps and where it listens.",
    [Option("-j --json", "as JSON")],
    epilog="Which daemon: unionfs -H ADDRESS info, or UNIONFS_HOST; else the default socket.",
)


def run(parsed: Parsed) -> int:
    answer = ask("/info")
    if "json" in parsed:
        import json

        print(json.dumps(answer, indent=2))
    else:
        print("\n".join(text(answer)))
    return EXIT_OK


def ask(path: str) -> Any:
    """What the daemon says to a GET; MountError in its words if it refuses."""
    from unionfs.daemon.client import connect
    from unionfs.store.api import StoreError

    try:
        return connect().call("GET", path)
    except StoreError as error:
        raise MountError(str(error)) from None


def text(answer: dict[str, Any]) -> list[str]:
    rows = [f"Storage Driver: {answer['storage_driver']}"]
    rows += [f" {name}: {value}" for name, value in answer["status"]]
    rows += [
        f" Chosen: {answer['chosen']}",
        f"Data Root: {answer['data_root']}",
        f"Images: {answer['images']}",
        f"Containers: {answer['containers']}",
        f"Layers: {answer['layers']}",
        f"Mounts: {answer['mounts']}",
        f"Server Version: {answer['server_version']}",
        f"Kernel Version: {answer['kernel_version']}",
        f"Architecture: {answer['architecture']}",
        f"CPUs: {answer['cpus']}",
        f"Total Memory: {answer['memory'] / (1 << 30):.1f}GiB",
    ]
    rows += [f"Listening: {where}" for where in answer["listening"]]
    return rows + [f"WARNING: {warning}" for warning in answer["warnings"]]
