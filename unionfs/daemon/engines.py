"""Docker's graph driver plugin and containerd's snapshotter in the daemon's process, over the daemon's store.

What they do shows in `/events` and `/metrics` like what comes over REST. Their sockets are root's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import cast

import anyio.to_thread
import trio
from hypercorn.config import Config as ServerConfig
from hypercorn.trio import serve as serve_http
from hypercorn.typing import ASGIFramework

from unionfs.daemon.listen import Listener, open_unix
from unionfs.daemon.logs import LOG
from unionfs.errors import MountError
from unionfs.store.api import Invalid, Store

OWNER = "root"
KEEP_ALIVE = 3600  # seconds: dockerd keeps its connection, and fails a call on one that was closed


class Engines:
    """Those that were asked for: `open` their sockets, `serve` in the nursery, `stop` before the store is closed."""

    def __init__(self, store: Store, docker: str, containerd: str, patience: float) -> None:
        self._store = store
        self._docker = docker
        self._containerd = containerd
        self._patience = patience
        self._listener: Listener | None = None
        self._stack = ExitStack()
        self._stopping = trio.Event()

    def open(self) -> None:
        """MountError naming the option that can't be. containerd is served from then on."""
        with ExitStack() as stack:
            if self._docker:
                self._listener = open_unix(self._docker, OWNER, f"--docker-plugin {self._docker}")
                stack.callback(self._listener.close)
            if self._containerd:
                self._open_containerd(stack)
            self._stack = stack.pop_all()

    async def serve(self, nursery: trio.Nursery) -> None:
        if self._listener is not None:
            from unionfs.engines.graphdriver import graph_driver

            config = ServerConfig()
            config.bind = [self._listener.descriptor()]
            config.graceful_timeout = self._patience
            config.keep_alive_timeout = KEEP_ALIVE
            config.errorlog = LOG.getChild("http")
            app = cast(ASGIFramework, graph_driver(self._stores, f"{self._docker}.init"))
            await nursery.start(partial(serve_http, app, config, mode="asgi", shutdown_trigger=self._stopping.wait))
            LOG.info("listening on unix://%s (Docker's graph driver plugin)", self._docker)
        if self._containerd:
            LOG.info("listening on unix://%s (containerd's snapshots service)", self._containerd)

    def _stores(self, home: str, options: Mapping[str, str]) -> Store:
        """dockerd's home is a label of its layers; the storage is the daemon's, and so are its options."""
        if options.get("driver", self._store.driver) != self._store.driver or options.keys() - {"driver"}:
            raise Invalid(
                f"dockerd's --storage-opt {' '.join(f'{key}={value}' for key, value in options.items())}: the store is "
                f"the daemon's, with driver {self._store.driver}: give options to unionfs daemon"
            )
        return self._store

    def _open_containerd(self, stack: ExitStack) -> None:
        try:
            from unionfs.engines.snapshotter import serve
        except ModuleNotFoundError as error:
            if error.name != "grpc":
                raise
            raise MountError(
                "daemon: --containerd-snapshotter: the Python package grpcio is missing: pip install 'unionfs[daemon]'"
            ) from None
        # Bound and let go again: what is wrong with the path is told in our words, and a dead socket is gone.
        open_unix(self._containerd, OWNER, f"--containerd-snapshotter {self._containerd}").close()
        server = serve(self._store, self._containerd)
        stack.callback(self._unlink, self._containerd)
        stack.callback(lambda: server.stop(self._patience).wait())

    @staticmethod
    def _unlink(path: str) -> None:
        try:
            os.unlink(path)
        except FileNotFoundError:  # grpcio took it away
            pass

    async def stop(self) -> None:
        """After the calls that are in work."""
        self._stopping.set()
        await anyio.to_thread.run_sync(self._stack.close)
