"""Docker's graph driver plugin (version 1 plugins, dockerd up to 27) as an ASGI app over a `Store`.

The protocol: moby's daemon/graphdriver/proxy.go and docs/extend/plugins_graphdriver.md. All requests are POST; replies
are JSON but for Diff's archive; a failure is a status that is not 200 with {"Err": "..."}.

How Docker's words map onto the store's:
- Docker says neither when a layer is done nor that it will be a parent. A layer is frozen once its archive is applied,
  or when the first layer is created on it (a container's "-init" layer).
- Docker calls Remove only for what nobody uses any more: references that a killed dockerd left are given back then,
  and at Cleanup, the last call of a dockerd that ends.
- With --userns-remap layers keep the container's ids, and mounts show those of the host: archives need no mapping.

dockerd calls Init at its own start only: a plugin that was restarted under it goes by what the last one said, kept in
the file `remember` (below /run: it is of no use after a reboot).

Which store: `stores` is asked at Init, with the home that dockerd names and its --storage-opt list, and may return the
same store each time. Layers carry the home as a label: several dockerds may share a store.

Runs under trio or asyncio; the store's calls run in worker threads.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import anyio.from_thread
import anyio.to_thread
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from unionfs.engines.options import storage_options
from unionfs.store.api import Exists, Invalid, NotFound, Store, StoreError, Unsupported

HOME_LABEL = "unionfs.docker.home"
CONTENT_TYPE = "application/vnd.docker.plugins.v1.2+json"
MAX_REQUEST = 1 << 20
HOST_IDS = 3 << 30  # on disk: the host's ids where a mapping does not have them
CHUNK = 1 << 18  # an archive crosses between threads in pieces of this size

Stores = Callable[[str, Mapping[str, str]], Store]
Message = dict[str, Any]

log = logging.getLogger("unionfs.docker")


def graph_driver(stores: Stores, remember: str) -> Starlette:
    """The app. `stores(home, options)` is called in a worker thread and may raise StoreError."""
    return _Plugin(stores, remember).app()


class _Plugin:
    def __init__(self, stores: Stores, remember: str) -> None:
        self._stores = stores
        self._remember = remember
        self._opened: Store | None = None
        self._home = ""
        self._mapping: dict[str, str] = {}
        self._freezing = threading.Lock()
        self._starting = threading.Lock()

    def app(self) -> Starlette:
        calls: dict[str, Callable[[Message], Message]] = {
            "/Plugin.Activate": lambda _: {"Implements": ["GraphDriver"]},
            "/GraphDriver.Init": self._init,
            "/GraphDriver.Capabilities": lambda _: {"Capabilities": {"ReproducesExactDiffs": False}},
            "/GraphDriver.Create": self._create,
            "/GraphDriver.CreateReadWrite": self._create,
            "/GraphDriver.Remove": self._remove,
            "/GraphDriver.Get": lambda message: {"Dir": self._store.get(_id(message))},
            "/GraphDriver.Put": self._put,
            "/GraphDriver.Exists": lambda message: {"Exists": self._store.exists(_id(message))},
            "/GraphDriver.Status": lambda _: {"Status": [list(line) for line in self._status()]},
            "/GraphDriver.GetMetadata": lambda message: {"Metadata": self._store.metadata(_id(message))},
            "/GraphDriver.Cleanup": self._cleanup,
            "/GraphDriver.Changes": self._changes,
            "/GraphDriver.DiffSize": self._diff_size,
        }
        routes = [Route(path, _endpoint(call), methods=["POST"]) for path, call in calls.items()]
        routes.append(Route("/GraphDriver.Diff", _guarded(self._diff), methods=["POST"]))
        routes.append(Route("/GraphDriver.ApplyDiff", _guarded(self._apply_diff), methods=["POST"]))
        return Starlette(routes=routes)

    @property
    def _store(self) -> Store:
        if self._opened is None:
            with self._starting:
                if self._opened is None:
                    self._recall()
        assert self._opened is not None
        return self._opened

    def _recall(self) -> None:
        try:
            with open(self._remember, encoding="utf-8") as stream:
                message = json.load(stream)
        except FileNotFoundError:
            raise Invalid("Init has not been called: dockerd does so at its start, restart it") from None
        except (OSError, ValueError) as error:
            raise Invalid(f"{self._remember}: {error}: restart dockerd") from None
        self._begin(message)

    def _init(self, message: Message) -> Message:
        with self._starting:
            self._begin(message)
            directory, name = os.path.split(self._remember)
            temporary = os.path.join(directory, f".{name}.new")
            with open(temporary, "w", encoding="utf-8", opener=partial(os.open, mode=0o600)) as stream:
                json.dump(message, stream)
            os.rename(temporary, self._remember)
        return {}

    def _begin(self, message: Message) -> None:
        home = message.get("Home")
        if not isinstance(home, str) or not home.startswith("/"):
            raise Invalid(f"Init: Home={home!r} is not an absolute path")
        mapping = {
            key: value
            for key, field in (("uidmapping", "UIDMaps"), ("gidmapping", "GIDMaps"))
            if (value := _id_map(field, message.get(field) or []))
        }
        store = self._stores(home, storage_options(message.get("Opts") or []))
        self._opened, self._home, self._mapping = store, home, mapping
        log.info("dockerd with home %s: driver %s in %s", home, store.driver, store.home)

    def _create(self, message: Message) -> Message:
        id, parent = _id(message), _text(message, "Parent")
        if _text(message, "MountLabel"):
            raise Unsupported(f"layer {id}: SELinux labels are not supported: start dockerd without --selinux-enabled")
        options = message.get("StorageOpt") or {}
        if not isinstance(options, dict) or not all(isinstance(value, str) for value in options.values()):
            raise Invalid(f"layer {id}: StorageOpt is not an object of strings")
        if parent:
            self._freeze(parent)
        options = {**{key.lower(): value for key, value in options.items()}, **self._mapping}
        self._store.create(id, parent, labels={HOME_LABEL: self._home}, options=options)
        return {}

    def _freeze(self, id: str) -> None:
        with self._freezing:  # two children at once
            if self._store.layer(id).kind == "active":
                self._store.release(id)
                self._store.commit(id, id)

    def _remove(self, message: Message) -> Message:
        id = _id(message)
        try:
            self._store.release(id)
            self._store.remove(id)
        except NotFound:
            pass  # asked again after a crash: it is gone
        return {}

    def _put(self, message: Message) -> Message:
        self._store.put(_id(message))
        return {}

    def _status(self) -> Iterator[tuple[str, str]]:
        yield "Driver", self._store.driver
        yield from self._store.status()

    def _cleanup(self, _: Message) -> Message:
        for id in self._store.mounted():
            if self._store.layer(id).labels.get(HOME_LABEL) == self._home:
                self._store.release(id)
        return {}

    def _changes(self, message: Message) -> Message:
        found = self._store.changes(_id(message), self._parent(message))
        return {"Changes": [{"Path": _printable(change.path), "Kind": change.kind} for change in found]}

    def _diff_size(self, message: Message) -> Message:
        return {"Size": self._store.diff_size(_id(message), self._parent(message))}

    def _parent(self, message: Message) -> str | None:
        """None where it is the layer's own, which the store knows without comparing trees."""
        parent = _text(message, "Parent")
        return None if parent == self._store.layer(_id(message)).parent else parent

    async def _diff(self, request: Request) -> Response:
        message = await _message(request)

        def begin() -> Iterator[bytes]:
            return coalesced(self._store.diff(_id(message), self._parent(message)))

        pieces = await anyio.to_thread.run_sync(begin)
        # The first piece before the status is sent: what fails at once is an error, not a cut archive.
        first = await anyio.to_thread.run_sync(next, pieces, b"")
        return StreamingResponse(_in_threads(first, pieces), media_type="application/x-tar")

    async def _apply_diff(self, request: Request) -> Response:
        id = request.query_params.get("id", "")
        body = Body(request.stream())

        def apply() -> int:
            applied = self._store.apply(id, body)
            self._freeze(id)
            return applied.size

        size = await anyio.to_thread.run_sync(apply)
        async for _ in body.rest():  # padding after the archive's end: unread it would cut the connection
            pass
        return _reply({"Size": size})


