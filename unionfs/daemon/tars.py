"""Archives of images on their way: an OCI layout as a tar, made and taken apart without ever trusting a name in it."""

from __future__ import annotations

import os
import re
import shutil
import tarfile
from collections.abc import Iterator

from unionfs.store.api import Invalid

LAYOUT_NAME = re.compile(r"(?:\./)?(oci-layout|index\.json|blobs/sha256/[0-9a-f]{64})\Z")
_CHUNK = 1 << 18
_BLOCK = 512


def layout_tar(directory: str) -> Iterator[bytes]:
    """The tar of an OCI layout, in pieces; the same for the same layout."""
    names = ["oci-layout", "index.json"]
    blobs = os.path.join(directory, "blobs", "sha256")
    names += [f"blobs/sha256/{name}" for name in sorted(os.listdir(blobs)) if LAYOUT_NAME.match(f"blobs/sha256/{name}")]
    for name in names:
        with open(os.path.join(directory, name), "rb") as stream:
            member = tarfile.TarInfo(name)
            member.size = os.fstat(stream.fileno()).st_size
            yield member.tobuf(tarfile.PAX_FORMAT)
            left = member.size
            while left and (chunk := stream.read(min(_CHUNK, left))):
                left -= len(chunk)
                yield chunk
            if left:
                raise Invalid(f"{directory}/{name} became shorter while it was read")
            yield bytes(-member.size % _BLOCK)
    yield bytes(2 * _BLOCK)


def archive_source(path: str, scratch: str) -> str:
    """What a file that was sent is to `Images.load`: "docker-archive:FILE", or "oci:DIR", taken apart in `scratch`."""
    try:
        with tarfile.open(path) as tar:
            members = {member.name.removeprefix("./"): member for member in tar}
            if "manifest.json" in members:
                return f"docker-archive:{path}"
            if "index.json" not in members:
                raise Invalid("the archive is neither an OCI layout (no index.json) nor docker's (no manifest.json)")
            os.makedirs(os.path.join(scratch, "blobs", "sha256"))
            for name, member in members.items():
                if LAYOUT_NAME.match(name) and member.isreg():
                    source = tar.extractfile(member)
                    assert source is not None  # it is a regular file
                    with open(os.path.join(scratch, name), "xb") as target:
                        shutil.copyfileobj(source, target, _CHUNK)
            return f"oci:{scratch}"
    except (tarfile.TarError, EOFError) as error:
        raise Invalid(f"not an archive of an image: {error}") from None
