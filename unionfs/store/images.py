"""Images: names for chains of committed layers, with the OCI configuration that belongs to them.

A layer of an image has its chain id as its id (64 hex digits), so images share layers, and a layer that is there is
not unpacked again. Layers of one image are unpacked side by side where the driver keeps them apart (overlay, aufs,
row): each as an active layer without a parent, put on its parent when it is committed.

An image's id is the digest of its configuration. `save` writes layers as `Store.diff` makes them, so an image that was
packed by another tool gets other diff ids, and another id, than it came with; ours are the same each time.

Any thread; what brings images in or takes them away happens one at a time (`LayerStore.images_lock`), or a layer could
be pruned between its commit and its image. Everything that comes from outside is checked: digests, sizes, names.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from unionfs.store.api import Applied, InUse, Invalid, Layer, NotFound, Readable, StoreError
from unionfs.store.archives import Archive, Blob, open_archive
from unionfs.store.base import IMAGE_LAYER, UNPACKING
from unionfs.store.layers import LayerStore
from unionfs.store.unpack import NeedsParent

WORKERS = 4

# what is being done, bytes done, bytes in all (0: not known)
Progress = Callable[[str, int, int], None]

_NAME = re.compile(r"[a-z0-9]+(?:[._/:-]+[a-z0-9]+)*(?::[A-Za-z0-9_][A-Za-z0-9._-]{0,127})?\Z")


class Image(NamedTuple):
    name: str  # "debian:12"
    id: str  # "sha256:..." of the configuration
    layer: str  # the topmost layer, "" for an image without layers
    created: float
    size: int  # bytes of all its layers, shared ones included


class Images:
    def __init__(self, store: LayerStore) -> None:
        self.store = store
        self._db = store.db

    # --- asking ---

    def all(self) -> list[Image]:
        return [self._image(row) for row in self._db.rows("SELECT * FROM images ORDER BY name")]

    def get(self, name: str) -> Image:
        """By name (":latest" may be left out), or by id or the first 6 or more digits of one."""
        row = self._db.row("SELECT * FROM images WHERE name = ?", full_name(name))
        digits = name.removeprefix("sha256:")
        if row is None and re.fullmatch(r"[0-9a-f]{6,64}", digits):
            found = self._db.rows("SELECT * FROM images WHERE config LIKE ?", f"sha256:{digits}%")
            if len({one["config"] for one in found}) > 1:
                raise Invalid(f"image {name}: {len(found)} images begin so: give more digits")
            row = found[0] if found else None
        if row is None:
            raise NotFound(f"no image {name} in {self.store.home} (see unionfs images)")
        return self._image(row)

    def _image(self, row: sqlite3.Row) -> Image:
        size = sum(layer.size for layer in self._chain(row["layer"]))
        return Image(row["name"], row["config"], row["layer"], row["created"], size)

    def _chain(self, layer: str) -> list[Layer]:
        """Its layers, topmost first."""
        found = []
        while layer:
            found.append(self.store.layer(layer))
            layer = found[-1].parent
        return found

    def config(self, name: str) -> dict[str, Any]:
        """The OCI image configuration."""
        return self.document(self.get(name).id)

    def document(self, digest: str) -> dict[str, Any]:
        """A configuration by its digest: containers hold on to theirs."""
        row = self._db.row("SELECT data FROM blobs WHERE digest = ?", digest)
        if row is None:
            raise StoreError(f"{self.store.home}: the configuration {digest} is gone: see unionfs daemon --fsck")
        document: dict[str, Any] = json.loads(row["data"])
        return document

    def history(self, name: str) -> list[dict[str, Any]]:
        """Newest first: created, created_by, comment, size, layer ("" where a step made none)."""
        image = self.get(name)
        layers = self._chain(image.layer)
        steps = []
        for step in reversed(self.document(image.id).get("history") or [{} for _ in layers]):
            layer = None if step.get("empty_layer") else layers.pop(0) if layers else None
            steps.append(
                {
                    "created": step.get("created", ""),
                    "created_by": step.get("created_by", ""),
                    "comment": step.get("comment", ""),
                    "size": layer.size if layer else 0,
                    "layer": layer.id if layer else "",
                }
            )
        return steps

    # --- bringing in ---

    def load(self, source: str, name: str = "", progress: Progress | None = None) -> list[Image]:
        """All images of `oci:DIR[:TAG]` or `docker-archive:FILE`; `name` for the one, where it has one only."""
        with open_archive(source) as archive, self.store.images_lock:
            if name and len(archive.images) > 1:
                raise Invalid(f"{source} holds {len(archive.images)} images: name one of them: {_tags(archive)}")
            loaded = []
            for found in archive.images:
                names = [name] if name else found.names
                if not names:
                    raise Invalid(f"{source}: its image has no name: give one")
                for one in names:
                    full_name(one)
                top = self._unpack(archive, found.config, found.layers, progress)
                loaded += [self._name(one, found.config, top) for one in names]
            return loaded

    def import_tar(self, stream: Readable, name: str, config: Mapping[str, Any] | None = None) -> Image:
        """An image of one layer from the tar of a whole tree, as `docker import`."""
        return self.add(name, new_config(config or {}), stream, "", "imported from a tar")

    def _unpack(self, archive: Archive, config: bytes, blobs: list[Blob], progress: Progress | None) -> str:
        """The topmost layer's id."""
        diff_ids = _diff_ids(config)
        if len(diff_ids) != len(blobs):
            raise Invalid(f"the image's configuration names {len(diff_ids)} layers, its manifest {len(blobs)}")
        chain = chain_ids(diff_ids)
        missing = [index for index, id in enumerate(chain) if not self.store.exists(id)]
        apart = self.store.backend.format.hides and len(missing) > 1
        early: dict[int, Any] = {}
        with ThreadPoolExecutor(WORKERS, "unpack") as pool:
            if apart:
                early = {i: pool.submit(self._unpack_apart, archive, blobs[i], progress, i > 0) for i in missing}
            try:
                for index in missing:
                    parent = chain[index - 1] if index else ""
                    done = early.pop(index).result() if apart else None
                    if done is None:
                        with archive.open(blobs[index]) as stream:
                            done = self._unpack_one(_watched(stream, blobs[index], progress), parent, blobs[index].what)
                    key, applied = done
                    self._commit(key, applied, diff_ids[index], chain[index], parent, blobs[index].what)
            except BaseException:
                for future in early.values():
                    if not future.cancel() and future.exception() is None and future.result() is not None:
                        self.store.remove(future.result()[0])
                for index in reversed(missing):
                    if self.store.exists(chain[index]):
                        self.prune(chain[index])
                raise
        return chain[-1] if chain else ""

    def _unpack_apart(
        self, archive: Archive, blob: Blob, progress: Progress | None, has_parent: bool
    ) -> tuple[str, Applied] | None:
        """None: it can't be unpacked without its parent."""
        with archive.open(blob) as stream:
            try:
                return self._unpack_one(_watched(stream, blob, progress), "", blob.what, alone=has_parent)
            except NeedsParent:
                return None

    def _unpack_one(self, stream: Readable, parent: str, what: str, *, alone: bool = False) -> tuple[str, Applied]:
        key = f"unpacking-{os.urandom(12).hex()}"
        self.store.create(key, parent, labels={UNPACKING: str(os.getpid())})
        try:
            return key, self.store.apply(key, stream, alone=alone)
        except NeedsParent:
            self.store.remove(key)
            raise
        except StoreError as error:
            self.store.remove(key)
            raise type(error)(f"{what}: {error}") from None
        except BaseException:
            self.store.remove(key)
            raise

    def _commit(self, key: str, applied: Applied, expected: str, id: str, parent: str, what: str) -> None:
        if applied.diff_id != expected:
            self.store.remove(key)
            raise Invalid(f"{what}: unpacks to {applied.diff_id}, the image's configuration says {expected}: damaged")
        self._settle(key, applied, parent, id)

    def _settle(self, key: str, applied: Applied, parent: str, id: str = "") -> str:
        """Commits an unpacked layer under its chain id, unless somebody else was quicker."""
        id = id or chain_ids([applied.diff_id], parent)[0]
        try:
            self.store.commit(key, id, labels={IMAGE_LAYER: "1"}, parent=parent)
        except StoreError:
            self.store.remove(key)
            if not self.store.exists(id):
                raise
        return id

    def _name(self, name: str, config: bytes, layer: str) -> Image:
        digest = "sha256:" + hashlib.sha256(config).hexdigest()
        before = self._db.row("SELECT layer FROM images WHERE name = ?", full_name(name))
        with self._db.transaction(durable=True) as db:
            db.execute("INSERT OR IGNORE INTO blobs VALUES (?, ?)", (digest, config))
            db.execute(
                "INSERT OR REPLACE INTO images (name, config, layer, created) VALUES (?, ?, ?, ?)",
                (full_name(name), digest, layer, time.time()),
            )
            drop_blobs(db)
        if before is not None:  # the name was another image's
            self.prune(before["layer"])
        return self.get(name)

    def add(self, name: str, config: Mapping[str, Any], stream: Readable, parent: str, comment: str) -> Image:
        """An image of `parent`'s layers and one more, which is read from `stream`."""
        full_name(name)
        with self.store.images_lock:
            key, applied = self._unpack_one(stream, parent, name)
            layer = self._settle(key, applied, parent)
            return self._name(name, json.dumps(_with_layer(dict(config), applied.diff_id, comment)).encode(), layer)

    def tag(self, name: str, new_name: str) -> Image:
        with self.store.images_lock:
            image = self.get(name)
            row = self._db.row("SELECT data FROM blobs WHERE digest = ?", image.id)
            assert row is not None  # a foreign key holds it
            return self._name(new_name, row["data"], image.layer)

    # --- taking away ---

    def remove(self, name: str) -> list[str]:
        """Takes the name away, and the layers that nothing else uses; what went. InUse while a container is of it and
        it has no other name."""
        with self.store.images_lock:
            return self._remove(self.get(name))

    def _remove(self, image: Image) -> list[str]:
        others = self._db.row("SELECT 1 FROM images WHERE config = ? AND name != ?", image.id, image.name)
        user = self._db.row("SELECT name FROM containers WHERE config = ?", image.id)
        if user is not None and others is None:
            raise InUse(f"image {image.name} is used by the container {user['name']}: unionfs rm {user['name']}")
        with self._db.transaction(durable=True) as db:
            db.execute("DELETE FROM images WHERE name = ?", (image.name,))
            drop_blobs(db)
        return [f"untagged {image.name}", *self.prune(image.layer)]

    def prune(self, layer: str) -> list[str]:
        """Removes the layer and its parents as far as they are images' and nothing uses them."""
        gone = []
        while layer:
            found = self.store.layer(layer)
            used = self._db.row("SELECT 1 FROM images WHERE layer = ?", layer)
            if used is not None or IMAGE_LAYER not in found.labels:
                break
            try:
                self.store.remove(layer)
            except InUse:
                break
            gone.append(f"deleted {layer}")
            layer = found.parent
        return gone

    # --- taking out ---

    def save(self, name: str, target: str, compression: str = "gzip", progress: Progress | None = None) -> str:
        """Writes the image to `oci:DIR[:TAG]`, which is made or added to; the manifest's digest."""
        from unionfs.store.layout import write_image

        image = self.get(name)
        config = self.document(image.id)
        layers = [(layer.id, self._watched_diff(layer, progress)) for layer in reversed(self._chain(image.layer))]
        return write_image(target, image.name, config, layers, compression)

    def _watched_diff(self, layer: Layer, progress: Progress | None) -> Iterator[bytes]:
        done = 0
        for piece in self.store.diff(layer.id):
            done += len(piece)
            if progress is not None:
                progress(f"layer {layer.id[:12]}", done, 0)
            yield piece