class Body:
    """What a request streams in, for a store's `apply` in a worker thread."""

    def __init__(self, stream: AsyncIterator[bytes]) -> None:
        self._stream = stream
        self._pieces: list[bytes] = []
        self._length = 0
        self._ended = False

    def read(self, size: int, /) -> bytes:
        if self._length < size and not self._ended:
            anyio.from_thread.run(self._fill, max(size, CHUNK))
        held = b"".join(self._pieces)
        taken, left = held[:size], held[size:]
        self._pieces, self._length = [left], len(left)
        return taken

    async def _fill(self, size: int) -> None:
        while self._length < size:
            try:
                piece = await anext(self._stream)
            except StopAsyncIteration:
                self._ended = True
                return
            self._pieces.append(piece)
            self._length += len(piece)

    async def rest(self) -> AsyncIterator[bytes]:
        if not self._ended:
            async for piece in self._stream:
                yield piece


def coalesced(pieces: Iterable[bytes], size: int = CHUNK) -> Iterator[bytes]:
    """The same bytes in pieces of at least `size`, the last one aside."""
    held: list[bytes] = []
    length = 0
    for piece in pieces:
        held.append(piece)
        length += len(piece)
        if length >= size:
            yield b"".join(held)
            held, length = [], 0
    if held:
        yield b"".join(held)


