"""`Images` and `Containers` of a daemon's store, asked over REST: the methods of the local ones, so that a verb need
not care which it has.

Differences that distance makes: archives are read and written here, where the person is; a mount is one on the daemon's
host, at a place of the daemon's choice.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from unionfs.daemon.client import Client, connect, segment, store_error
from unionfs.daemon.tars import layout_tar
from unionfs.store.api import Change, Invalid, NotFound, Readable, StoreError, Usage
from unionfs.store.archives import split_tag
from unionfs.store.containers import Container
from unionfs.store.images import Image, Progress
from unionfs.store.layout import write_image

_CHUNK = 1 << 18


class Library:
    """What `unionfs.store.library.Library` is for a data root, for the daemon that the environment names."""

    def __init__(self, client: Client | None = None) -> None:
        client = client or connect()
        self.images = RemoteImages(client)
        self.containers = RemoteContainers(client)

    def __enter__(self) -> Library:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held: each request has its own connection."""


class RemoteImages:
    def __init__(self, client: Client) -> None:
        self._client = client

    def all(self) -> list[Image]:
        return [Image(**row) for row in self._client.call("GET", "/images")]

    def get(self, name: str) -> Image:
        return Image(**self._client.call("GET", f"{_image(name)}/info"))

    def config(self, name: str) -> dict[str, Any]:
        config: dict[str, Any] = self._client.call("GET", f"{_image(name)}/config")
        return config

    def history(self, name: str) -> list[dict[str, Any]]:
        history: list[dict[str, Any]] = self._client.call("GET", f"{_image(name)}/history")
        return history

    def load(self, source: str, name: str = "", progress: Progress | None = None) -> list[Image]:
        kind, colon, rest = source.partition(":")
        path, tag = split_tag(rest)
        if not colon or kind not in ("oci", "docker-archive"):
            raise Invalid(f"{source!r}: give oci:DIR[:TAG] or docker-archive:FILE")
        if not os.path.exists(os.path.join(path, "index.json") if kind == "oci" else path):
            raise NotFound(f"{source}: {path} is not there" + (", or no OCI layout" if kind == "oci" else ""))
        body = layout_tar(path) if kind == "oci" else _pieces(path)
        query = {key: value for key, value in (("name", name), ("tag", tag)) if value}
        found = None
        for row in self._client.work("POST", "/images", _watched(body, "upload", progress), query):
            if "status" in row:
                raise store_error(row["status"], row["message"])
            if "result" in row:
                found = [Image(**one) for one in row["result"]]
            elif progress is not None:
                progress(row["what"], row["done"], row["total"])
        if found is None:
            raise StoreError(f"the daemon on {self._client.host} broke off its answer: see its log")
        return found

    def import_tar(self, stream: Readable, name: str, config: Mapping[str, Any] | None = None) -> Image:
        query = {"name": name, "config": json.dumps(config or {})}
        return Image(**self._client.send("POST", "/images/import", _read(stream), query))

    def tag(self, name: str, new_name: str) -> Image:
        return Image(**self._client.call("POST", f"{_image(name)}/tag", {"name": new_name}))

    def remove(self, name: str) -> list[str]:
        gone: list[str] = self._client.call("DELETE", _image(name))
        return gone

    def save(self, name: str, target: str, compression: str = "gzip", progress: Progress | None = None) -> str:
        """Layers come one by one and are packed here, as the local one does."""
        image = self.get(name)
        chain = []
        layer = image.layer
        while layer:
            chain.append(layer)
            layer = self._client.call("GET", f"/layers/{segment(layer)}")["parent"]
        layers = [
            (id, _watched(self._client.receive(f"/layers/{segment(id)}/diff"), f"layer {id[:12]}", progress))
            for id in reversed(chain)
        ]
        return write_image(target, image.name, self.config(name), layers, compression)


class RemoteContainers:
    def __init__(self, client: Client) -> None:
        self._client = client

    def all(self) -> list[Container]:
        return [Container(**row) for row in self._client.call("GET", "/containers")]

    def get(self, name: str) -> Container:
        return Container(**self._client.call("GET", _container(name)))

    def create(self, image: str, name: str = "", size: str = "") -> Container:
        return Container(**self._client.call("POST", "/containers", {"image": image, "name": name, "size": size}))

    def remove(self, name: str, *, force: bool = False) -> None:
        self._client.call("DELETE", _container(name), query={"force": "true"} if force else None)

    def mount(self, name: str) -> str:
        """Where, on the daemon's host."""
        path: str = self._client.call("POST", f"{_container(name)}/mount")["path"]
        return path

    def unmount(self, name: str) -> None:
        self._client.call("DELETE", f"{_container(name)}/mount")

    def changes(self, name: str) -> list[Change]:
        return [Change(**row) for row in self._client.call("GET", f"{_container(name)}/changes")]

    def usage(self, name: str) -> Usage:
        return Usage(**self._client.call("GET", f"{_container(name)}/usage"))

    def diff(self, name: str) -> Iterator[bytes]:
        return self._client.receive(f"{_container(name)}/diff")

    def export(self, name: str) -> Iterator[bytes]:
        return self._client.receive(f"{_container(name)}/export")

    def commit(self, name: str, image: str, comment: str = "") -> Image:
        return Image(**self._client.call("POST", f"{_container(name)}/commit", {"image": image, "comment": comment}))


def _image(name: str) -> str:
    return "/images/" + "/".join(segment(part) for part in name.split("/"))


def _container(name: str) -> str:
    return f"/containers/{segment(name)}"


def _pieces(path: str) -> Iterator[bytes]:
    with open(path, "rb") as stream:
        yield from _read(stream)


def _read(stream: Readable) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK):
        yield chunk


def _watched(pieces: Iterator[bytes], what: str, progress: Progress | None) -> Iterator[bytes]:
    done = 0
    for piece in pieces:
        done += len(piece)
        if progress is not None:
            progress(what, done, 0)
        yield piece
