"""REST: images and containers. Each route is one call of `Images` or `Containers`, in a worker thread."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Annotated, Any

import anyio.to_thread
from fastapi import APIRouter, Query, Request, Response

from unionfs.daemon.events import Events
from unionfs.daemon.models import (
    ChangeInfo,
    CommitContainer,
    ContainerInfo,
    ImageInfo,
    MountInfo,
    NewContainer,
    Retag,
    StepInfo,
    UsageInfo,
)
from unionfs.daemon.progress import LINES, WorkResponse
from unionfs.daemon.streams import TAKES_TAR, TAR, AsciiJSON, download, upload
from unionfs.daemon.tars import archive_source, layout_tar
from unionfs.store.api import Invalid, Readable, Store, Usage
from unionfs.store.containers import Container, Containers
from unionfs.store.images import Image, Images, Progress

_CHUNK = 1 << 20


def image_routes(images: Images, events: Events, scratch: str) -> APIRouter:
    """`scratch`: a directory of this daemon alone for archives in passing."""
    router = APIRouter(tags=["images"])

    @router.get("/images", response_model=list[ImageInfo])
    def list_images() -> list[Image]:
        return images.all()

    @router.post("/images", response_class=Response, responses={200: {"content": {LINES: {}}}}, openapi_extra=TAKES_TAR)
    async def load_image(request: Request, name: str = "", tag: str = "") -> Response:
        """Loads an archive, the body: an OCI layout as tar, or what `docker save` writes. Answers with JSON lines: how
        far it is, then {"result": [images]} or {"message", "status"}."""
        stack = ExitStack()
        try:
            directory = await anyio.to_thread.run_sync(lambda: tempfile.mkdtemp(prefix="load-", dir=scratch))
            stack.callback(shutil.rmtree, directory, ignore_errors=True)
            path = os.path.join(directory, "archive")
            await upload(request, lambda body: _spool(body, path))
        except BaseException:
            stack.close()
            raise

        def load(progress: Progress) -> list[dict[str, Any]]:
            with stack:
                source = archive_source(path, os.path.join(directory, "layout"))
                found = images.load(f"{source}:{tag}" if tag else source, name, progress)
            for image in found:
                events.add("load", image.name)
            return [image._asdict() for image in found]

        return WorkResponse(load)

    @router.post("/images/import", response_model=ImageInfo, status_code=201, openapi_extra=TAKES_TAR)
    async def import_image(request: Request, name: str, config: str = "{}") -> Image:
        """An image of one layer from the tar of a whole tree, the body. `config`: the OCI config object as JSON."""
        try:
            settings = json.loads(config)
            if not isinstance(settings, dict):
                raise ValueError("no object")
        except ValueError as error:
            raise Invalid(f"config: must be a JSON object: {error}") from None
        image = await upload(request, lambda body: images.import_tar(body, name, settings))
        events.add("import", image.name)
        return image

    @router.get("/images/{name:path}/config")
    def config(name: str) -> dict[str, Any]:
        """The OCI image configuration."""
        return images.config(name)

    @router.get("/images/{name:path}/history", response_model=list[StepInfo])
    def history(name: str) -> list[dict[str, Any]]:
        """Newest first."""
        return images.history(name)

    @router.get("/images/{name:path}/info", response_model=ImageInfo)
    def get_image(name: str) -> Image:
        return images.get(name)

    @router.get("/images/{name:path}/save", response_class=Response, responses={200: {"content": {TAR: {}}}})
    async def save(name: str, compression: Annotated[str, Query(pattern="^(gzip|zstd|none)$")] = "gzip") -> Response:
        """An OCI layout with this image, as tar."""

        def pieces() -> Iterator[bytes]:
            with tempfile.TemporaryDirectory(prefix="save-", dir=scratch) as directory:
                layout = os.path.join(directory, "layout")
                images.save(name, f"oci:{layout}", compression)
                yield from layout_tar(layout)

        return await download(pieces, TAR)

    @router.post("/images/{name:path}/tag", response_model=ImageInfo, status_code=201)
    def tag(name: str, body: Retag) -> Image:
        """One more name."""
        image = images.tag(name, body.name)
        events.add("tag", image.name)
        return image

    @router.delete("/images/{name:path}")
    def remove_image(name: str) -> list[str]:
        """Takes the name away, and what nothing else uses; what went."""
        gone = images.remove(name)
        events.add("untag", name)
        return gone

    return router


def container_routes(containers: Containers, store: Store, events: Events) -> APIRouter:
    router = APIRouter(tags=["containers"])

    @router.get("/containers", response_model=list[ContainerInfo])
    def list_containers() -> list[Container]:
        """Newest first."""
        return containers.all()

    @router.post("/containers", response_model=ContainerInfo, status_code=201)
    def create_container(body: NewContainer) -> Container:
        """A writable layer on an image."""
        container = containers.create(body.image, body.name, body.size)
        events.add("container", container.name, image=container.image)
        return container

    @router.get("/containers/{name}", response_model=ContainerInfo)
    def get_container(name: str) -> Container:
        return containers.get(name)

    @router.delete("/containers/{name}", status_code=204)
    def remove_container(name: str, force: bool = False) -> None:
        """409 while it is mounted, unless forced."""
        containers.remove(name, force=force)
        events.add("uncontainer", name)

    @router.post("/containers/{name}/mount", response_model=MountInfo)
    def mount(name: str) -> MountInfo:
        layer = containers.get(name).layer
        path = store.get(layer)
        return MountInfo(id=layer, path=path, references=store.mounted().get(layer, (path, 1))[1])

    @router.delete("/containers/{name}/mount", status_code=204)
    def unmount(name: str) -> None:
        store.put(containers.get(name).layer)

    @router.get("/containers/{name}/changes", response_model=list[ChangeInfo])
    def changes(name: str) -> Response:
        """Against its image."""
        return AsciiJSON([change._asdict() for change in containers.changes(name)])

    @router.get("/containers/{name}/usage", response_model=UsageInfo)
    def usage(name: str) -> Usage:
        return containers.usage(name)

    @router.get("/containers/{name}/diff", response_class=Response, responses={200: {"content": {TAR: {}}}})
    async def diff(name: str) -> Response:
        """The OCI layer tar of what it changes."""
        return await download(lambda: containers.diff(name), TAR)

    @router.get("/containers/{name}/export", response_class=Response, responses={200: {"content": {TAR: {}}}})
    async def export(name: str) -> Response:
        """The tar of its whole tree."""
        return await download(lambda: containers.export(name), TAR)

    @router.post("/containers/{name}/commit", response_model=ImageInfo, status_code=201)
    def commit(name: str, body: CommitContainer) -> Image:
        """An image of what it is now."""
        image = containers.commit(name, body.image, body.comment)
        events.add("image", image.name, container=name)
        return image

    return router


def _spool(body: Readable, path: str) -> None:
    with open(path, "xb") as target:
        while chunk := body.read(_CHUNK):
            target.write(chunk)
