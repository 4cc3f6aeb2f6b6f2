"""`unionfs plugin docker|containerd`: one engine's plugin in the foreground, without the daemon."""

from __future__ import annotations

from unionfs.errors import EXIT_OK, MountError
from unionfs.front.args import Command, Option, Parsed, usage_error

DOCKER_SOCKET = "/run/docker/plugins/unionfs.sock"
CONTAINERD_SOCKET = "/run/unionfs/containerd.sock"

COMMAND = Command(
    "unionfs plugin",
    "Serves a container engine in the foreground: Docker's graph driver plugin, or containerd's proxy snapshotter.\n"
    "Mounts outlive it, and it finds them again.",
    [
        Option("--data-root", "where layers are kept (docker: below dockerd's own root; else /var/lib/unionfs)", "DIR"),
        Option("--storage-driver", "overlay, aufs, row, vfs or btrfs (default overlay)", "NAME"),
        Option("--storage-opt", "option of the store or the driver, may be repeated", "KEY=VALUE"),
        Option("--socket", f"default {DOCKER_SOCKET}, {CONTAINERD_SOCKET}", "PATH"),
        Option("--debug", "log every refusal"),
    ],
    "docker|containerd",
    1,
    1,
    "`unionfs setup docker` and `unionfs setup containerd` tell what the engine needs to know of it.",
)


def run(parsed: Parsed) -> int:
    engine = parsed.arguments[0]
    if engine not in ("docker", "containerd"):
        raise usage_error(f"unionfs plugin: {engine!r}: docker or containerd")
    from unionfs.store.api import StoreError, default_root

    try:
        from unionfs.engines import serve
        from unionfs.engines.options import storage_options

        serve.start_log("debug" in parsed)
        options = storage_options(parsed.all("storage-opt"))
        driver = parsed.get("storage-driver", "overlay")
        if engine == "docker":
            root = parsed.get("data-root") or None
            serve.docker(root, driver, options, parsed.get("socket", DOCKER_SOCKET))
        else:
            root = parsed.get("data-root") or default_root()
            serve.containerd(root, driver, options, parsed.get("socket", CONTAINERD_SOCKET))
    except StoreError as error:
        raise MountError(f"plugin {engine}: {error}") from None
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("unionfs"):
            raise
        raise MountError(
            f"plugin {engine}: the Python package {error.name.partition('.')[0]!r} is missing: "
            "pip install 'unionfs[daemon]'"
        ) from None
    return EXIT_OK
