"""`unionfs export`: a container's whole tree, or its changes, as a tar."""

from __future__ import annotations

from unionfs.errors import EXIT_OK
from unionfs.front.args import Command, Option, Parsed
from unionfs.front.image_common import STORE, library, write_stream

COMMAND = Command(
    "unionfs export",
    "Writes a container's whole tree as a tar to standard output, or what it changes as an OCI layer.",
    [
        Option("-o --output", "write to FILE", "FILE"),
        Option("-c --changes", "only what was changed, deletions as .wh. files"),
        *STORE,
    ],
    "CONTAINER",
    1,
    1,
    "Examples:\n  unionfs export work | tar -t\n  unionfs export --changes --output layer.tar work",
)


def run(parsed: Parsed) -> int:
    (name,) = parsed.arguments
    with library(parsed) as opened:
        pieces = opened.containers.diff(name) if "changes" in parsed else opened.containers.export(name)
        write_stream(pieces, parsed.get("output", "-"))
    return EXIT_OK
