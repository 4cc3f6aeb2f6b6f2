"""The only place that wires driver to core to session.

`prepare` opens and locks everything that a mount is made of and touches no mountpoint; `make_session` puts a
transport on it. Imports are local, so that a mount pays for the driver and the session that it uses and no other.
"""

from __future__ import annotations

from unionfs.errors import EXIT_FAILURE, EXIT_USAGE, MountError, nearest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from unionfs.api import MountConfig, Operations, Session

# The drivers that come with us, known without asking importlib.metadata (it costs 25 ms). `vfs` and others that
# are installed later are found by the same path or by entry point.
BUILT_IN = {
    "overlay": ("unionfs_drivers.overlay", "OverlayDriver"),
    "aufs": ("unionfs_drivers.aufs", "AufsDriver"),
    "row": ("unionfs_drivers.row", "RowDriver"),
    "vfs": ("unionfs_drivers.vfs", "VfsDriver"),
}

# Off unless asked for: with it a full disk is reported at fsync, not by the write that hit it.
WRITEBACK = "0"
FOREVER = 1 << 31  # seconds, and more is meant the same


def load_driver(name: str) -> Any:
    """The driver class of that name: built in, or from the entry-point group `unionfs.drivers`."""
    import importlib

    if name in BUILT_IN:
        module, attribute = BUILT_IN[name]
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            if error.name != module:
                raise
    from importlib.metadata import entry_points

    for point in entry_points(group="unionfs.drivers", name=name):
        try:
            return point.load()
        except Exception as error:
            raise MountError(f"driver {name}: {point.value} does not load: {error!r}", EXIT_FAILURE) from error
    known = driver_names()
    raise MountError(f"unknown driver {name!r}{nearest(name, known)}; known: {', '.join(known)}", EXIT_USAGE)


def driver_names() -> list[str]:
    """What `load_driver` would find, for messages and completion."""
    import importlib.util
    from importlib.metadata import entry_points

    names = {name for name, (module, _) in BUILT_IN.items() if importlib.util.find_spec(module)}
    return sorted(names | {point.name for point in entry_points(group="unionfs.drivers")})


def prepare(config: MountConfig) -> Operations:
    """Opens and locks the layers: after it nothing depends on the paths of `config`. MountError if they don't fit."""
    from unionfs.core.idmap import IdMap
    from unionfs.core.ops import UnionOperations

    IdMap(config)  # malformed maps are refused before anything is made on disk
    driver = load_driver(config.driver)(config)
    if driver.outside == "reval":
        from unionfs.core.outside import OutsideUnion

        return OutsideUnion(driver).gate
    if driver.outside == "notify":
        from unionfs.core.notified import NotifiedUnion

        return NotifiedUnion(driver).gate
    if driver.live:
        from unionfs.core.live import live_union

        return live_union(driver)
    if driver.freezes:
        from unionfs.core.freeze import freezing_union

        return freezing_union(driver)
    if driver.quota is not None:
        from unionfs.core.quota import LimitedUnion

        return LimitedUnion(driver)
    return UnionOperations(driver)


def session_kind(config: MountConfig) -> str:
    return "direct" if config.session == "auto" else config.session


def make_session(fd: int | None, ops: Operations, config: MountConfig) -> Session:
    """A transport for `ops`: the direct one serves the mounted device `fd`; pyfuse3 mounts by itself."""
    settings = session_settings(config)
    if session_kind(config) == "direct":
        from unionfs.session.direct import DirectSession

        assert fd is not None
        return DirectSession(
            fd, ops, data=config.data, debug=config.debug, acl="noacl" not in config.options,
            careful=ops.watch is not None, **settings,
        )  # fmt: skip
    try:
        from unionfs.session.pyfuse3_session import Pyfuse3Session
    except ImportError as error:
        raise MountError(f"--session pyfuse3: {error}: pip install pyfuse3 trio", EXIT_FAILURE) from None
    return Pyfuse3Session(ops, config, careful=ops.watch is not None, **settings)


def session_settings(config: MountConfig) -> dict[str, Any]:
    """What both sessions are told in the same words."""
    options = config.options
    return {
        "writeback": options.get("writeback", WRITEBACK) not in ("0", "off"),
        "max_threads": int(_number("max_threads", options.get("max_threads", "16"), 1, 256)),
        "timeout": int(_number("timeout", options["timeout"], 0, FOREVER)) if "timeout" in options else None,
    }


def _number(name: str, text: str, least: int, most: int) -> float:
    """fuse-overlayfs takes any float for some of these, and 1e9 is its default timeout."""
    try:
        value = float(text)
    except ValueError:
        raise MountError(f"-o {name}={text}: not a number", EXIT_USAGE) from None
    if not value >= least:
        raise MountError(f"-o {name}={text}: at least {least}", EXIT_USAGE)
    return min(value, most)
