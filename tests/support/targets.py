"""What the suite can run against: one row per driver of ours and per oracle. Driver knowledge of tests lives here."""

from __future__ import annotations

from dataclasses import dataclass

from . import limits
from .trees import Tree, in_aufs_format


@dataclass(frozen=True)
class Target:
    """One way to mount: a driver and session of ours, or an oracle (`driver` is then its name, `session` empty)."""

    driver: str
    session: str = ""
    data: str = ""

    def __str__(self) -> str:
        return "-".join(part for part in (self.driver, self.session, self.data) if part)

    @property
    def ours(self) -> bool:
        return self.driver not in ORACLES

    def spelled(self, tree: Tree) -> Tree:
        """A layer's tree in the format of the driver."""
        return in_aufs_format(tree) if self.driver == "aufs" else tree

    def lacks(self, feature: str) -> str | None:
        """The reason why this target can't run a test that needs `feature`."""
        if not self.ours:
            return ORACLES[self.driver].get(feature)
        if self.session == "pyfuse3" and feature in limits.PYFUSE3:
            return limits.PYFUSE3[feature]
        if self.data == "passthrough" and feature in limits.PASSTHROUGH:
            return limits.PASSTHROUGH[feature]
        return DRIVERS[self.driver].get(feature)


# Features (words of `needs`) that a driver of ours lacks, with the reason.
DRIVERS: dict[str, dict[str, str]] = {
    "overlay": {},
    "aufs": limits.AUFS,
    "row": limits.ROW,
}

# What runs unless the command line asks for something else; tests marked every_data_mode run DATA_MATRIX too.
MATRIX = [
    Target("overlay", "direct", "noopen"), Target("overlay", "pyfuse3"), Target("aufs", "direct", "noopen"),
    Target("aufs", "pyfuse3"), Target("row", "direct", "noopen"), Target("row", "pyfuse3"),
]  # fmt: skip
DATA_MATRIX = [Target("overlay", "direct", "cached"), Target("overlay", "direct", "passthrough")]

# What the suite mounts a driver with, beside what the test asks for.
OPTIONS: dict[str, str] = {
    "aufs": "dirren",
}

ORACLES: dict[str, dict[str, str]] = {
    "kernel": limits.KERNEL,
    "fuse-overlayfs": limits.FUSE_OVERLAYFS,
}

KERNEL_OPTIONS = "index=on,metacopy=on,redirect_dir=on"
