"""`mount.fuse.unionfs`: what mount(8) and /etc/fstab run. `mount.fuse.unionfs SOURCE MOUNTPOINT [-sfnv] [-o OPTIONS]`.

The same through mount.fuse(8), which runs `unionfs SOURCE MOUNTPOINT -o OPTIONS,dev,suid` with an empty PATH.
Returns when the mount answers. Words that fstab and systemd keep in the list for themselves are let pass.
"""

from __future__ import annotations

import os
import sys

from unionfs.api import MountConfig
from unionfs.errors import EXIT_OK, EXIT_USAGE, MountError
from unionfs.front.args import Command, Option, help_text, parse
from unionfs.front.options import apply_options, split_options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

COMMAND = Command(
    "mount.fuse.unionfs",
    "Mount helper for mount(8): mount -t fuse.unionfs -o lowerdir=A:B,upperdir=C,workdir=W none MOUNTPOINT",
    [
        Option("-o", "options, separated by commas", "OPTIONS"),
        Option("-t", "file system type, as mount(8) passes it", "TYPE"),
        Option("-N", "namespace, as mount(8) passes it", "NAMESPACE"),
        Option("-r", "mount read-only"),
        Option("-w", "mount read-write"),
        Option("-f", "fake: check the arguments, mount nothing"),
        Option("-n", "no mtab (there is none)"),
        Option("-s", "tolerate unknown options"),
        Option("-v", "verbose"),
    ],
    "SOURCE MOUNTPOINT",
    2,
    2,
)


def main() -> int:
    from unionfs.front.cli import guarded

    return guarded(lambda: mount(sys.argv[1:]))


def mount(argv: Sequence[str]) -> int:
    from unionfs.front import server

    parsed = parse(COMMAND, argv)
    if "help" in parsed:
        print(help_text(COMMAND), end="")
        return EXIT_OK
    if parsed.get("N"):
        raise MountError("mount -N is not supported: use nsenter", EXIT_USAGE)
    words = [word for text in parsed.all("o") for word in split_options(text)]
    source, mountpoint = parsed.arguments
    if "remount" in words:
        from unionfs.front.branch import remount

        return remount(mountpoint, words)
    config = MountConfig(os.fsencode(os.path.abspath(mountpoint)))
    config.source = source
    config.options["nonempty"] = ""  # mount(8) covers whatever is there
    if "r" in parsed:
        words.append("ro")
    apply_options(config, words)
    from unionfs.front.mount import complete

    complete(config)
    if "f" in parsed:
        return EXIT_OK
    config.foreground = False  # mount(8) waits for us: -o debug writes its trace to the log
    return server.run(config)
