"""The REST application: routes, how errors look, OpenAPI. Runs under trio; calls that block go to worker threads."""

from __future__ import annotations

import errno
import os
import platform
import time
from typing import NamedTuple, cast

from fastapi import APIRouter, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, StreamingResponse

from unionfs import __version__
from unionfs.daemon.choice import Choice
from unionfs.daemon.events import Events
from unionfs.daemon.gate import VERSION, Application, Gate
from unionfs.daemon.images import container_routes, image_routes
from unionfs.daemon.layers import layer_routes
from unionfs.daemon.logs import LOG
from unionfs.daemon.models import Event, Info, Problem
from unionfs.daemon.models import Version as VersionInfo
from unionfs.daemon.observe import Metrics
from unionfs.daemon.streams import lines
from unionfs.store.api import NoSpace, Store, StoreError
from unionfs.store.containers import Containers
from unionfs.store.images import Images
from unionfs.store.layers import LayerStore

LINES = "application/x-ndjson"


class About(NamedTuple):
    """What the daemon knows of itself."""

    choice: Choice
    data_root: str
    listening: list[str]
    warnings: list[str]
    started: float


def make_app(store: Store, events: Events, metrics: Metrics, about: About, scratch: str) -> Application:
    """`scratch`: an empty directory for archives in passing."""
    app = FastAPI(
        title="unionfs daemon",
        version=__version__,
        description="Layers, images and containers of one storage driver. Paths work with and without the version.",
        servers=[{"url": f"/{VERSION}"}, {"url": "/"}],
        responses={"default": {"model": Problem}},
        docs_url=None,  # those pages load scripts from elsewhere
        redoc_url=None,
    )
    app.add_exception_handler(StoreError, _store_error)
    app.add_exception_handler(OSError, _os_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Exception, _unexpected)
    app.include_router(layer_routes(store))
    images = Images(cast(LayerStore, store))
    containers = Containers(cast(LayerStore, store), images)
    app.include_router(image_routes(images, events, scratch))
    app.include_router(container_routes(containers, store, events))
    app.include_router(_system_routes(store, images, containers, events, metrics, about))
    return Gate(app, lambda method, status: metrics.requests.labels(method, str(status)).inc())


def _system_routes(
    store: Store, images: Images, containers: Containers, events: Events, metrics: Metrics, about: About
) -> APIRouter:
    router = APIRouter(tags=["system"])

    @router.get("/version", response_model=VersionInfo)
    def version() -> VersionInfo:
        return VersionInfo(
            version=__version__,
            api_version=VERSION,
            python=platform.python_version(),
            kernel=os.uname().release,
            pid=os.getpid(),
            started=about.started,
        )

    @router.get("/info", response_model=Info)
    def info() -> Info:
        """What `unionfs info` shows."""
        return Info(
            storage_driver=store.driver,
            chosen=about.choice.why,
            data_root=about.data_root,
            status=store.status(),
            layers=len(store.layers()),
            images=len(images.all()),
            containers=len(containers.all()),
            mounts=len(store.mounted()),
            server_version=__version__,
            kernel_version=os.uname().release,
            architecture=os.uname().machine,
            cpus=len(os.sched_getaffinity(0)),
            memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            listening=about.listening,
            warnings=about.warnings,
        )

    @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    def prometheus() -> Response:
        """For Prometheus."""
        return Response(metrics.render(store), media_type=CONTENT_TYPE_LATEST)

    @router.get("/events", response_class=Response, responses={200: {"model": Event, "content": {LINES: {}}}})
    async def follow_events(since: int | None = None, until: float | None = None) -> Response:
        """One JSON text a line as things happen: from now on, or what came after the event number `since`; for ever,
        or up to the time `until` (seconds since the epoch)."""
        after = events.count if since is None else since
        return StreamingResponse(lines(events.follow(after, until)), media_type=LINES)

    @router.post("/cleanup")
    def cleanup() -> list[str]:
        """Removes garbage; what went."""
        return store.cleanup()

    @router.post("/fsck")
    def fsck(repair: bool = False) -> list[str]:
        """What is wrong with the store, in words; nothing for a clean one."""
        return store.fsck(repair)

    return router


async def _store_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StoreError)
    if error.status >= 500:
        LOG.error("%s %s: %s", request.method, request.url.path, error)
    return JSONResponse({"message": str(error)}, error.status)


async def _os_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return JSONResponse({"message": f"no space: {error.strerror}: {error.filename or 'data root'}"}, NoSpace.status)
    return await _unexpected(request, error)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    return JSONResponse({"message": f"{where}: {first['msg']}"}, 400)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"message": error.detail}, error.status_code, headers=error.headers)


async def _unexpected(request: Request, error: Exception) -> Response:
    started = time.strftime("%H:%M:%S")
    LOG.error("%s %s: %r", request.method, request.url.path, error, exc_info=error)
    return JSONResponse({"message": f"unexpected {type(error).__name__}: see the daemon's log at {started} UTC"}, 500)
