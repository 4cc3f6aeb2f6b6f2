"""A row upper as a stack of layers: what a chain file names is opened here, frozen layers beneath the writable top.

Without a chain it is the overlay driver's one upper. Each frozen layer keeps its own index of hard links; block maps
are in one directory of the upper that a layer belongs to (a clone stands on layers of another upper).
"""

from __future__ import annotations

import errno
import os

from unionfs.api import MountConfig
from unionfs.core.layers import Layer, LDir, fd_path
from unionfs.errors import EXIT_FORMAT, EXIT_LAYER, EXIT_USAGE, MountError

from .. import branches, origin
from ..overlay import OverlayDriver
from . import chain as chains
from .chain import Chain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from unionfs.core.driver import FileMarks

MARK = "unionfs.row"


class RowStack(OverlayDriver):
    options = {  # noqa: RUF012
        **OverlayDriver.options,
        "snapshot": "NAME: show the upper as it was then; read-only",
    }
    maps = True

    def __init__(self, config: MountConfig) -> None:
        self.chain: Chain | None = None  # None: no upper
        self.home: LDir | None = None  # the upper directory
        self._numbers: dict[Layer, int] = {}  # of the upper's own layers
        self._homes: dict[Layer, LDir] = {}  # frozen layers: the upper whose block maps they have
        self._maps_dirs: dict[LDir, LDir] = {}
        self._indexes: dict[Layer, tuple[LDir, set[bytes]]] = {}
        super().__init__(config)
        if self.read_only and self._indexes:
            self.index = True

    # --- opening ---

    def _open_layers(self, config: MountConfig) -> None:
        super()._open_layers(config)
        wanted = config.options.get("snapshot")
        if config.upper is None:
            if wanted is not None:
                raise MountError("-o snapshot: needs the upper that has it", EXIT_USAGE)
            return
        upper = self.layers[0]
        self.home = self._homes[upper] = upper.root
        self.chain = chain = Chain.load(upper.root.open().n)
        if wanted is not None and not self.read_only:
            raise MountError("-o snapshot: is read-only: add ro, or make a clone to write", EXIT_USAGE)
        top = chain.find(wanted).layer if wanted else chain.top
        own = [upper if n == 0 else self._open_own(n) for n in chain.stack(top)]
        for layer, n in zip(own, chain.stack(top), strict=True):
            self._numbers[layer] = n
            self._homes[layer] = self.home
        stack = own + self._open_base(chain)
        for layer in stack[1:] if not wanted else stack:
            layer.frozen = True
        if not self.read_only and stack[0] is not upper:
            self._hand_over(upper, stack[0])
        self._arrange([*stack, *self.layers[1:]])
        for layer in stack:
            if layer.frozen or (self.read_only and self._numbers[layer]):
                self._open_frozen_index(layer)

    def _open_own(self, number: int) -> Layer:
        assert self.chain is not None and self.home is not None
        if number == self.chain.top and not self.read_only:
            chains.make_directory(self.home.open().n, self.chain.path(number))  # a power cut may have taken it: empty
        return self.open_number(self.home, self.config.upper or b"", self.chain, number)

    def open_number(self, home: LDir, upper: bytes, chain: Chain, number: int) -> Layer:
        relative = chain.path(number)
        try:
            layer = Layer(0, fd_path(home.open(), relative), False, self.fds)
        except OSError as e:
            raise MountError(
                f"upper {branches.show(upper)}: layer {number} of its chain can't be opened: {e.strerror}; "
                "see unionfs fsck",
                EXIT_FORMAT,
            ) from None
        layer.path = upper.rstrip(b"/") + b"/" + relative if number else upper
        return layer

    def _open_base(self, chain: Chain) -> list[Layer]:
        """The layers that a clone stands on."""
        if chain.base is None:
            return []
        base = chain.base
        where = branches.show(base.upper)
        try:
            root = Layer(0, base.upper, False, self.fds)
        except OSError as e:
            raise MountError(f"this upper is a clone of {where}: {e.strerror}; put it back there", EXIT_LAYER) from None
        below = Chain.load(root.root.open().n)
        if below.id != base.id or base.layer not in below.parents:
            raise MountError(
                f"this upper is a clone of {where}, and that is another upper now, or has lost layer {base.layer}",
                EXIT_FORMAT,
            )
        if not self.read_only:
            self._still_here(below)
        numbers = below.stack(base.layer)
        found = [root if n == 0 else self.open_number(root.root, base.upper, below, n) for n in numbers]
        for layer, n in zip(found, numbers, strict=True):
            self._homes[layer] = root.root
            self._numbers[layer] = n
        return found + self._open_base(below)

    def _still_here(self, below: Chain) -> None:
        """The original knows the clone by its place: tell it where that is now."""
        assert self.chain is not None and self.chain.base is not None
        upper = self.config.upper
        known = {ident: path for ident, path, _ in chains.clones(below.root)}
        if upper is not None and known.get(self.chain.id) != upper:
            try:
                chains.register_clone(below.root, self.chain.id, upper, self.chain.base.layer)
            except OSError:
                pass  # a read-only original: it can't lose its layers either

    def _arrange(self, layers: list[Layer]) -> None:
        for layer in self.layers:
            layer.index = len(layers)  # what is dropped is below all others: its files can be copied up from there
        self.layers[:] = layers
        for i, layer in enumerate(layers):
            layer.index = i
        self.writable[:] = [layer for layer in layers[:1] if layer.writable]
        self.bottom = len(layers) - 1

    def _hand_over(self, old: Layer, new: Layer) -> None:
        """`new` is the layer that is written from now on; scratch space goes with that role."""
        holder = self._holder
        assert holder is not None
        self._holder = LDir(new, None, b"", self.fds)
        self._holder.fd = holder.fd
        new.work = self._holder.child(b"work")
        new.writable, new.permission = True, "rw"
        old.work = None
        old.writable, old.permission = False, "ro"

    # --- hard links: an index for each layer; of number 0 in work/, where overlay has it, until it is frozen ---

    def _open_index(self, wanted: bool) -> None:
        top = self.layers[0]
        number = self._numbers[top]
        if number == 0:
            self._return_index()
            super()._open_index(wanted)
        elif wanted and all(origin.supported(layer.root) for layer in self.layers[1:]):
            self._take_index(top, number)

    def _take_index(self, top: Layer, number: int) -> None:
        assert self.home is not None
        home = self.home.open().n
        for path in (chains.STORE, chains.INDEX, chains.INDEX + b"/%d" % number):
            chains.make_directory(home, path)
        self._index = self._index_of(self.home, top, number)
        self.index_entries = set(os.listdir(fd_path(self._index.open())))
        self.index = True

    @staticmethod
    def _index_of(home: LDir, layer: Layer, number: int) -> LDir:
        ldir = home.child(chains.STORE).child(b"index").child(b"%d" % number)
        ldir.layer = layer
        ldir.impure = True
        return ldir

    def _return_index(self) -> None:
        """Of a first snapshot that a crash kept from being made, the index has moved already."""
        assert self.home is not None and self._holder is not None
        home, moved = self.home.open().n, chains.INDEX + b"/0"
        if not os.access(moved, os.F_OK, dir_fd=home, follow_symlinks=False):
            return
        try:
            os.rename(moved, b"index", src_dir_fd=home, dst_dir_fd=self._holder.open().n)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise

    def _open_frozen_index(self, layer: Layer) -> None:
        ldir = self._index_of(self._homes[layer], layer, self._numbers[layer])
        try:
            self._indexes[layer] = (ldir, set(os.listdir(fd_path(ldir.open()))))
        except OSError:
            pass  # it has none

    def index_dir(self, layer: Layer) -> LDir | None:
        frozen = self._indexes.get(layer)
        return frozen[0] if frozen is not None else super().index_dir(layer)

    def index_entries_of(self, layer: Layer) -> set[bytes]:
        frozen = self._indexes.get(layer)
        return frozen[1] if frozen is not None else super().index_entries_of(layer)

    def index_find(self, source: LDir, name: bytes, st: os.stat_result) -> tuple[LDir, bytes] | None:
        """A copy may have been copied again by a later generation: the last one counts."""
        if not self._indexes:
            return super().index_find(source, name, st)
        found: tuple[LDir, bytes] | None = None
        entry = self.index_name(source, name, st)
        for layer in reversed(self.layers[: source.layer.index]):
            if entry is not None and entry in self.index_entries_of(layer):
                index = self.index_dir(layer)
                if index is None:
                    continue
                found = (index, entry)
                entry = self.index_name(index, entry, st)
        return found

    # --- reading marks ---

    def file_marks(self, ldir: LDir, name: bytes) -> FileMarks | None:
        marks = super().file_marks(ldir, name)
        if marks is not None and marks.metacopy and ldir.layer.frozen:
            marks.mapped = self._has_map(fd_path(ldir.open(), name))
        return marks

    def holds_data(self, ldir: LDir, name: bytes) -> bool:
        return self._has_map(fd_path(ldir.open(), name))

    def _has_map(self, path: bytes | int) -> bool:
        return self.ident_of(path) is not None

    def ident_of(self, path: bytes | int) -> str | None:
        """The id of an upper inode's block map."""
        follow = isinstance(path, int)
        for prefix in dict.fromkeys((self.prefix, "trusted.overlay.", "user.overlay.")):
            try:
                return os.getxattr(path, prefix + MARK, follow_symlinks=follow).decode("ascii", "replace")
            except OSError as e:
                if e.errno not in (errno.ENODATA, errno.EOPNOTSUPP):
                    raise
        return None

    def maps_dir(self, layer: Layer, make: bool) -> LDir | None:
        """Where the block maps of a layer are; made with the first map, unnoticed by those who look at the root."""
        home = self._homes.get(layer)
        if home is None:
            return None  # a plain lower
        known = self._maps_dirs.get(home)
        if known is not None:
            return known
        maps = home.child(chains.STORE).child(b"maps")
        if make:
            for path in (chains.STORE, chains.MAPS):
                chains.make_directory(home.open().n, path)
        try:
            maps.open()
        except FileNotFoundError:
            return None
        self._maps_dirs[home] = maps
        return maps

    def limited_paths(self) -> list[bytes]:
        if self.chain is None:
            return super().limited_paths()
        upper = self.config.upper or b""
        return [upper + b"/" + self.chain.path(number) if number else upper for number in self.chain.parents]

    # --- a new top ---

    def make_top(self, number: int) -> Layer:
        """An empty layer with the looks of the present root, not in force yet. OSError, MountError."""
        assert self.chain is not None and self.home is not None
        home = self.home.open().n
        for path in (chains.STORE, chains.LAYERS):
            chains.make_directory(home, path)
        os.mkdir(self.chain.path(number), 0o700, dir_fd=home)
        return self.open_number(self.home, self.config.upper or b"", self.chain, number)

    def put_on_top(self, new: Layer, number: int, chain: Chain, below: list[Layer]) -> None:
        """Commit: `chain`, written already, is in force, and `new` is written over `below`. No operation is running."""
        old = self.layers[0]
        moved = self._keep_index(old)
        try:
            chain.publish()
        except BaseException:
            if moved:
                self._return_index()
            raise
        self.chain = chain
        self.own(new, number)
        self._hand_over(old, new)
        old.frozen = True
        if self._index is not None:
            assert self.home is not None
            if moved:  # nodes know the index by its LDir: it goes on, at its new place
                self._index.parent = self.home.child(chains.STORE).child(b"index")
                self._index.name = b"0"
            self._indexes[old] = (self._index, self.index_entries)
            self._take_index(new, number)
        self._arrange([new, *below])

    def own(self, layer: Layer, number: int) -> None:
        """The layer is one of the upper's."""
        assert self.home is not None
        self._numbers[layer] = number
        self._homes[layer] = self.home

    def _keep_index(self, old: Layer) -> bool:
        """Move the index of layer 0 to where that of a frozen layer is."""
        if self._index is None or self._numbers[old] != 0:
            return False
        assert self._holder is not None and self.home is not None
        home = self.home.open().n
        for path in (chains.STORE, chains.INDEX):
            chains.make_directory(home, path)
        os.rename(b"index", chains.INDEX + b"/0", src_dir_fd=self._holder.open().n, dst_dir_fd=home)
        return True

    def layers_of(self, layer: int, chain: Chain) -> list[Layer]:
        """The stack of a layer of the upper, down to the bottom: those that are shown now are the same ones."""
        known = {n: shown for shown, n in self._numbers.items() if self._homes[shown] is self.home}
        assert self.home is not None
        stack = []
        for number in chain.stack(layer):
            shown = known.get(number)
            if shown is None:
                shown = self.open_number(self.home, self.config.upper or b"", chain, number)
                shown.frozen = True
                self.own(shown, number)
                self._open_frozen_index(shown)
            stack.append(shown)
        own = set(self._numbers)
        foreign = [shown for shown in self.layers if shown in own and self._homes[shown] is not self.home]
        return [*stack, *foreign, *(shown for shown in self.layers if shown not in own)]
