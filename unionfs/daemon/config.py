"""The daemon's settings: one table for the command line, UNIONFS_OPTS, the TOML file and the documentation.

A setting comes from one place. Named in two (a flag and the file, say) it is an error: whichever won would surprise
the one who wrote the other. No I/O but reading the file.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from unionfs.errors import EXIT_USAGE, MountError, nearest
from unionfs.store.api import DRIVERS, default_root

CONFIG_FILE = "/etc/unionfs/daemon.toml"
LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_DRIVERS = ("stderr", "json-file", "journald")


class Setting(NamedTuple):
    """A row: the flags, what the value is called ("" for yes or no), whether it may be given more than once."""

    flags: str
    metavar: str
    help: str
    many: bool = False
    choices: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As in the TOML file."""
        return self.flags.split()[-1].lstrip("-")


SETTINGS = (
    Setting(
        "-H --host",
        "ADDRESS",
        "listen on unix:///PATH, tcp://IP:PORT or fd:// (systemd's sockets); may be repeated",
        many=True,
    ),
    Setting("--group", "GROUP", "who may use the unix socket (default unionfs)"),
    Setting("--tlsverify", "", "TLS on tcp sockets, only for clients whose certificate the CA signed"),
    Setting("--tlscacert", "FILE", "CA that signs the clients' certificates"),
    Setting("--tlscert", "FILE", "the daemon's certificate"),
    Setting("--tlskey", "FILE", "its key"),
    Setting(
        "--storage-driver",
        "DRIVER",
        "what the layers are kept with (default: what is stored, or fits)",
        choices=DRIVERS,
    ),
    Setting("--storage-opt", "KEY=VALUE", "option of the storage driver; may be repeated", many=True),
    Setting("--data-root", "DIR", "where layers and images are (default /var/lib/unionfs)"),
    Setting("--unmount-on-stop", "", "unmount everything when the daemon is stopped; else mounts stay up"),
    Setting("--docker-plugin", "SOCKET", "serve Docker's graph driver plugin there too"),
    Setting("--containerd-snapshotter", "SOCKET", "serve containerd's snapshots service there too"),
    Setting("--log-level", "LEVEL", "least that is logged (default info)", choices=LOG_LEVELS),
    Setting("--log-driver", "DRIVER", "where the log goes (default stderr)", choices=LOG_DRIVERS),
    Setting("--log-file", "FILE", "of --log-driver json-file (default DATA_ROOT/daemon.log)"),
)
BY_NAME = {setting.name: setting for setting in SETTINGS}


class Config(NamedTuple):
    hosts: tuple[str, ...]  # () for the default
    group: str  # "" for the default
    tlsverify: bool
    tlscacert: str
    tlscert: str
    tlskey: str
    driver: str  # "" if none was named
    driver_from: str  # "--storage-driver" or the file that named it
    storage_options: dict[str, str]
    data_root: str
    unmount_on_stop: bool
    docker_plugin: str
    containerd_snapshotter: str
    log_level: str
    log_driver: str
    log_file: str


def read_config(sources: Sequence[tuple[str, Mapping[str, Sequence[str]]]]) -> Config:
    """Settings by where they come from ("the command line", "UNIONFS_OPTS", a file) as one `Config`.

    MountError (usage) for a setting that two of them name, and for one that makes no sense.
    """
    given: dict[str, Sequence[str]] = {}
    origin: dict[str, str] = {}
    for where, settings in sources:
        for name, values in settings.items():
            if name in given:
                raise _usage(f"{name} is set both {origin[name]} and {where}: keep one of them")
            if len(values) > 1 and not BY_NAME[name].many:
                raise _usage(f"{name} is given {len(values)} times {where}: keep one")
            given[name], origin[name] = values, where

    def text(name: str, default: str = "") -> str:
        return given[name][-1] if name in given else default

    def path(name: str, default: str = "") -> str:
        value = text(name, default)
        return os.path.abspath(value) if value else ""

    tls = [name for name in ("tlscacert", "tlscert", "tlskey") if name in given]
    if "tlsverify" in given and len(tls) < 3:
        missing = [name for name in ("tlscacert", "tlscert", "tlskey") if name not in given]
        raise _usage(f"--tlsverify needs --{' and --'.join(missing)} too (unionfs certs create makes the files)")
    if tls and "tlsverify" not in given:
        raise _usage(
            f"--{tls[0]} needs --tlsverify: TLS that asks for no certificate would let in everyone who reaches the port"
        )
    data_root = path("data-root", default_root())
    try:
        data_root.encode()
    except UnicodeEncodeError:
        raise _usage("data-root: the daemon's data root must be UTF-8: its paths are told as JSON") from None
    if "log-file" in given and text("log-driver") != "json-file":
        raise _usage("--log-file is for --log-driver json-file")
    return Config(
        tuple(given.get("host", ())),
        text("group"),
        "tlsverify" in given,
        path("tlscacert"),
        path("tlscert"),
        path("tlskey"),
        text("storage-driver"),
        origin.get("storage-driver", ""),
        _options(given.get("storage-opt", ())),
        data_root,
        "unmount-on-stop" in given,
        path("docker-plugin"),
        path("containerd-snapshotter"),
        text("log-level", "info"),
        text("log-driver", "stderr"),
        path("log-file", os.path.join(data_root, "daemon.log")),
    )


def read_file(path: str) -> dict[str, list[str]]:
    """The settings in a TOML file, as flags would give them: `host = ["unix:///run/x.sock"]`, `tlsverify = true`."""
    try:
        with open(path, "rb") as stream:
            content = tomllib.load(stream)
    except OSError as error:
        raise _usage(f"config file {path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise _usage(f"config file {path} is not TOML: {error}") from None
    settings = {}
    for name, value in content.items():
        setting = BY_NAME.get(name)
        if setting is None:
            raise _usage(f"config file {path}: unknown option {name!r}{nearest(name, list(BY_NAME))}")
        values = _values(setting, value)
        if values is None:
            wanted = "true or false" if not setting.metavar else "a list of texts" if setting.many else "a text"
            raise _usage(f"config file {path}: {name} must be {wanted}, not {value!r}")
        for one in values:
            if setting.choices and one not in setting.choices:
                raise _usage(f"config file {path}: {name} is one of {', '.join(setting.choices)}, not {one!r}")
        if values:
            settings[name] = values
    return settings


def _values(setting: Setting, value: Any) -> list[str] | None:
    if not setting.metavar:
        return ([""] if value else []) if isinstance(value, bool) else None
    if isinstance(value, str):
        return [value]
    if setting.many and isinstance(value, list) and all(isinstance(one, str) for one in value):
        return value
    return None


def _options(words: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not key or not equals:
            raise _usage(f"--storage-opt {word}: must be KEY=VALUE")
        if key in options:
            raise _usage(f"--storage-opt {key} is given twice: keep one")
        options[key] = value
    return options


def _usage(message: str) -> MountError:
    return MountError(f"daemon: {message}", EXIT_USAGE)
