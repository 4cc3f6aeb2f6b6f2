"""The target of the client's verbs, as options before the verb: `unionfs -H tcp://build:2376 --tlsverify info`.

They become environment variables, so a verb, wherever it is, finds one place to look at (`unionfs.daemon.client`).
"""

from __future__ import annotations

import os

from unionfs.front.args import Command, Option, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

TARGET = Command(
    "unionfs",
    "",
    [
        Option("-H --host", "ask the daemon there (UNIONFS_HOST)", "ADDRESS"),
        Option("--tlsverify", "with TLS (UNIONFS_TLS_VERIFY)"),
        Option("--tlscacert", "CA that signed the daemon's certificate (UNIONFS_TLS_CACERT)", "FILE"),
        Option("--tlscert", "this client's certificate (UNIONFS_TLS_CERT)", "FILE"),
        Option("--tlskey", "its key (UNIONFS_TLS_KEY)", "FILE"),
    ],
)
_VARIABLES = {
    "host": "UNIONFS_HOST",
    "tlsverify": "UNIONFS_TLS_VERIFY",
    "tlscacert": "UNIONFS_TLS_CACERT",
    "tlscert": "UNIONFS_TLS_CERT",
    "tlskey": "UNIONFS_TLS_KEY",
}


def take_target(argv: Sequence[str]) -> list[str]:
    """Sets what stands before the verb, returns the rest."""
    takes_value = {flag: bool(option.metavar) for option in TARGET.options for flag in option.flags if flag != "-h"}
    takes_value.pop("--help")
    position = 0
    while position < len(argv):
        word = argv[position]
        flag = word.partition("=")[0] if word.startswith("--") else word[:2]
        if flag not in takes_value:
            break
        position += 2 if takes_value[flag] and word == flag else 1
    for name, values in parse(TARGET, argv[:position]).given.items():
        os.environ[_VARIABLES[name]] = values[-1] or "1"
    return list(argv[position:])
