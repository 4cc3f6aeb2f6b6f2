"""Writing an OCI image layout: a new directory, or one more image in one that exists.

Blobs are written under temporary names and renamed; the index comes last, so a reader, or a crash, sees the layout
before or after. Blobs that are there already are not written again.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

from unionfs.store.api import Invalid, NoSpace, StoreError
from unionfs.store.archives import MAX_DOCUMENT, REF_NAME, split_tag
from unionfs.store.streams import compressed

_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
_INDEX = "application/vnd.oci.image.index.v1+json"
_CONFIG = "application/vnd.oci.image.config.v1+json"
_LAYER = "application/vnd.oci.image.layer.v1.tar"
_SUFFIX = {"": "", "gzip": "+gzip", "zstd": "+zstd"}


def write_image(
    target: str, name: str, config: dict[str, Any], layers: list[tuple[str, Iterator[bytes]]], compression: str
) -> str:
    """`layers`: id and uncompressed archive, lowest first. The tag is `target`'s or that of `name`."""
    kind, colon, rest = target.partition(":")
    if kind != "oci" or not colon or not rest:
        raise Invalid(f"{target!r}: give oci:DIR[:TAG]")
    compression = "" if compression == "none" else compression
    if compression not in _SUFFIX:
        raise Invalid(f"compression {compression!r}: one of gzip, zstd, none")
    directory, tag = split_tag(rest)
    if not tag:
        tag = name.rpartition(":")[2]
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/:@+-]{0,254}", tag):
        raise Invalid(f"tag {tag!r}: letters, digits and . _ - / : @ +")
    try:
        return _Layout(directory).add(tag, config, layers, compression)
    except OSError as error:
        problem = NoSpace if error.errno in (28, 122) else StoreError  # ENOSPC, EDQUOT
        raise problem(f"{directory}: {error.strerror}") from None


class _Layout:
    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._index = os.path.join(directory, "index.json")
        if os.path.exists(directory) and os.listdir(directory) and not os.path.exists(self._index):
            raise Invalid(f"{directory} is neither empty nor an OCI layout: choose another directory")
        os.makedirs(os.path.join(directory, "blobs", "sha256"), exist_ok=True)

    def add(self, tag: str, config: dict[str, Any], layers: list[tuple[str, Iterator[bytes]]], compression: str) -> str:
        descriptors, diff_ids = [], []
        for _, pieces in layers:
            plain = hashlib.sha256()
            digest, size = self._write(compressed(_through(pieces, plain), compression))
            diff_ids.append("sha256:" + plain.hexdigest())
            descriptors.append({"mediaType": _LAYER + _SUFFIX[compression], "digest": digest, "size": size})
        config = {**config, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        manifest = {
            "schemaVersion": 2,
            "mediaType": _MANIFEST,
            "config": self._document(config, _CONFIG),
            "layers": descriptors,
        }
        described = self._document(manifest, _MANIFEST)
        self._publish({**described, "annotations": {REF_NAME: tag}})
        return str(described["digest"])

    def _document(self, document: dict[str, Any], media: str) -> dict[str, Any]:
        digest, size = self._write(iter([json.dumps(document, separators=(",", ":")).encode()]))
        return {"mediaType": media, "digest": digest, "size": size}

    def _write(self, pieces: Iterator[bytes]) -> tuple[str, int]:
        digest, size = hashlib.sha256(), 0
        blobs = os.path.join(self._directory, "blobs", "sha256")
        unfinished = os.path.join(self._directory, f".unfinished-{os.urandom(8).hex()}")
        try:
            with open(unfinished, "xb") as out:
                for piece in pieces:
                    digest.update(piece)
                    size += len(piece)
                    out.write(piece)
                out.flush()
                os.fsync(out.fileno())
            os.replace(unfinished, os.path.join(blobs, digest.hexdigest()))
        except BaseException:
            if os.path.exists(unfinished):
                os.unlink(unfinished)
            raise
        return "sha256:" + digest.hexdigest(), size

    def _publish(self, entry: dict[str, Any]) -> None:
        index: dict[str, Any] = {"schemaVersion": 2, "mediaType": _INDEX, "manifests": []}
        if os.path.exists(self._index):
            with open(self._index, "rb") as stream:
                index = json.loads(stream.read(MAX_DOCUMENT))
        tag = entry["annotations"][REF_NAME]
        others = [one for one in index["manifests"] if (one.get("annotations") or {}).get(REF_NAME) != tag]
        index["manifests"] = [*others, entry]
        for name, document in (("oci-layout", {"imageLayoutVersion": "1.0.0"}), ("index.json", index)):
            unfinished = os.path.join(self._directory, f".unfinished-{os.urandom(8).hex()}")
            with open(unfinished, "x") as out:
                json.dump(document, out)
                out.flush()
                os.fsync(out.fileno())
            os.replace(unfinished, os.path.join(self._directory, name))


def _through(pieces: Iterator[bytes], digest: Any) -> Iterator[bytes]:
    for piece in pieces:
        digest.update(piece)
        yield piece
