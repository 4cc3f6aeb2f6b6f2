"""Stores in temporary directories, closed and unmounted whatever a test did."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from unionfs.store import servers
from unionfs.store.layers import LayerStore

Opener = Callable[..., LayerStore]


@pytest.fixture
def open_layers(tmp_path: Path) -> Iterator[Opener]:
    """open_layers("overlay", sync="off"): a store below tmp_path; all that were opened are closed at the end."""
    opened: list[LayerStore] = []
    root = tmp_path / "data"

    def opener(driver: str = "overlay", **options: str) -> LayerStore:
        store = LayerStore(str(root), driver, {"sync": "off", **options})
        opened.append(store)
        return store

    yield opener
    for store in opened:
        if not store.closed:
            store.close()
    for path in servers.mountpoints(str(root)) if root.exists() else ():
        servers.drop(path)


@pytest.fixture(params=["overlay", "aufs", "row", "vfs"])
def store(request: pytest.FixtureRequest, open_layers: Opener) -> LayerStore:
    if os.geteuid() != 0:
        pytest.skip("mounting and owners need root")
    return open_layers(request.param)


def archive(*members: tuple[str, object], **attributes: object) -> io.BytesIO:
    """("d/", None) a directory, ("f", b"data") a file, ("l", "->target") a symlink, ("h", "=target") a hard link,
    ("p", TarInfo) as it is."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, what in members:
            info = what if isinstance(what, tarfile.TarInfo) else tarfile.TarInfo(name.rstrip("/") or ".")
            data = None
            if what is None:
                info.type, info.mode = tarfile.DIRTYPE, 0o755
            elif isinstance(what, bytes):
                info.size, data = len(what), io.BytesIO(what)
            elif isinstance(what, str):
                info.type = tarfile.SYMTYPE if what.startswith("->") else tarfile.LNKTYPE
                info.linkname = what.lstrip("->=") if what.startswith("=") else what[2:]
            for key, value in attributes.items():
                setattr(info, key, value)
            tar.addfile(info, data)
    out.seek(0)
    return out
