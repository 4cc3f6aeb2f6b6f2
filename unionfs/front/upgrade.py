"""`unionfs upgrade`: the server of a mount becomes that of the code on disk, without unmounting."""

from __future__ import annotations

import time

from unionfs.errors import EXIT_FAILURE, EXIT_NOT_OURS, EXIT_OK, EXIT_USAGE, MountError
from unionfs.front.args import Command, Parsed
from unionfs.front.control import ask
from unionfs.front.mounts import Mount, mount_of
from unionfs.session.mount import show

COMMAND = Command(
    "unionfs upgrade",
    "Replaces the server of a mount made with -o guard=on by one of the code on disk. Files stay open, requests wait\n"
    "for it. Refused, and nothing happens, where the code on disk does not start or can't read the running server's\n"
    "journal: unmount and mount again then.",
    [],
    "MOUNTPOINT...",
    1,
    1 << 20,
    "Example:\n  unionfs upgrade merged",
)
TIMEOUT = 60.0


def run(parsed: Parsed) -> int:
    for path in parsed.arguments:
        mount, inside = mount_of(path)
        if inside != b"/":
            raise MountError(f"{path} is not a mountpoint, but inside of {show(mount.path)}", EXIT_NOT_OURS)
        if ask(mount, "status", TIMEOUT)["options"].get("guard", "off") in ("off", "0"):
            raise MountError(f"{show(mount.path)}: not mounted with -o guard=on: unmount and mount again", EXIT_USAGE)
        before = ask(mount, "upgrade", TIMEOUT)["pid"]
        _wait_for_next(mount, before)
    return EXIT_OK


def _wait_for_next(mount: Mount, before: int) -> None:
    deadline = time.monotonic() + TIMEOUT
    while True:
        try:
            if ask(mount, "ping", TIMEOUT)["pid"] != before:
                return
        except MountError:
            pass  # between the two
        if time.monotonic() > deadline:
            raise MountError(f"{show(mount.path)}: no new server after {TIMEOUT:.0f} s: see its log", EXIT_FAILURE)
        time.sleep(0.01)
