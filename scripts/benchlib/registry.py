"""What is measured: rows, workloads (one function yields the samples of a few rows), scales.

A workload is a plain function `f(run) -> {row key: value}`, run once per peer and round on a union that it mounts
itself through `run`. It raises `Skip` with a reason when the peer cannot do the work at all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .run import Run


class Skip(Exception):
    """This peer cannot do this work; the text says why and appears in the table."""


@dataclass(frozen=True)
class Row:
    key: str
    title: str
    unit: str
    group: str = ""
    better: str = "lower"  # lower | higher


@dataclass(frozen=True)
class Workload:
    name: str
    rows: tuple[Row, ...]
    function: Callable[[Run], dict[str, float]]
    long: bool  # only with --all


@dataclass(frozen=True)
class Scale:
    name: str
    dirs: int  # directories of the small-file tree
    files: int  # files in each
    wide: int  # files of the one big directory
    ops: int  # operations of a changing loop (create, unlink, ...)
    tree: int  # files of the real source tree, at least
    data_mib: int  # file that fio works on
    random_ops: int  # 4 KiB requests of a random job
    big_mib: int  # lower file for the first-write row
    copyup_mib: int  # copied up while other files are stat'ed
    transactions: int  # sqlite
    sources: int  # C files compiled
    idle_s: float  # how long wake-ups are counted


QUICK = Scale("quick", 30, 60, 5_000, 300, 1_500, 64, 4_000, 128, 256, 20, 8, 1.0)
NORMAL = Scale("normal", 100, 100, 100_000, 2_000, 10_000, 256, 20_000, 1024, 1024, 100, 40, 3.0)
LONG = Scale("long", 100, 100, 100_000, 5_000, 12_000, 1024, 100_000, 1024, 2048, 300, 40, 5.0)

WORKLOADS: list[Workload] = []


def workload(
    group: str, rows: list[tuple[str, str, str] | tuple[str, str, str, str]], *, long: bool = False
) -> Callable[[Callable[[Run], dict[str, float]]], Callable[[Run], dict[str, float]]]:
    """Register a function for rows given as (key, title, unit[, better])."""

    def register(function: Callable[[Run], dict[str, float]]) -> Callable[[Run], dict[str, float]]:
        made = tuple(Row(r[0], r[1], r[2], group, r[3] if len(r) > 3 else "lower") for r in rows)
        WORKLOADS.append(Workload(function.__name__, made, function, long))
        return function

    return register
