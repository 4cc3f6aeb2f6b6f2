"""Images as other tools hand them over, read: `oci:DIR[:TAG]` and `docker-archive:FILE[:NAME]`.

Opens nothing outside the directory or the file: digests are checked to be hexadecimal before they become file names,
and each blob is read against its digest. Documents (indexes, manifests, configurations) have a limit of size.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import platform
import re
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, NamedTuple, Protocol

from unionfs.store.api import Invalid, NotFound, Readable, Unsupported
from unionfs.store.streams import Digesting

MAX_DOCUMENT = 8 << 20
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})\Z")
REF_NAME = "org.opencontainers.image.ref.name"
_INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")


class Blob(NamedTuple):
    what: str  # for people
    key: str  # digest, or name in the archive
    size: int


class Found(NamedTuple):
    names: list[str]
    config: bytes
    layers: list[Blob]  # lowest first


class Archive(Protocol):
    images: list[Found]

    @contextmanager
    def open(self, blob: Blob) -> Iterator[Readable]:
        """The blob's bytes; any thread. Invalid at the end if its digest is not what it should be."""
        ...

    def close(self) -> None: ...


@contextmanager
def open_archive(source: str) -> Iterator[Archive]:
    kind, colon, rest = source.partition(":")
    if not colon or kind not in ("oci", "docker-archive"):
        raise Invalid(f"{source!r}: give oci:DIR[:TAG] or docker-archive:FILE")
    archive: Archive = OciLayout(*split_tag(rest)) if kind == "oci" else DockerArchive(*split_tag(rest))
    try:
        yield archive
    finally:
        archive.close()


def split_tag(text: str) -> tuple[str, str]:
    """DIR[:TAG]; a colon in a directory's own name is fine if it exists."""
    path, colon, tag = text.partition(":")
    if not colon or os.path.exists(text):
        return text, ""
    return path, tag


class OciLayout:
    def __init__(self, directory: str, tag: str) -> None:
        self._directory = directory
        try:
            with open(os.path.join(directory, "index.json"), "rb") as stream:
                index = _json(stream.read(MAX_DOCUMENT), f"{directory}/index.json")
        except FileNotFoundError:
            raise NotFound(f"{directory} is no OCI layout: it has no index.json") from None
        except NotADirectoryError:
            raise Invalid(f"{directory} is not a directory: an OCI layout is one") from None
        listed = _list(index, "manifests")
        tags = [(one.get("annotations") or {}).get(REF_NAME, "") for one in listed]
        if tag and tag not in tags:
            raise NotFound(f"{directory} has no image {tag!r}, but {', '.join(filter(None, tags)) or 'unnamed ones'}")
        self.images = []
        for one, name in zip(listed, tags, strict=True):
            if not tag or name == tag:
                self.images.append(self._image(one, _image_name(directory, name)))
        if not self.images:
            raise NotFound(f"{directory} holds no image")

    def _image(self, descriptor: dict[str, Any], name: str) -> Found:
        manifest = self._document(descriptor)
        for _ in range(4):  # an index may name indexes
            if manifest.get("mediaType", descriptor.get("mediaType")) not in _INDEXES and "manifests" not in manifest:
                break
            manifest = self._document(_for_this_host(_list(manifest, "manifests"), self._directory))
        config = self._read(_dictionary(manifest, "config"))
        blobs = []
        for layer in _list(manifest, "layers"):
            digest, size = _digest(layer), int(layer.get("size", 0))
            if "foreign" in str(layer.get("mediaType")) or "nondistributable" in str(layer.get("mediaType")):
                raise Unsupported(f"{self._directory}: layer {digest} is not in the layout, but at a URL")
            blobs.append(Blob(f"layer {digest[7:19]}", digest, size))
        return Found([name], config, blobs)

    def _path(self, digest: str) -> str:
        return os.path.join(self._directory, "blobs", "sha256", digest[7:])

    def _read(self, descriptor: dict[str, Any]) -> bytes:
        digest = _digest(descriptor)
        try:
            with open(self._path(digest), "rb") as stream:
                data = stream.read(MAX_DOCUMENT + 1)
        except FileNotFoundError:
            raise NotFound(f"{self._directory}: blob {digest} is missing") from None
        if len(data) > MAX_DOCUMENT:
            raise Invalid(f"{self._directory}: {digest}: a document of more than {MAX_DOCUMENT} bytes")
        if "sha256:" + hashlib.sha256(data).hexdigest() != digest:
            raise Invalid(f"{self._directory}: blob {digest} is damaged: its digest is another")
        return data

    def _document(self, descriptor: dict[str, Any]) -> dict[str, Any]:
        return _json(self._read(descriptor), _digest(descriptor))

    @contextmanager
    def open(self, blob: Blob) -> Iterator[Readable]:
        try:
            raw = open(self._path(blob.key), "rb")
        except FileNotFoundError:
            raise NotFound(f"{self._directory}: blob {blob.key} is missing") from None
        with raw:
            stream = Digesting(raw)
            yield stream
            stream.drain()
            if stream.digest != blob.key:
                raise Invalid(f"{self._directory}: blob {blob.key} is damaged: its digest is another")

    def close(self) -> None:
        pass


