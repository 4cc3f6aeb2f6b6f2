"""`unionfs row flatten`: the way out of the row format."""

from __future__ import annotations

import os

from unionfs.api import MountConfig
from unionfs.errors import EXIT_FORMAT, EXIT_OK, MountError
from unionfs.front.args import Command, Option, Parsed, usage_error
from unionfs.front.options import split_paths
from unionfs.session.mount import show

COMMAND = Command(
    "unionfs row",
    "Makes an upper of the row driver, which is not mounted, a plain overlay upper: what its redirected files still\n"
    "take from the lowers is copied. The kernel's overlayfs, or --driver overlay, mounts it afterwards.",
    [Option("-l --lower", "the lower directories that it was mounted with", "DIR[:DIR...]")],
    "flatten UPPER",
    2,
    2,
    "Example:\n  unionfs row flatten --lower base changes/",
)


def run(parsed: Parsed) -> int:
    action, upper = parsed.arguments
    if action != "flatten" or "lower" not in parsed:
        raise usage_error("unionfs row flatten --lower DIR[:DIR...] UPPER")
    lowers = [os.fsencode(os.path.abspath(path)) for path in split_paths(parsed.get("lower"))]
    count = flatten(os.fsencode(os.path.abspath(upper)), lowers)
    print(f"{show(os.fsencode(upper))}: {count} files made whole: a plain overlay upper")
    return EXIT_OK


def flatten(upper: bytes, lowers: list[bytes]) -> int:
    """Stopped half-way it leaves a row upper that reads the same. Returns how many files were redirected."""
    import shutil
    from importlib import import_module

    from unionfs import assemble

    check = import_module("unionfs_drivers.row.check")
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
