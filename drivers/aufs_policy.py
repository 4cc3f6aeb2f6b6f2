"""Placement policies of the aufs driver: of the writable branches that fit, which one takes a new entry or a copy.

As aufs(5) has them. `fit` is topmost first and never empty. Free space is asked for once in `seconds`; between two
askings what was chosen stays chosen, so a policy costs a create nothing. Any thread; a race costs one more statvfs.
"""

from __future__ import annotations

import os
from time import monotonic

from unionfs.errors import EXIT_USAGE, MountError, nearest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from unionfs.core.layers import Layer
    from unionfs.core.nodes import Dir

INTERVAL = 30.0  # seconds between two looks at free space, unless the policy says otherwise
CREATE = ("tdp", "tdmfs", "rr", "mfs", "mfsrr", "pmfs", "pmfsrr")
COPYUP = ("tdp", "bup", "bu")
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}


def has_parent(parent: Dir, layer: Layer) -> bool:
    return any(ldir.layer is layer for ldir in parent.ldirs)


def nearest_above(parent: Dir, fit: Sequence[Layer]) -> Layer:
    """The lowest branch above the one that parent comes from ("bottom-up"); the topmost where none is above."""
    source = parent.ldirs[0].layer.index
    return next((layer for layer in reversed(fit) if layer.index <= source), fit[0])


# --- copy-up ---


def copyup_policy(text: str) -> Callable[[Dir, Sequence[Layer]], Layer]:
    """For copies all of `fit` is above the source, so the last one is the nearest."""
    if text == "bu":
        return lambda parent, fit: fit[-1]
    if text == "bup":
        return lambda parent, fit: next((layer for layer in reversed(fit) if has_parent(parent, layer)), fit[-1])
    if text == "tdp":
        return lambda parent, fit: next((layer for layer in fit if has_parent(parent, layer)), fit[-1])
    raise MountError(f"cpup={text}: unknown policy{nearest(text, COPYUP)}; one of {', '.join(COPYUP)}", EXIT_USAGE)


# --- creation ---


class Space:
    """Free bytes of branches, looked at once in `seconds`."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._known: dict[Layer, tuple[float, int]] = {}

    def free(self, layer: Layer) -> int:
        now = monotonic()
        known = self._known.get(layer)
        if known is not None and now - known[0] < self.seconds:
            return known[1]
        try:
            s = os.fstatvfs(layer.root.open().n)
            free = s.f_bavail * s.f_frsize
        except OSError:
            free = 0  # a branch that does not answer takes nothing new
        self._known[layer] = (now, free)
        return free

    def forget(self) -> None:
        """The branches have changed."""
        self._known.clear()

    def most(self, fit: Sequence[Layer]) -> Layer:
        return max(fit, key=self.free)


class CreatePolicy:
    """`create=NAME[:LOW][:SECONDS]`."""

    def __init__(self, text: str) -> None:
        self.text = text
        name, *arguments = text.split(":")
        if name not in CREATE:
            raise MountError(
                f"create={text}: unknown policy{nearest(name, CREATE)}; one of {', '.join(CREATE)}", EXIT_USAGE
            )
        self.name = name
        self.low = 0
        with_low = name in ("tdmfs", "mfsrr", "pmfsrr")
        if with_low:
            if not arguments:
                raise MountError(f"create={text}: needs a watermark: create={name}:100m", EXIT_USAGE)
            self.low = size(arguments.pop(0), f"create={text}")
        seconds = INTERVAL
        if arguments and name not in ("tdp", "rr"):
            seconds = _seconds(arguments.pop(0), f"create={text}")
        if arguments:
            raise MountError(f"create={text}: more than {name} takes", EXIT_USAGE)
        self.space = Space(seconds)
        self._turn = -1
        self._choose: Callable[[Dir, Sequence[Layer]], Layer] = getattr(self, "_" + name)

    def choose(self, parent: Dir, fit: Sequence[Layer], is_dir: bool) -> Layer:
        if len(fit) == 1:
            return fit[0]
        if is_dir and self.name == "rr":
            return fit[0]  # aufs: directories are not spread
        return self._choose(parent, fit)

    def _tdp(self, parent: Dir, fit: Sequence[Layer]) -> Layer:
        return next((layer for layer in fit if has_parent(parent, layer)), None) or nearest_above(parent, fit)

    def _rr(self, parent: Dir, fit: Sequence[Layer]) -> Layer:
        self._turn += 1
        return fit[self._turn % len(fit)]

    def _mfs(self, parent: Dir, fit: Sequence[Layer]) -> Layer:
        return self.space.most(fit)

    def _mfsrr(self, parent: Dir, fit: Sequence[Layer]) -> Layer:
        best = self.space.most(fit)
        return best if self.space.free(best) >= self.low else self._rr(parent, fit)

    def _tdmfs(self, parent: Dir, fit: Sequence[Layer]) -> Layer:
        return fit[0] if self.space.free(fit[0]) >= self.low else self.space.most(fit)

    def _pmfs(self, parent: Dir, fit: Sequence[Layer]) -> Layer:
        with_parent = [layer for layer in fit if has_parent(parent, layer)]
        return self.space.most(with_parent) if with_parent else nearest_above(parent, fit)

    def _pmfsrr(self, parent: Dir, fit: Sequence[Layer]) -> Layer:
        with_parent = [layer for layer in fit if has_parent(parent, layer)]
        if with_parent:
            best = self.space.most(with_parent)
            if self.space.free(best) >= self.low:
                return best
        return self._mfsrr(parent, fit)


def size(text: str, where: str) -> int:
    """Bytes with an optional k, m or g."""
    number, unit = (text[:-1], text[-1:].lower()) if text[-1:].isalpha() else (text, "")
    if unit not in _UNITS or not number.isdigit():
        raise MountError(f"{where}: {text!r} is not a size: a number of bytes, or with k, m or g", EXIT_USAGE)
    return int(number) * _UNITS[unit]


def _seconds(text: str, where: str) -> float:
    if not text.isdigit():
        raise MountError(f"{where}: {text!r} is not a number of seconds", EXIT_USAGE)
    return float(text)
