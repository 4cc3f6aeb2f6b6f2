"""`unionfs setup podman|containerd|docker`: what an engine has to be told so that it uses unionfs.

podman's storage.conf is changed, after the change was shown and agreed to; the others' settings are printed, as they
are often kept by something else. An edit keeps comments and order, and is checked by reading the result as TOML.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from unionfs.errors import EXIT_FAILURE, EXIT_OK, MountError
from unionfs.front.args import Command, Option, Parsed, usage_error
from unionfs.front.plugin import CONTAINERD_SOCKET, DOCKER_SOCKET

ENGINES = ("podman", "containerd", "docker")
PROGRAM = "unionfs-fuse-overlayfs"

COMMAND = Command(
    "unionfs setup",
    "podman (also buildah, CRI-O): writes mount_program into storage.conf, after showing the change.\n"
    "containerd, docker: prints what to add to their configuration.",
    [
        Option("-y --yes", "podman: write without asking"),
        Option("--config", "podman: the storage.conf to change (default: the system's for root, else yours)", "FILE"),
        Option("--mount-program", f"podman: default is {PROGRAM} beside this program", "PATH"),
        Option("--socket", "docker, containerd: where the plugin listens", "PATH"),
    ],
    "podman|containerd|docker",
    1,
    1,
)

CONTAINERD = """\
# Add to /etc/containerd/config.toml, then restart containerd:
[proxy_plugins]
  [proxy_plugins.unionfs]
    type = "snapshot"
    address = "{socket}"

# For Kubernetes (CRI), the snapshotter that pods get, with containerd 1.x:
#   [plugins."io.containerd.grpc.v1.cri".containerd]
#     snapshotter = "unionfs"
# and with containerd 2.x:
#   [plugins."io.containerd.cri.v1.images"]
#     snapshotter = "unionfs"

# The snapshotter itself, before containerd starts:
#   {unionfs} plugin containerd{option}
# Then:
#   ctr images pull --snapshotter unionfs IMAGE; ctr run --snapshotter unionfs IMAGE NAME
#   nerdctl --snapshotter unionfs run IMAGE
"""
DOCKER = """\
Add to /etc/docker/daemon.json, then restart Docker (up to 27; newer ones use containerd: unionfs setup containerd):
{{
  "experimental": true,
  "storage-driver": "unionfs"
}}

The plugin itself, before dockerd starts; it keeps layers below dockerd's data root unless told --data-root:
  {unionfs} plugin docker{option}
{spec}Docker 27 wants DOCKERD_DEPRECATED_GRAPHDRIVER_PLUGINS=1 in dockerd's environment as well.
Check with: docker info | grep "Storage Driver"
"""


def run(parsed: Parsed) -> int:
    engine = parsed.arguments[0]
    if engine not in ENGINES:
        raise usage_error(f"unionfs setup: {engine!r}: one of {', '.join(ENGINES)}")
    wrong = {"podman": {"socket"}}.get(engine, {"yes", "config", "mount-program"}) & set(parsed.given)
    if wrong:
        raise usage_error(f"unionfs setup {engine}: --{min(wrong)} is not for {engine}")
    if engine == "podman":
        return _podman(parsed)
    unionfs = os.path.join(os.path.dirname(sys.executable), "unionfs")
    default = DOCKER_SOCKET if engine == "docker" else CONTAINERD_SOCKET
    socket = parsed.get("socket", default)
    option = "" if socket == default else f" --socket {socket}"
    if engine == "containerd":
        print(CONTAINERD.format(unionfs=unionfs, socket=socket, option=option), end="")
    else:
        spec = f"  echo unix://{socket} > /etc/docker/plugins/unionfs.spec\n" if option else ""
        print(DOCKER.format(unionfs=unionfs, option=option, spec=spec), end="")
    return EXIT_OK


def _podman(parsed: Parsed) -> int:
    program = parsed.get("mount-program") or os.path.join(os.path.dirname(sys.executable), PROGRAM)
    if not os.access(program, os.X_OK) or not os.path.isfile(program):
        raise MountError(f"setup podman: {program} is not a program: give its path by --mount-program")
    path = parsed.get("config") or _storage_conf()
    old, existed = _read(path)
    new = with_values(path, old, {"storage": {"driver": "overlay"}, OVERLAY: {"mount_program": program}})
    if new == old and existed:
        print(f"{path}: podman uses {program} already")
        return EXIT_OK
    from difflib import unified_diff

    shown = old.splitlines(keepends=True) if existed else []
    print("".join(unified_diff(shown, new.splitlines(keepends=True), path if existed else "/dev/null", path)), end="")
    if warning := _other_storage(new):
        print(f"unionfs: {warning}", file=sys.stderr)
    if "yes" not in parsed and not _agreed(path):
        return EXIT_FAILURE
    _write(path, new)
    print(f"{path}: written" + (f"; as it was: {path}.orig" if existed else ""))
    return EXIT_OK


OVERLAY = "storage.options.overlay"


def _storage_conf() -> str:
    if named := os.environ.get("CONTAINERS_STORAGE_CONF"):
        return named
    if os.geteuid() == 0:
        return "/etc/containers/storage.conf"
    config = os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")
    return os.path.join(config, "containers", "storage.conf")


def _read(path: str) -> tuple[str, bool]:
    """The text, and whether the file is there. A file that is not replaces all of podman's defaults: root's then
    begins as the distribution's."""
    sources = [path, "/usr/share/containers/storage.conf"] if os.geteuid() == 0 else [path]
    for source in sources:
        try:
            with open(source, encoding="utf-8", newline="") as stream:
                return stream.read(), source == path
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise MountError(f"setup podman: {source}: {error}: give another file by --config") from None
    if os.geteuid() == 0:
        return '[storage]\nrunroot = "/run/containers/storage"\ngraphroot = "/var/lib/containers/storage"\n', False
    return "", False