async def _in_threads(first: bytes, pieces: Iterator[bytes]) -> AsyncIterator[bytes]:
    piece = first
    while piece:
        yield piece
        piece = await anyio.to_thread.run_sync(next, pieces, b"")


# --- requests and replies ---


def _endpoint(call: Callable[[Message], Message]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return _reply(await anyio.to_thread.run_sync(call, await _message(request)))

    return _guarded(answer)


def _guarded(handler: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
    return partial(_answer, handler)


async def _answer(handler: Callable[[Request], Awaitable[Response]], request: Request) -> Response:
    start = time.monotonic()
    try:
        response = await handler(request)
        log.debug("%s: %.1f ms", request.url.path, (time.monotonic() - start) * 1000)
        return response
    except StoreError as error:
        log.log(logging.DEBUG if isinstance(error, (NotFound, Exists)) else logging.WARNING, "%s", error)
        return _reply({"Err": str(error)}, error.status)
    except Exception as error:
        log.exception("%s", request.url.path)
        return _reply({"Err": f"{type(error).__name__}: {error}"}, 500)


async def _message(request: Request) -> Message:
    """The JSON object of a request; dockerd sends nothing at all for some."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_REQUEST:
            raise Invalid(f"{request.url.path}: a request of more than {MAX_REQUEST} bytes")
    try:
        message = json.loads(body) if body.strip() else {}
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{request.url.path}: not JSON: {error}") from None
    if message is None:
        return {}
    if not isinstance(message, dict):
        raise Invalid(f"{request.url.path}: not a JSON object")
    return message


def _reply(message: Message, status: int = 200) -> Response:
    return Response(json.dumps(message), status, media_type=CONTENT_TYPE)


def _text(message: Message, field: str) -> str:
    value = message.get(field) or ""
    if not isinstance(value, str):
        raise Invalid(f"{field} is not a string")
    return value


def _id(message: Message) -> str:
    return _text(message, "ID")


def _printable(path: str) -> str:
    """Names that are not UTF-8 can't be JSON: as Go does, each bad byte becomes U+FFFD."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _id_map(field: str, rows: Any) -> str:
    """Docker's list of maps as the mount option: ID in the mount (the host's), on disk (the container's), length.

    dockerd, as the host's root, makes files in a layer and then gives them to the container's root: ids below those
    of the container are kept on disk out of the way.
    """
    ranges = []
    for row in rows:
        try:
            ranges.append((row["host_id"], row["container_id"], row["size"]))
        except (TypeError, KeyError):
            raise Invalid(f"{field}: {row!r} is not container_id, host_id and size") from None
    if not all(isinstance(number, int) and number >= 0 for one in ranges for number in one):
        raise Invalid(f"{field}: not numbers")
    if ranges and (below := min(host for host, _, _ in ranges)):
        ranges.append((0, HOST_IDS, min(below, 1 << 16)))
    return ":".join(str(number) for one in ranges for number in one)
