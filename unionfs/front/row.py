"""`unionfs row`: flatten, the way out of the row format, and inspect, a look into it."""

from __future__ import annotations

import os

from unionfs.api import MountConfig
from unionfs.errors import EXIT_FORMAT, EXIT_LAYER, EXIT_OK, MountError
from unionfs.front.args import Command, Option, Parsed, usage_error
from unionfs.front.options import split_paths
from unionfs.session.mount import show

COMMAND = Command(
    "unionfs row",
    "flatten makes an upper of the row driver, which is not mounted, a plain overlay upper: what its redirected files\n"
    "still take from the lowers is copied. The kernel's overlayfs, or --driver overlay, mounts it afterwards.\n"
    "inspect draws the block map of a file of an upper (named in the upper, mounted or not): what is redirected.",
    [Option("-l --lower", "flatten: the lower directories that it was mounted with", "DIR[:DIR...]")],
    "flatten UPPER | inspect UPPER/PATH",
    2,
    2,
    "Examples:\n  unionfs row flatten --lower base changes/\n  unionfs row inspect changes/var/lib/app.db",
)


def run(parsed: Parsed) -> int:
    action, path = parsed.arguments
    place = os.fsencode(os.path.abspath(path))
    if action == "inspect" and "lower" not in parsed:
        for line in inspect(place):
            print(line)
    elif action == "flatten" and "lower" in parsed:
        lowers = [os.fsencode(os.path.abspath(lower)) for lower in split_paths(parsed.get("lower"))]
        print(f"{show(place)}: {flatten(place, lowers)} files made whole: a plain overlay upper")
    else:
        raise usage_error("unionfs row flatten --lower DIR[:DIR...] UPPER, or unionfs row inspect UPPER/PATH")
    return EXIT_OK


def inspect(path: bytes) -> list[str]:
    from importlib import import_module
    from stat import S_ISREG

    check = import_module("unionfs_drivers.row.check")
    blockmap = import_module("unionfs_drivers.row.blockmap")
    try:
        regular = S_ISREG(os.lstat(path).st_mode)
    except OSError as e:
        raise MountError(f"{show(path)}: {e.strerror}; name a file in the upper of a row mount", EXIT_LAYER) from None
    if not regular:
        raise MountError(f"{show(path)}: not a regular file: only those have block maps", EXIT_LAYER)
    upper = check.upper_of(path)
    if upper is None:
        raise MountError(f"{show(path)}: not in an upper with block maps; name it in the upper, not in the merged view",
                         EXIT_LAYER)  # fmt: skip
    try:
        lines: list[str] = check.draw(upper, path)
    except blockmap.MapError as e:
        raise MountError(f"{show(path)}: its block map {e}; see unionfs fsck {show(upper)}", EXIT_FORMAT) from None
    return lines


def flatten(upper: bytes, lowers: list[bytes]) -> int:
    """Stopped half-way it leaves a row upper that reads the same. Returns how many files were redirected."""
    import shutil
    from importlib import import_module

    from unionfs import assemble

    check = import_module("unionfs_drivers.row.check")
    check.refuse_snapshots(upper)
    config = MountConfig(b"/", driver="row")
    config.lowers, config.upper = lowers, upper
    config.work = upper.rstrip(b"/") + b".flatten"
    ops = assemble.prepare(config)  # locks the upper: nobody mounts it meanwhile
    try:
        paths = [path for path, _ in check.redirected(upper)]
        for path in paths:
            if not ops.make_whole(path[len(upper) :]):  # type: ignore[attr-defined]
                raise MountError(f"{show(path)}: can't be made whole: see unionfs fsck {show(upper)}", EXIT_FORMAT)
        shutil.rmtree(os.path.join(upper, check.STORE), ignore_errors=True)
    finally:
        ops.stop()
        shutil.rmtree(config.work, ignore_errors=True)
    return len(paths)