def with_values(path: str, text: str, wanted: Mapping[str, Mapping[str, str]]) -> str:
    """The TOML text with the keys of some tables set, everything else as it is. MountError if that can't be done."""
    import tomllib

    try:
        expected = tomllib.loads(text)
        lines = text.splitlines(keepends=True)
        for table, values in wanted.items():
            for key, value in values.items():
                lines = _set(lines, table, key, f'{key} = "{_escaped(value)}"\n')
                here = expected
                for name in table.split("."):
                    here = here.setdefault(name, {})
                here[key] = value
        result = "".join(lines)
        if tomllib.loads(result) != expected:
            raise ValueError("it is written in a form that is not understood here")
    except (ValueError, AttributeError) as error:  # TOMLDecodeError is a ValueError
        words = "; ".join(f'[{table}] {key} = "{value}"' for table, of in wanted.items() for key, value in of.items())
        raise MountError(f"{path}: {error}: put in by hand: {words}") from None
    return result


def _set(lines: list[str], table: str, key: str, line: str) -> list[str]:
    """Replaces the key's line in the table, or adds it at the table's head, or the table at the end."""
    inside, head = False, None
    for index, text in enumerate(lines):
        if match := re.match(r"\s*\[([^\[\]]+)\]\s*(#.*)?$", text):
            inside = re.sub(r"[\s\"']", "", match[1]) == table
            head = index if inside else head
        elif re.match(r"\s*\[\[", text):
            inside = False
        elif inside and re.match(rf"\s*[\"']?{key}[\"']?\s*=", text):
            return [*lines[:index], line, *lines[index + 1 :]]
    if head is not None:
        return [*_ended(lines[: head + 1]), line, *lines[head + 1 :]]
    return [*_ended(lines), *(["\n"] if lines else []), f"[{table}]\n", line]


def _ended(lines: list[str]) -> list[str]:
    return [*lines[:-1], lines[-1] + "\n"] if lines and not lines[-1].endswith("\n") else lines


def _escaped(value: str) -> str:
    import json

    return json.dumps(value)[1:-1]


def _other_storage(text: str) -> str:
    """A warning if there is storage that was made without a mount program: podman won't find its way there."""
    import tomllib

    storage: dict[str, Any] = tomllib.loads(text).get("storage", {})
    if os.geteuid() == 0:
        root = storage.get("graphroot") or "/var/lib/containers/storage"
    else:
        data = os.environ.get("XDG_DATA_HOME") or os.path.expanduser("~/.local/share")
        root = storage.get("rootless_storage_path") or os.path.join(data, "containers", "storage")
    overlay = os.path.join(root, "overlay")
    mark = os.path.join(overlay, ".has-mount-program")
    try:
        if not os.path.isdir(os.path.join(overlay, "l")):
            return ""
        with open(mark) as stream:
            if stream.read().strip() == "true":
                return ""
    except OSError:
        pass
    return (
        f"{root} holds storage that was made without a mount program, which podman does not take over: "
        "empty it (podman system reset) or name another graphroot"
    )


def _agreed(path: str) -> bool:
    if not sys.stdin.isatty():
        raise MountError(f"setup podman: nothing written to {path}: add --yes to write it without being asked")
    print(f"Write {path}? [y/N] ", end="", flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _write(path: str, text: str) -> None:
    import shutil

    path = os.path.realpath(path)  # a symlink stays one
    temporary = f"{path}.new"
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(temporary, "w", encoding="utf-8", newline="") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        if os.path.exists(path):
            shutil.copymode(path, temporary)
            shutil.copy2(path, f"{path}.orig")
        os.rename(temporary, path)
    except OSError as error:
        raise MountError(f"setup podman: {path}: {error.strerror}: give another file by --config") from None
