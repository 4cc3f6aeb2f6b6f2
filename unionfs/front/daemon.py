"""`unionfs daemon`: its command line. The daemon and its libraries are imported when it runs, never by a mount."""

from __future__ import annotations

import os
import shlex

from unionfs.daemon.config import CONFIG_FILE, SETTINGS, Config, read_config, read_file
from unionfs.errors import EXIT_FAILURE, EXIT_OK, EXIT_USAGE, MountError
from unionfs.front.args import Command, Option, Parsed, parse
from unionfs.guard.systemd import notify

COMMAND = Command(
    "unionfs daemon",
    "Serves layers, images and containers over a REST API, in the foreground. Ctrl+C stops it; mounts stay up.",
    [
        *(Option(setting.flags, setting.help, setting.metavar, setting.choices) for setting in SETTINGS),
        Option("--fsck", "check the store, tell what is wrong and end: 0 if it is clean, else 1"),
        Option("--repair", "with --fsck: repair what can be, remove what can't"),
        Option("--config-file", f"settings as TOML (default {CONFIG_FILE} if it is there)", "FILE"),
    ],
    epilog="""\
Every option can stand in the TOML file (host = ["tcp://127.0.0.1:2376"], tlsverify = true, ...) or in UNIONFS_OPTS,
as on a command line. An option that two places name is an error. Without -H: unix:///run/unionfs.sock; if only tcp
addresses are given there is no unix socket. Ports: 2375, with TLS 2376.
  unionfs daemon --storage-driver overlay --data-root /srv/unionfs
  unionfs daemon -H unix:///run/unionfs.sock -H tcp://0.0.0.0:2376 --tlsverify \\
      --tlscacert ca.pem --tlscert server-cert.pem --tlskey server-key.pem""",
)


def run(parsed: Parsed) -> int:
    from_environment = parse(COMMAND, shlex.split(os.environ.get("UNIONFS_OPTS", "")))
    if from_environment.arguments:
        raise MountError(f"daemon: UNIONFS_OPTS: unexpected argument {from_environment.arguments[0]!r}")
    sources: list[tuple[str, dict[str, list[str]]]] = [
        ("on the command line", dict(parsed.given)),
        ("in UNIONFS_OPTS", dict(from_environment.given)),
    ]
    named = [values for _, given in sources for values in given.pop("config-file", [])]
    path = named[-1] if named else CONFIG_FILE if os.path.exists(CONFIG_FILE) else ""
    if path:
        sources.append((f"in {path}", read_file(path)))
    actions = {name for _, given in sources for name in ("fsck", "repair") if given.pop(name, None)}
    config = read_config(sources)
    if actions:
        return _check(config, actions)
    try:
        from unionfs.daemon import serve
    except ModuleNotFoundError as error:
        raise MountError(
            f"daemon: the Python package {error.name} is missing: pip install 'unionfs[daemon]'", EXIT_FAILURE
        ) from None
    serve.run(config, notify)
    return EXIT_OK


def _check(config: Config, actions: set[str]) -> int:
    from unionfs.daemon.storage import check

    if "fsck" not in actions:
        raise MountError("daemon: --repair goes with --fsck", EXIT_USAGE)
    found = check(config, "repair" in actions)
    for line in found:
        print(line)
    print(f"{config.data_root}: {len(found)} findings" if found else f"{config.data_root}: clean")
    return EXIT_FAILURE if found else EXIT_OK
