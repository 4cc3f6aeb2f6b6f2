"""Running the daemon: from its settings to sockets that answer, and to an end that leaves the mounts as they are.

Order: log, data root and its lock, driver, store, sockets, READY. Whatever fails before READY is one line and leaves
nothing behind. SIGINT and SIGTERM stop it: no new requests, those in work are finished, mounts stay (or go, with
--unmount-on-stop). trio's thread runs the server; the store's calls run in worker threads.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import signal
import ssl
import time
from collections.abc import Callable
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
from unionfs.daemon.choice import Choice, choose, instead
from unionfs.daemon.config import Config
from unionfs.daemon.events import Events
from unionfs.daemon.listen import BACKLOG, Listener, open_listeners
from unionfs.daemon.logs import LOG
from unionfs.daemon.observe import Metrics, observed
from unionfs.errors import EXIT_BUSY, EXIT_FAILURE, EXIT_PERMISSION, MountError
from unionfs.store.api import InUse, Store, StoreError, Unsupported, open_store

PATIENCE = 10.0  # seconds that requests in work have at a stop
Notify = Callable[[bytes], None]


def run(config: Config, notify: Notify) -> None:
    """Serves until a signal; MountError for whatever keeps it from starting. `notify` is sd_notify(3)."""
    with ExitStack() as stack:
        _lock(config.data_root, stack)
        logs.start(config.log_level, config.log_driver, config.log_file)
        LOG.info("unionfs %s starting", __version__)
        choice = choose(config.data_root, config.driver, config.driver_from)
        LOG.info("storage driver %s: %s", choice.driver, choice.why)
        LOG.info("loading layers from %s", config.data_root)
        store = _open(config, choice)
        stack.callback(store.close)
        mounted = store.mounted()
        LOG.info("initialised: %d layers, %d mounts found serving", len(store.layers()), len(mounted))
        for id, (path, references) in mounted.items():
            LOG.debug("found %s on %s, %d references", id, path, references)
        scratch = _scratch(config.data_root)
        listeners = open_listeners(config.hosts, config.group, config.tlsverify)
        for listener in listeners:
            stack.callback(listener.close)
        trio.run(partial(_serve, config, choice, store, listeners, scratch, notify))
        if config.unmount_on_stop:
            _unmount(store)
        else:
            left = len(store.mounted())
            LOG.info("stopped; %d mounts are left serving", left) if left else LOG.info("stopped")


def _lock(root: str, stack: ExitStack) -> None:
    """One daemon for a data root; the kernel lets go of the lock whatever becomes of us."""
    path = os.path.join(root, "daemon.lock")
    try:
        os.makedirs(root, mode=0o711, exist_ok=True)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        code = EXIT_PERMISSION if isinstance(error, PermissionError) else EXIT_FAILURE
        raise MountError(
            f"daemon: --data-root {root}: {error.strerror} (it must be a directory of yours, or one that can be made)",
            code,
        ) from None
    stack.callback(os.close, fd)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode("ascii", "replace").strip() or "unknown"
        raise MountError(
            f"daemon: {root} is in use by another daemon (process {holder}): stop it or choose another --data-root",
            EXIT_BUSY,
        ) from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, b"%d\n" % os.getpid(), 0)


def _scratch(root: str) -> str:
    """An empty directory: what a killed daemon left in it goes."""
    path = os.path.join(root, "tmp")
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path, 0o700, exist_ok=True)
    return path


def _open(config: Config, choice: Choice) -> Store:
    try:
        return open_store(config.data_root, choice.driver, config.storage_options)
    except Unsupported as error:
        raise MountError(f"daemon: storage driver {choice.driver}: {error}. {instead(config.data_root)}") from None
    except InUse as error:
        raise MountError(f"daemon: {error}", EXIT_BUSY) from None
    except StoreError as error:
        raise MountError(f"daemon: {config.data_root}: {error}") from None


async def _serve(
    config: Config, choice: Choice, plain_store: Store, listeners: list[Listener], scratch: str, notify: Notify
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
    app = cast(ASGIFramework, make_app(store, events, metrics, about, scratch))
    stopping = trio.Event()

    async def stopped() -> None:
        await stopping.wait()
        events.close()

    server = partial(serve_http, app, _server_config(config, listeners), mode="asgi", shutdown_trigger=stopped)
    with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals:
        async with trio.open_nursery() as nursery:
            await nursery.start(server)
            for listener in listeners:
                if listener.note:
                    LOG.warning("%s: %s", listener.label, listener.note)
                LOG.info("listening on %s%s", listener.label, " (TLS, client certificates)" if listener.secure else "")
            for warning in warnings:
                LOG.warning("!!! %s !!!", warning)
            LOG.info("ready")
            notify(b"READY=1\nSTATUS=serving with driver %s" % choice.driver.encode())
            async for number in signals:
                LOG.info("%s: stopping", signal.Signals(number).name)
                break
            notify(b"STOPPING=1")
            stopping.set()


def _server_config(config: Config, listeners: list[Listener]) -> ServerConfig:
    server = ServerConfig()
    secure = [_descriptor(listener) for listener in listeners if listener.secure]
    plain = [_descriptor(listener) for listener in listeners if not listener.secure]
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


def _descriptor(listener: Listener) -> str:
    """hypercorn closes what it is given: it gets a descriptor of its own."""
    return f"fd://{os.dup(listener.socket.fileno())}"


def _unmount(store: Store) -> None:
    mounted = store.mounted()
    for id in mounted:
        try:
            store.release(id)
        except StoreError as error:
            LOG.error("%s stays mounted: %s", id, error)
    LOG.info("stopped; %d mounts unmounted", len(mounted) - len(store.mounted()))