def drop_blobs(db: Any) -> None:
    """Configurations that neither an image nor a container has."""
    db.execute(
        "DELETE FROM blobs WHERE digest NOT IN (SELECT config FROM images UNION SELECT config FROM containers)"
    )


def full_name(name: str) -> str:
    """With ":latest" where no tag is given, without Docker's own registry. Invalid if it can't be a name."""
    name = name.removeprefix("docker.io/").removeprefix("library/")
    if len(name) > 255 or not _NAME.match(name):
        raise Invalid(f"image name {name!r}: lower case letters, digits and . _ - / :, as in debian:12")
    return name if ":" in name.rsplit("/", 1)[-1] else name + ":latest"


def chain_ids(diff_ids: list[str], parent: str = "") -> list[str]:
    """As the OCI image spec defines them, without "sha256:". `parent`: the chain id that the first one stands on."""
    chain = []
    for diff_id in diff_ids:
        parent = hashlib.sha256(f"sha256:{parent} {diff_id}".encode()).hexdigest() if parent else diff_id[7:]
        chain.append(parent)
    return chain


def new_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of an image without layers, for this machine."""
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    return {
        "architecture": machine,
        "os": "linux",
        "config": dict(config),
        "rootfs": {"type": "layers", "diff_ids": []},
        "history": [],
    }


def _with_layer(document: dict[str, Any], diff_id: str, comment: str) -> dict[str, Any]:
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    rootfs = document.get("rootfs") or {}
    document["rootfs"] = {"type": "layers", "diff_ids": [*rootfs.get("diff_ids", []), diff_id]}
    step = {"created": now, "created_by": "unionfs", "comment": comment}
    document["history"] = [*(document.get("history") or []), step]
    document["created"] = now
    return document


def _diff_ids(config: bytes) -> list[str]:
    try:
        found = json.loads(config)["rootfs"]["diff_ids"]
    except (ValueError, KeyError, TypeError):
        raise Invalid("the image's configuration has no rootfs.diff_ids: not an image's") from None
    if not isinstance(found, list) or not all(re.fullmatch(r"sha256:[0-9a-f]{64}", str(one)) for one in found):
        raise Invalid("the image's configuration has diff ids that are not sha256:...")
    return found


def _tags(archive: Archive) -> str:
    return ", ".join(name for image in archive.images for name in image.names)


def _watched(stream: Readable, blob: Blob, progress: Progress | None) -> Readable:
    """The blob's bytes, reported as they pass."""
    return stream if progress is None else _Watched(stream, blob, progress)


class _Watched:
    def __init__(self, stream: Readable, blob: Blob, progress: Progress) -> None:
        self._stream, self._blob, self._progress = stream, blob, progress
        self._done = 0

    def read(self, size: int, /) -> bytes:
        data = self._stream.read(size)
        self._done += len(data)
        self._progress(self._blob.what, self._done, self._blob.size)
        return data
