"""Where things may go: the writable layers in which a new entry, a copy or a whiteout would be seen.

What lies above hides what lies below: a whiteout, a file or an opaque directory in an upper layer beats any policy. Of
the layers that are left, the driver chooses. With one writable layer on top, as overlay has it, there is no question.
"""

from __future__ import annotations

import errno

from unionfs.core.base import fail
from unionfs.core.layers import Layer
from unionfs.core.listing import Listing
from unionfs.core.nodes import Dir, Node


class Placement(Listing):
    def _place_new(self, p: Dir, name: bytes, is_dir: bool = False) -> Layer:
        """The layer for a new entry. EROFS: none."""
        writable = self.driver.writable
        if len(writable) == 1 and writable[0].index == 0:
            return writable[0]
        fit = [layer for layer in writable if self._shows(p, name, layer)]
        if not fit:
            raise fail(errno.EROFS, name)
        return self.driver.place_new(p, fit, is_dir)

    def _place_copy(self, p: Dir, source: Layer) -> Layer:
        """The layer for a copy of an entry of p that lies in source. EROFS: none above it is writable."""
        fit = [layer for layer in self.driver.writable if layer.index < source.index]
        if not fit:
            raise fail(errno.EROFS)
        return self.driver.place_copyup(p, fit)

    def _place_whiteout(self, index: int) -> Layer:
        """The layer for the whiteout of an entry of layer `index`: the topmost, where nothing can hide it."""
        writable = self.driver.writable
        if not writable or writable[0].index >= index:
            raise fail(errno.EROFS)
        return writable[0]

    def _shows(self, p: Dir, name: bytes, layer: Layer) -> bool:
        """An entry of p in that layer would be seen. False also where something in a layer above has the name."""
        return not self._hidden(p, name, layer) and self._joins(p, layer)

    def _could_move(self, node: Node, layer: Layer) -> bool:
        """The file would be seen in that layer too, once it is gone from its own, and takes nothing's place there."""
        p = node.parent
        assert p is not None
        taken = (
            ldir.layer.index <= layer.index
            and ldir.layer is not node.ldir.layer
            and self.driver.probe(ldir, node.name) is not None
            for ldir in p.ldirs
        )
        return not any(taken) and self._joins(p, layer)

    def _hidden(self, p: Dir, name: bytes, layer: Layer) -> bool:
        if len(p.ldirs) > 1:
            names = p.names if p.names is not None else self._merge(p)
            if name not in names:
                return False  # nothing above the bottom has it
        return any(ldir.layer.index < layer.index and self.driver.probe(ldir, name) is not None for ldir in p.ldirs)

    def _joins(self, d: Dir, layer: Layer) -> bool:
        """d has a directory in that layer, or one made there would merge with d's others."""
        if any(ldir.layer is layer for ldir in d.ldirs):
            return True
        p = d.parent
        if p is None or d.removed or not self._joins(p, layer):
            return False  # the root is everywhere, down to where it is opaque
        own = {ldir.layer.index for ldir in d.ldirs}
        for ldir in d.ldirs:
            if ldir.layer.index < layer.index:
                marks = self.driver.marks(ldir)
                if marks.opaque or marks.redirect is not None:
                    return False
        return not any(
            ldir.layer.index <= layer.index
            and ldir.layer.index not in own
            and self.driver.probe(ldir, d.name) is not None
            for ldir in p.ldirs
        )
