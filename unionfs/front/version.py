"""`unionfs version`: of this client and of the daemon it talks to."""

from __future__ import annotations

import time

from unionfs import __version__
from unionfs.errors import EXIT_FAILURE, EXIT_OK, MountError
from unionfs.front.args import Command, Option, Parsed
from unionfs.front.info import ask

COMMAND = Command(
    "unionfs version",
    "Shows the versions of this client and of the daemon.",
    [Option("-j --json", "as JSON")],
    epilog="Exits with 1 if no daemon answers; `unionfs --version` asks none.",
)


def run(parsed: Parsed) -> int:
    problem = None
    server = None
    try:
        server = ask("/version")
    except MountError as error:
        problem = error
    if "json" in parsed:
        import json

        print(json.dumps({"client": {"version": __version__}, "server": server}, indent=2))
    else:
        print(f"Client:\n Version: {__version__}")
        if server:
            started = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(server["started"]))
            print(f"\nServer:\n Version: {server['version']}\n API: {server['api_version']}")
            print(f" Python: {server['python']}\n Kernel: {server['kernel']}")
            print(f" Started: {started}, process {server['pid']}")
    if problem:
        raise MountError(str(problem), EXIT_FAILURE)
    return EXIT_OK
