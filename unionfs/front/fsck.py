"""`unionfs fsck`: the block maps of an unmounted row upper."""

from __future__ import annotations

import os
import sys

from unionfs.errors import EXIT_FAILURE, EXIT_FORMAT, EXIT_LAYER, EXIT_OK, MountError
from unionfs.front.args import Command, Option, Parsed
from unionfs.session.mount import show

COMMAND = Command(
    "unionfs fsck",
    "Checks the block maps of an upper directory that the row driver wrote, while it is not mounted. Says what is\n"
    "wrong; exit code 0: nothing, or all of it repaired; 1: something that is harmless or can be repaired with\n"
    "--repair; 8: a file can't be read as it was.",
    [
        Option("-r --repair", "repair what needs no guessing: torn ends of maps, maps that belong to no file"),
    ],
    "UPPER",
    1,
    1,
    "Example:\n  unionfs fsck --repair changes/",
)


def run(parsed: Parsed) -> int:
    from importlib import import_module

    check = import_module("unionfs_drivers.row.check")
    upper = os.fsencode(os.path.abspath(parsed.arguments[0]))
    if not os.path.isdir(upper):
        raise MountError(f"{show(upper)}: not a directory; name the upper of a row mount", EXIT_LAYER)
    findings = check.check(upper, "repair" in parsed)
    for finding in findings:
        state = "repaired" if finding.repaired else "LOST" if finding.fatal else "found"
        print(f"{state}: {show(finding.path)}: {finding.words}", file=sys.stderr)
    if not findings:
        print(f"{show(upper)}: clean")
    if any(finding.fatal for finding in findings):
        return EXIT_FORMAT
    return EXIT_OK if all(finding.repaired for finding in findings) else EXIT_FAILURE
