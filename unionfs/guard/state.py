"""What another program needs to go on with a mount: its configuration, the device and the journal, in a memfd.

For a supervisor of other code (`unionfs upgrade`), and for one that systemd starts after ours has died. JSON, because
the two programs may differ.
"""

from __future__ import annotations

import os

from unionfs.api import MountConfig

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_BYTES = ("mountpoint", "upper", "work")
_PLAIN = ("driver", "options", "vfs_options", "session", "data", "read_only", "foreground", "debug", "source")


def save(config: MountConfig, fd: int | None = None) -> int:
    """A memfd with the configuration; `fd`: write it over that one."""
    import json

    state: dict[str, Any] = {name: getattr(config, name) for name in _PLAIN}
    for name in _BYTES:
        value = getattr(config, name)
        state[name] = None if value is None else os.fsdecode(value)
    state["lowers"] = [os.fsdecode(path) for path in config.lowers]
    state["branches"] = [[os.fsdecode(path), mode] for path, mode in config.branches]
    data = json.dumps(state).encode()
    if fd is None:
        fd = os.memfd_create("unionfs-state", os.MFD_CLOEXEC)
    os.pwrite(fd, data.ljust(os.fstat(fd).st_size), 0)
    return fd


def load(fd: int) -> MountConfig:
    import json

    state = json.loads(os.pread(fd, os.fstat(fd).st_size, 0))
    config = MountConfig(os.fsencode(state["mountpoint"]), driver=state["driver"])
    for name in _PLAIN:
        setattr(config, name, state[name])
    for name in _BYTES:
        setattr(config, name, None if state[name] is None else os.fsencode(state[name]))
    config.lowers = [os.fsencode(path) for path in state["lowers"]]
    config.branches = [(os.fsencode(path), mode) for path, mode in state["branches"]]
    return config
