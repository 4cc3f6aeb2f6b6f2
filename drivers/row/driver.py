"""The row driver: the overlay driver, but the first write to a big lower file redirects blocks instead of copying it.

A redirected file is, to overlay, a metacopy: an upper inode with all metadata whose data lies below. Beside it there
is a block map (`.wh..wh.row/maps/ID` in the upper's root, the id in an xattr of the inode), and the upper inode itself
is the sparse file that holds the redirected blocks. Format: docs/row-format.md.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from weakref import WeakValueDictionary

from unionfs import sysio
from unionfs.api import MountConfig
from unionfs.core.base import OpenFile, fail
from unionfs.core.layers import LDir, fd_path
from unionfs.errors import EXIT_FORMAT, EXIT_USAGE, MountError

from .blockmap import COMPACT_AT, DATA, HOLE, VERSION, Base, BlockMap, MapError, version_of
from .file import RowFile
from .flat import FlatFile, flatten
from .stack import MARK, RowStack

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from unionfs.core.copyup import CopyUp
    from unionfs.core.freeze import FreezingUnion
    from unionfs.core.layers import Layer
    from unionfs.core.lookup import Lookup
    from unionfs.core.nodes import Node

REDIRECT_MIN = 64 << 10  # smaller files are copied: one write instead of a write and a map
CHECKPOINT_EVERY = 5.0  # seconds that redirected blocks may wait for their checkpoint
BLOCKSIZES = {"4k": 4096, "16k": 16384, "64k": 65536, "128k": 131072}


class RowDriver(RowStack):
    name = "row"
    freezes = True
    options = {  # noqa: RUF012
        **RowStack.options,
        "blocksize": "4k|16k|64k|128k: the unit of redirection for files first written from now on (default 4k)",
        "force": "use block maps although the file below has changed since they were made",
    }

    def __init__(self, config: MountConfig) -> None:
        text = config.options.get("blocksize", "4k").lower()
        if text not in BLOCKSIZES:
            raise MountError(f"blocksize={text}: must be one of {', '.join(BLOCKSIZES)}", EXIT_USAGE)
        self.blocksize = BLOCKSIZES[text]
        self.force = "force" in config.options
        super().__init__(config)
        self._open_files: WeakValueDictionary[str, RowFile] = WeakValueDictionary()
        self._frozen_files: WeakValueDictionary[str, FlatFile] = WeakValueDictionary()
        self._dirty: dict[str, RowFile] = {}
        self._some = threading.Event()
        self._over = False
        self._saver: threading.Thread | None = None
        self._opening = threading.Lock()
        self.redirected_files = 0
        self._check_version()
        if not self.metacopy and not self.read_only:
            raise MountError(
                "driver row needs xattrs on upper, and redirect_dir and metacopy on: use --driver overlay here",
                EXIT_FORMAT,
            )

    def _check_version(self) -> None:
        """One program writes one version: the first map tells."""
        maps = self._store(False)
        if maps is None:
            return
        name = next(iter(os.listdir(maps.open().n)), None)
        if name is None:
            return
        found = version_of(maps.open().n, name)
        if found != VERSION:
            upper = os.fsdecode(self.layers[0].path)
            raise MountError(
                f"{upper}: block maps of format version {found}, this program knows {VERSION}: "
                f"mount it with the unionfs that wrote it, or make it plain with that one's `unionfs row flatten`",
                EXIT_FORMAT,
            )

    def _store(self, make: bool) -> LDir | None:
        return self.maps_dir(self.layers[0], make)

    # --- the seam to the core ---

    def redirects_data(self, node: Node, st: os.stat_result, size: int | None) -> bool:
        if not node.ldir.layer.writable:
            return st.st_size >= REDIRECT_MIN and size != 0
        return size != 0 or self._has_map(fd_path(node.ldir.open(), node.disk_name()))

    def open_redirected(self, core: CopyUp, node: Node, write: bool) -> OpenFile | None:
        """The node's bytes where its data is not all in one file; None: it is, in the one below."""
        assert node.more is not None and node.more.data is not None
        own = node.ldir.layer.writable or core._is_private(node)
        n = core._open_inode(node, os.O_RDWR if own else os.O_RDONLY)
        upper = OpenFile(n, own)
        with self._opening:
            ident = self.ident_of(n)
            if ident is None and not write:
                return self._open_frozen(core, *node.more.data)
            if ident is not None:
                known = self._open_files.get(ident)
                if known is not None:
                    known.writable = own
                    return known
                if not own:
                    return self._open_generation(core, node.ldir, node.name, upper, ident, node.more.data)
            base = self._open_frozen(core, *node.more.data)
            if ident is None:
                if self.quota is None and base.plain and sysio.clone(n, base.n):  # it would count as all its own
                    self.clear_metacopy(n)
                    node.extra().data = None
                    return upper
                ident, blockmap = self._new_map(n, base, node.more.data[0].layer.frozen)
            else:
                blockmap = self._load_map(ident, base, node.name, node.ldir.layer)
            f = RowFile(os.dup(n), True, base, blockmap, ident)
            if not f.needs_base():
                whole = self.settle(core, node, f)  # it was all redirected, but never synced
                if whole is not None:
                    return whole
            f.on_dirty = self._note_dirty
            self._open_files[ident] = f
            return f

    def _open_frozen(self, core: CopyUp, ldir: LDir, name: bytes) -> OpenFile:
        """What a file of a layer that nobody writes shows, for reading."""
        f = OpenFile(core._open_quiet(name, ldir), False)
        ident = self.ident_of(f.n) if ldir.layer.frozen else None
        if ident is None:
            return f
        below = self.next_below(core, ldir, name)
        if below is None:
            raise fail(errno.EIO, name)
        return self._open_generation(core, ldir, name, f, ident, below)

    def next_below(self, core: Lookup, ldir: LDir, name: bytes) -> tuple[LDir, bytes] | None:
        """What a metacopy of a frozen layer continues from; None: it is no metacopy, or that is gone."""
        marks = self.file_marks(ldir, name) if ldir.layer.frozen else None
        if marks is None or not marks.metacopy:
            return None
        path = marks.redirect or name
        if not path.startswith(b"/"):
            path = ldir.path().rstrip(b"/") + b"/" + path
        return core._resolve_below(path, ldir.layer.index)

    def load_map(self, ident: str, layer: Layer) -> BlockMap:
        """For reading. MapError, OSError."""
        maps = self.maps_dir(layer, False)
        if maps is None:
            raise FileNotFoundError(errno.ENOENT, "no block maps", ident)
        return BlockMap.load(maps.open().n, ident, False)

    def _open_generation(
        self, core: CopyUp, ldir: LDir, name: bytes, upper: OpenFile, ident: str, below: tuple[LDir, bytes]
    ) -> FlatFile:
        """A redirected file of a frozen layer: its blocks over those of the generations before it."""
        known = self._frozen_files.get(ident)
        if known is not None:
            return known
        base = self._open_frozen(core, *below)
        was_open = self._open_files.get(ident)  # by who wrote it: that one knows what is not on the disk yet
        blockmap = was_open.map if was_open is not None else self._load_map(ident, base, name, ldir.layer)
        f = self._frozen_files[ident] = flatten(os.dup(upper.n), base, blockmap)
        if was_open is None:
            blockmap.close()
        return f

    def _new_map(self, n: int, base: OpenFile, over_frozen: bool) -> tuple[str, BlockMap]:
        maps = self._store(True)
        assert maps is not None
        ident = os.urandom(12).hex()
        st = os.fstat(base.n)
        # a base that is ours can't change, but it may be copied, and be another inode then
        known = Base(st.st_size, 0, 0) if over_frozen else Base(st.st_size, st.st_mtime_ns, st.st_ino)
        blockmap = BlockMap.create(maps.open().n, ident, self.blocksize, known)
        os.setxattr(n, self.prefix + MARK, ident.encode())
        self.redirected_files += 1
        return ident, blockmap

    def _load_map(self, ident: str, base: OpenFile, name: bytes, layer: Layer) -> BlockMap:
        """EIO, and a line in the log, for a map that can't be believed: the file's real content is not known then."""
        maps = self.maps_dir(layer, False)
        shown = os.fsdecode(name)
        try:
            if len(ident) != 24 or not ident.isalnum():
                raise MapError(f"bad id {ident!r}")
            if maps is None:
                raise FileNotFoundError
            blockmap = BlockMap.load(maps.open().n, ident, not layer.frozen and not self.read_only)
        except FileNotFoundError:
            print(f"unionfs: {shown}: its block map {ident} is missing; see unionfs fsck", file=sys.stderr)
            raise fail(errno.EIO, name) from None
        except MapError as e:
            print(f"unionfs: {shown}: block map {ident}: {e}; see unionfs fsck", file=sys.stderr)
            raise fail(errno.EIO, name) from None
        st = os.fstat(base.n)
        then = blockmap.base
        now = (st.st_size, st.st_mtime_ns, st.st_ino)
        if then.ino and now != (then.size, then.mtime_ns, then.ino) and not self.force:
            blockmap.close()
            print(
                f"unionfs: {shown}: the file below has changed since its blocks were redirected "
                f"(size {then.size} -> {st.st_size}, inode {then.ino} -> {st.st_ino}); -o force uses it as it is",
                file=sys.stderr,
            )
            raise fail(errno.EIO, name)
        return blockmap

    def settle(self, core: CopyUp, node: Node, f: OpenFile) -> OpenFile | None:
        """After a sync: a file that shows nothing of its base any more becomes a plain one."""
        assert isinstance(f, RowFile)
        with f.lock:
            if f.needs_base() or f.map.dirty:
                self._compact(f)
                return None
            f.bare()
            self.clear_metacopy(f.n)
            self._forget_map(f.ident)
            self._open_files.pop(f.ident, None)
            self._dirty.pop(f.ident, None)
            node.extra().data = None
            return OpenFile(os.dup(f.n), True)

    def _compact(self, f: RowFile) -> None:
        if f.map.records < COMPACT_AT or f.map.dirty:
            return
        raw, maps = f.map.compacted(), self._store(False)
        if raw is None or maps is None:
            return
        d = maps.open().n
        tmp = f.ident + ".new"
        fd = os.open(tmp, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600, dir_fd=d)
        try:
            if os.write(fd, raw) != len(raw):
                raise fail(errno.ENOSPC)
            os.fdatasync(fd)
            os.rename(tmp, f.ident, src_dir_fd=d, dst_dir_fd=d)
        except OSError:
            os.close(fd)
            os.unlink(tmp, dir_fd=d)
            return  # the long map still serves
        f.map.replaced(fd)

    def _forget_map(self, ident: str) -> None:
        maps = self._store(False)
        if maps is None:
            return
        try:
            os.unlink(ident, dir_fd=maps.open().n)
        except FileNotFoundError:
            pass

    def clear_metacopy(self, fd: int) -> None:
        super().clear_metacopy(fd)
        try:
            os.removexattr(fd, self.prefix + MARK)
        except OSError as e:
            if e.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                raise

    def inode_gone(self, path: bytes) -> None:
        """The last name of an upper inode is about to go: its map goes too. An open file keeps its own descriptor."""
        try:
            ident = os.getxattr(path, self.prefix + MARK, follow_symlinks=True).decode("ascii", "replace")
        except OSError:
            return
        if len(ident) == 24 and ident.isalnum():
            self._forget_map(ident)

    # --- checkpoints in the background ---

    def _note_dirty(self, f: RowFile) -> None:
        """Held until its next checkpoint, however long nobody has it open."""
        if f.ident in self._dirty:
            return
        self._dirty[f.ident] = f
        if self._saver is None:
            self._saver = threading.Thread(target=self._save, name="unionfs-row", daemon=True)
            self._saver.start()
        self._some.set()

    def _save(self) -> None:
        while not self._over:
            self._some.wait()
            self._some.clear()
            if not self._over:
                threading.Event().wait(CHECKPOINT_EVERY)
            self.flush()

    def flush(self) -> None:
        for ident, f in list(self._dirty.items()):
            if self._dirty.pop(ident, None) is None:
                continue
            try:
                if not self.volatile:
                    f.sync(True)
                else:
                    f.map.checkpoint()
            except OSError as e:
                print(f"unionfs: block map {ident}: {e.strerror}", file=sys.stderr)

    def stop(self) -> None:
        self._over = True
        self._some.set()
        self.flush()
        self._open_files.clear()
        super().stop()

    # --- snapshots ---

    def start(self) -> None:
        if self.chain is not None and not self.read_only:
            from .snapshot import clean_later

            clean_later(self, None)

    def snapshot(self, core: FreezingUnion, action: str, arguments: dict[str, Any]) -> Any:
        from .snapshot import Mounted  # only where it is asked for

        return Mounted(self, core).do(action, arguments)

    def diff_frozen(self) -> list[tuple[str, bytes]] | None:
        if not any(layer.frozen for layer in self.layers) or not self.config.lowers:
            return None
        from .snapshot_view import View, rows

        return rows(View(None, self.config.lowers, None), View(self.config.upper, self.config.lowers, None))

    # --- people ---

    def status(self) -> dict[str, Any]:
        s = os.fstatvfs(self.layers[0].root.open().n)
        return {
            **super().status(),
            "block size": self.blocksize,
            "data space total": s.f_blocks * s.f_frsize,
            "data space available": s.f_bavail * s.f_frsize,
            **self._map_figures(),
        }

    def _map_figures(self) -> dict[str, int]:
        """Over all block maps: bytes (space) and blocks that are redirected, shared with a file below, or holes."""
        maps = self._store(False)
        names = os.listdir(maps.open().n) if maps is not None else []
        space = redirected = shared = discarded = used = 0
        for name in names:
            f = self._open_files.get(name)
            try:
                assert maps is not None
                st = os.stat(name, dir_fd=maps.open().n)
                blockmap = f.map if f is not None else BlockMap.load(maps.open().n, name, False)
            except (OSError, MapError):
                continue  # gone by now, just made, or damaged: fsck tells
            with f.lock if f is not None else threading.Lock():
                data, holes = blockmap.extents.count(DATA), blockmap.extents.count(HOLE)
                runs = blockmap.extents.runs(0, -(-blockmap.limit // blockmap.blocksize))
            if f is None:
                blockmap.close()
            space += st.st_blocks * 512
            redirected += data
            used += data * blockmap.blocksize
            discarded += holes
            shared += sum(stop - first for first, stop, kind in runs if not kind)
        return {
            "data space used": used,
            "map space": space,
            "maps": len(names),
            "redirected blocks": redirected,
            "shared blocks": shared,
            "discarded blocks": discarded,
        }