class DockerArchive:
    """What `docker save` and `podman save --format docker-archive` write, plain or gzipped."""

    def __init__(self, path: str, name: str) -> None:
        try:
            self._tar = tarfile.open(path, "r:*")
        except FileNotFoundError:
            raise NotFound(f"{path} does not exist") from None
        except (tarfile.TarError, EOFError) as error:
            raise Invalid(f"{path}: {error}: not an archive of docker save") from None
        self._path = path
        self._lock = threading.Lock()  # one file position for all layers
        try:
            self._members = {os.path.normpath(member.name): member for member in self._tar}
            listed = json.loads(self._read("manifest.json"))
            self.images = [self._image(one) for one in listed]
        except (ValueError, KeyError, TypeError, AttributeError, tarfile.TarError) as error:
            raise Invalid(f"{path}: its manifest.json is not docker save's: {error}") from None
        if name:
            self.images = [image for image in self.images if name in image.names]
            if not self.images:
                raise NotFound(f"{path} has no image {name}")

    def _image(self, entry: dict[str, Any]) -> Found:
        layers = [Blob(f"layer {name[:12]}", name, self._member(name).size) for name in entry["Layers"]]
        return Found(list(entry.get("RepoTags") or []), self._read(entry["Config"]), layers)

    def _member(self, name: str) -> tarfile.TarInfo:
        """Follows the links that older versions of docker save write, within the archive."""
        for _ in range(8):
            member = self._members.get(os.path.normpath(name))
            if member is None:
                raise NotFound(f"{self._path}: {name} is missing: not an archive of docker save")
            if not member.issym() and not member.islnk():
                return member
            name = os.path.join(os.path.dirname(name), member.linkname) if member.issym() else member.linkname
        raise Invalid(f"{self._path}: {name}: links in a circle")

    def _read(self, name: str) -> bytes:
        member = self._member(name)
        if member.size > MAX_DOCUMENT:
            raise Invalid(f"{self._path}: {name}: a document of more than {MAX_DOCUMENT} bytes")
        stream = self._tar.extractfile(member)
        return stream.read() if stream is not None else b""

    @contextmanager
    def open(self, blob: Blob) -> Iterator[Readable]:
        stream = self._tar.extractfile(self._member(blob.key))
        if stream is None:
            raise Invalid(f"{self._path}: {blob.key} is not a file")
        yield _Locked(stream, self._lock)

    def close(self) -> None:
        self._tar.close()


class _Locked:
    """`ExFileObject` seeks before it reads: not both of two threads at once."""

    def __init__(self, stream: IO[bytes], lock: threading.Lock) -> None:
        self._stream = io.BufferedReader(stream, 1 << 20) if isinstance(stream, io.RawIOBase) else stream
        self._lock = lock

    def read(self, size: int, /) -> bytes:
        with self._lock:
            return self._stream.read(size)


def _image_name(directory: str, ref: str) -> str:
    """The layout's tag if it is a whole name, else the directory's name with it."""
    if "/" in ref or ":" in ref:
        return ref
    base = re.sub(r"[^a-z0-9._-]+", "-", os.path.basename(os.path.abspath(directory)).lower()).strip("._-") or "image"
    return f"{base}:{ref}" if ref else f"{base}:latest"


def _for_this_host(manifests: list[dict[str, Any]], where: str) -> dict[str, Any]:
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    for one in manifests:
        has = one.get("platform") or {}
        if has.get("os", "linux") == "linux" and has.get("architecture", machine) == machine:
            return one
    raise NotFound(f"{where}: no image for linux/{machine} in it")


def _json(data: bytes, where: str) -> dict[str, Any]:
    try:
        document = json.loads(data)
    except ValueError:
        raise Invalid(f"{where}: not JSON") from None
    if not isinstance(document, dict):
        raise Invalid(f"{where}: not a JSON object")
    return document


def _list(document: dict[str, Any], key: str) -> list[dict[str, Any]]:
    found = document.get(key)
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise Invalid(f"an index or manifest without {key}")
    return found


def _dictionary(document: dict[str, Any], key: str) -> dict[str, Any]:
    found = document.get(key)
    if not isinstance(found, dict):
        raise Invalid(f"a manifest without {key}")
    return found


def _digest(descriptor: dict[str, Any]) -> str:
    digest = str(descriptor.get("digest"))
    if not _DIGEST.match(digest):
        raise Invalid(f"digest {digest!r}: not sha256:...")
    return digest
