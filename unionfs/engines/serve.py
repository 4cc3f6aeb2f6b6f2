"""An engine's plugin served alone, without the daemon: `unionfs plugin`. Blocks until SIGINT or SIGTERM.

Both open their store, listen on a unix socket that is its owner's alone, and leave mounts serving when they end.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import stat
import sys
import threading
from collections.abc import Mapping
from functools import partial
from typing import cast

from unionfs.errors import EXIT_BUSY, MountError
from unionfs.store.api import InUse, Store, open_store

log = logging.getLogger("unionfs.plugin")


class Homes:
    """The stores of `graphdriver.Stores`, for a plugin that serves alone: at `root`, or where each dockerd says."""

    def __init__(self, root: str | None, driver: str, options: Mapping[str, str]) -> None:
        self._root, self._driver, self._options = root, driver, dict(options)
        self._open: dict[str, tuple[Mapping[str, str], Store]] = {}
        self._lock = threading.Lock()

    def __call__(self, home: str, options: Mapping[str, str]) -> Store:
        root = os.path.realpath(self._root or home)
        merged = {**self._options, **options}
        driver = merged.pop("driver", self._driver)
        with self._lock:
            held = self._open.get(root)
            if held is not None and held[0] != {**merged, "driver": driver}:
                held[1].close()  # dockerd was restarted with other options
                del self._open[root]
                held = None
            if held is None:
                os.makedirs(root, 0o711, exist_ok=True)
                store = open_store(root, driver, merged)
                self._open[root] = held = ({**merged, "driver": driver}, store)
                store.cleanup()
            return held[1]

    def close(self) -> None:
        for _, store in self._open.values():
            store.close()


def start_log(debug: bool) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.DEBUG if debug else logging.INFO, format="%(levelname)s %(name)s: %(message)s"
    )


def listen(path: str) -> socket.socket:
    """A listening unix socket, mode 600. A socket that nobody listens on any more is replaced."""
    os.makedirs(os.path.dirname(path) or ".", 0o755, exist_ok=True)
    refuse_served(path)
    server = socket.socket(socket.AF_UNIX)
    old = os.umask(0o177)
    try:
        server.bind(path)
    except OSError as error:
        raise MountError(f"socket {path}: {error.strerror or error}: choose another by --socket") from None
    finally:
        os.umask(old)
    server.listen(128)
    return server


def refuse_served(path: str) -> None:
    """Takes a dead socket away; MountError if somebody answers on it or it is something else."""
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise MountError(f"socket {path}: there is something else of that name: choose another by --socket")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise MountError(f"socket {path}: another process serves it: stop that one, or choose another --socket", EXIT_BUSY)


def docker(root: str | None, driver: str, options: Mapping[str, str], path: str) -> None:
    """Docker's graph driver plugin; the store is opened when a dockerd says where, at once if `root` is given."""
    import trio
    from hypercorn.config import Config
    from hypercorn.trio import serve
    from hypercorn.typing import ASGIFramework

    from unionfs.engines.graphdriver import graph_driver

    homes = Homes(root, driver, options)
    if root is not None:
        homes(root, {})
    listener = listen(path)
    app = cast(ASGIFramework, graph_driver(homes, f"{path}.init"))
    config = Config()
    config.bind = [f"fd://{listener.detach()}"]
    config.graceful_timeout = 10
    config.loglevel = "warning"
    config.keep_alive_timeout = 3600  # dockerd keeps its connection; closed under it, its next call fails
    config.read_timeout = None  # an archive may be slow to come

    async def main() -> None:
        stopping = trio.Event()
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
            async with trio.open_nursery() as nursery:
                await nursery.start(partial(serve, app, config, mode="asgi", shutdown_trigger=stopping.wait))
                log.info("Docker's graph driver plugin listens on %s", path)
                async for number in signals:
                    log.info("%s: stopping; mounts are left serving", signal.Signals(number).name)
                    stopping.set()
                    break

    try:
        trio.run(main)
    finally:
        homes.close()
        _unlink(path)


def containerd(root: str, driver: str, options: Mapping[str, str], path: str) -> None:
    """containerd's proxy snapshotter over one store."""
    from unionfs.engines.snapshotter import serve

    signals = {signal.SIGINT, signal.SIGTERM}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # before there are threads: sigwait below takes them
    try:
        store = open_store(root, driver, options)
    except InUse as error:
        raise MountError(str(error), EXIT_BUSY) from None
    try:
        store.cleanup()
        os.makedirs(os.path.dirname(path) or ".", 0o755, exist_ok=True)
        refuse_served(path)
        server = serve(store, path)
        log.info("containerd's snapshotter listens on %s: driver %s in %s", path, store.driver, store.home)
        number = signal.sigwait(signals)
        log.info("%s: stopping; mounts are left serving", signal.Signals(number).name)
        server.stop(10).wait()
        _unlink(path)
    finally:
        store.close()


def _unlink(path: str) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
