"""REST: layers and their mounts. Each route is one call of the store, in a worker thread."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from unionfs.daemon.models import (
    AppliedInfo,
    ChangeInfo,
    Commit,
    LayerId,
    LayerInfo,
    MountInfo,
    NewLayer,
    Relabel,
    UsageInfo,
)
from unionfs.daemon.streams import TAKES_TAR, TAR, AsciiJSON, download, upload
from unionfs.store.api import Applied, Layer, Store, Usage


def layer_routes(store: Store) -> APIRouter:
    router = APIRouter(tags=["layers"])

    @router.get("/layers", response_model=list[LayerInfo])
    def list_layers() -> list[Layer]:
        """All layers, oldest first."""
        return store.layers()

    @router.post("/layers", response_model=LayerInfo, status_code=201)
    def create_layer(body: NewLayer) -> Layer:
        """A new writable layer or view on a committed parent (or on nothing)."""
        return store.create(body.id, body.parent, kind=body.kind, labels=body.labels, options=body.options)

    @router.get("/layers/{id}", response_model=LayerInfo)
    def get_layer(id: LayerId) -> Layer:
        return store.layer(id)

    @router.delete("/layers/{id}", status_code=204)
    def remove_layer(id: LayerId) -> None:
        """409 while it is mounted or has children."""
        store.remove(id)

    @router.patch("/layers/{id}", response_model=LayerInfo)
    def set_labels(id: LayerId, body: Relabel) -> Layer:
        return store.set_labels(id, body.labels, replace=body.replace)

    @router.post("/layers/{id}/commit", response_model=LayerInfo)
    def commit_layer(id: LayerId, body: Commit) -> Layer:
        """Freezes an active layer under a new id."""
        return store.commit(id, body.new_id, labels=body.labels)

    @router.put("/layers/{id}/content", response_model=AppliedInfo, openapi_extra=TAKES_TAR)
    async def apply_tar(id: LayerId, request: Request) -> Applied:
        """Unpacks an OCI layer tar (plain, gzip, zstd), the body, into an active layer."""
        return await upload(request, lambda body: store.apply(id, body))

    @router.get("/layers/{id}/diff", response_class=Response, responses={200: {"content": {TAR: {}}}})
    async def diff(id: LayerId, parent: str | None = None) -> Response:
        """The OCI layer tar against a parent (by default its own; empty: the whole tree)."""
        return await download(lambda: store.diff(id, parent), TAR)

    @router.get("/layers/{id}/changes", response_model=list[ChangeInfo])
    def changes(id: LayerId, parent: str | None = None) -> Response:
        return AsciiJSON([change._asdict() for change in store.changes(id, parent)])

    @router.get("/layers/{id}/usage", response_model=UsageInfo)
    def usage(id: LayerId) -> Usage:
        """Of the layer without its parents."""
        return store.usage(id)

    @router.get("/layers/{id}/metadata")
    def metadata(id: LayerId) -> dict[str, str]:
        """The driver's paths, as docker inspect shows them."""
        return store.metadata(id)

    @router.get("/mounts", response_model=list[MountInfo])
    def list_mounts() -> list[MountInfo]:
        """What is mounted, by earlier runs of the daemon too."""
        return [MountInfo(id=id, path=path, references=count) for id, (path, count) in sorted(store.mounted().items())]

    @router.post("/layers/{id}/mount", response_model=MountInfo)
    def mount(id: LayerId) -> MountInfo:
        """Mounts it if need be and takes a reference; the mount outlives the daemon."""
        path = store.get(id)
        return MountInfo(id=id, path=path, references=store.mounted().get(id, (path, 1))[1])

    @router.delete("/layers/{id}/mount", status_code=204)
    def unmount(id: LayerId, all: bool = False) -> None:
        """Gives a reference back (or all of them); the last one unmounts."""
        if all:
            store.release(id)
        else:
            store.put(id)

    return router
