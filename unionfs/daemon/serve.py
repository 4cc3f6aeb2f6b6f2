"""Running the daemon: from its settings to sockets that answer, and to an end that leaves the mounts as they are.

Order: log, data root and its lock, driver, store, sockets, READY. Whatever fails before READY is one line and leaves
nothing behind. SIGINT and SIGTERM stop it: no new requests, those in work are finished, mounts stay (or go, with
--unmount-on-stop). trio's thread runs the server; the store's calls run in worker threads.
"""

from __future__ import annotations

import os
import signal
import ssl
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack
from functools import partial
from typing import cast

import trio
from hypercorn.config import Config as ServerConfig
from hypercorn.trio import serve as serve_http
from hypercorn.typing import ASGIFramework

from unionfs import __version__
from unionfs.daemon import logs
from unionfs.daemon.app import About, make_app
from unionfs.daemon.choice import Choice, choose
from unionfs.daemon.config import Config
from unionfs.daemon.engines import Engines
from unionfs.daemon.events import Events
from unionfs.daemon.listen import BACKLOG, Listener, open_listeners
from unionfs.daemon.logs import LOG
from unionfs.daemon.observe import Metrics, observed
from unionfs.daemon.storage import lock, opened, scratch
from unionfs.errors import EXIT_FAILURE, MountError
from unionfs.store.api import Store, StoreError

PATIENCE = 10.0  # seconds that requests in work have at a stop
Notify = Callable[[bytes], None]


def run(config: Config, notify: Notify) -> None:
    """Serves until a signal; MountError for whatever keeps it from starting. `notify` is sd_notify(3)."""
    with ExitStack() as stack:
        lock(config.data_root, stack)
        logs.start(config.log_level, config.log_driver, config.log_file)
        LOG.info("unionfs %s starting", __version__)
        choice = choose(config.data_root, config.driver, config.driver_from)
        LOG.info("storage driver %s: %s", choice.driver, choice.why)
        LOG.info("loading layers from %s", config.data_root)
        store = opened(config, choice)
        stack.callback(store.close)
        if gone := store.cleanup():
            LOG.info("removed %d leftovers of what was half done", len(gone))
        mounted = store.mounted()
        LOG.info("initialised: %d layers, %d mounts found serving", len(store.layers()), len(mounted))
        for id, (path, references) in mounted.items():
            LOG.debug("found %s on %s, %d references", id, path, references)
        passing = scratch(config.data_root)
        listeners = open_listeners(config.hosts, config.group, config.tlsverify)
        for listener in listeners:
            stack.callback(listener.close)
        trio.run(partial(_serve, config, choice, store, listeners, passing, notify))
        if config.unmount_on_stop:
            _unmount(store)
        else:
            left = len(store.mounted())
            LOG.info("stopped; %d mounts are left serving", left) if left else LOG.info("stopped")


async def _serve(
    config: Config, choice: Choice, plain_store: Store, listeners: list[Listener], passing: str, notify: Notify
) -> None:
    events = Events()
    metrics = Metrics(choice.driver)
    store = observed(plain_store, events, metrics)
    warnings = [
        f"{listener.label} is open, without TLS, to everyone who reaches it, and gives them root's power here: "
        "use --tlsverify (unionfs certs create makes the certificates)"
        for listener in listeners
        if listener.open_to_network
    ]
    about = About(choice, config.data_root, [listener.label for listener in listeners], warnings, time.time())
    app = cast(ASGIFramework, make_app(store, events, metrics, about, passing))
    stopping = trio.Event()

    engines = Engines(store, config.docker_plugin, config.containerd_snapshotter, PATIENCE)

    async def stopped() -> None:
        await stopping.wait()
        events.close()

    server = partial(serve_http, app, _server_config(config, listeners), mode="asgi", shutdown_trigger=stopped)
    engines.open()
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as waiting:
            async with trio.open_nursery() as nursery:
                await nursery.start(server)
                for one in listeners:
                    if one.note:
                        LOG.warning("%s: %s", one.label, one.note)
                    LOG.info("listening on %s%s", one.label, " (TLS, client certificates)" if one.secure else "")
                await engines.serve(nursery)
                for warning in warnings:
                    LOG.warning("!!! %s !!!", warning)
                LOG.info("ready")
                notify(b"READY=1\nSTATUS=serving with driver %s" % choice.driver.encode())
                async for number in signals:
                    LOG.info("%s: stopping", signal.Signals(number).name)
                    break
                notify(b"STOPPING=1")
                waiting.start_soon(_leave_at_once, signals)
                stopping.set()
                await engines.stop()
            waiting.cancel_scope.cancel()


async def _leave_at_once(signals: AsyncIterator[int]) -> None:
    """A second signal is from somebody who won't wait for what is in work: the store bears being left so."""
    async for number in signals:
        LOG.warning("%s again: leaving at once; the next start removes what is half done", signal.Signals(number).name)
        os._exit(EXIT_FAILURE)


def _server_config(config: Config, listeners: list[Listener]) -> ServerConfig:
    server = ServerConfig()
    secure = [listener.descriptor() for listener in listeners if listener.secure]
    plain = [listener.descriptor() for listener in listeners if not listener.secure]
    if secure:
        server.certfile, server.keyfile, server.ca_certs = config.tlscert, config.tlskey, config.tlscacert
        server.verify_mode = ssl.CERT_REQUIRED
        try:
            server.create_ssl_context()
        except (OSError, ssl.SSLError) as error:
            files = f"{config.tlscacert}, {config.tlscert}, {config.tlskey}"
            reason = error.strerror or str(error)
            raise MountError(f"daemon: TLS files {files}: {reason} (unionfs certs create makes a set)") from None
        server.bind, server.insecure_bind = secure, plain
    else:
        server.bind = plain
    server.backlog = BACKLOG
    server.graceful_timeout = PATIENCE
    server.ssl_handshake_timeout = 10
    server.include_server_header = False
    server.errorlog = LOG.getChild("http")
    server.errorlog.setLevel("WARNING")
    return server


def _unmount(store: Store) -> None:
    mounted = store.mounted()
    for id in mounted:
        try:
            store.release(id)
        except StoreError as error:
            LOG.error("%s stays mounted: %s", id, error)
    LOG.info("stopped; %d mounts unmounted", len(mounted) - len(store.mounted()))
