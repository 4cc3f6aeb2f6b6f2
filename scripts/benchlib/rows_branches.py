"""Rows about many branches: what the next one costs."""

from __future__ import annotations

from .registry import workload
from .run import Run

COUNTS = (2, 16, 64)
TITLES = {
    "stat": "stat, cold, with {} branches",
    "negative": "lookup of a missing name, cold, with {} branches",
    "create": "create, write 1 KiB, close in a directory of {} branches",
}
ROWS: list[tuple[str, str, str] | tuple[str, str, str, str]] = [
    (f"{what}.branches{count}", title.format(count), "us") for what, title in TITLES.items() for count in COUNTS
]


@workload("branches", ROWS)
def branches(run: Run) -> dict[str, float]:
    """The writable one on top of count - 1 read-only ones that share ten directories."""
    out = {}
    for count in COUNTS:
        with run.union(run.stage.many(count - 1)) as mnt:
            shape = {"root": str(mnt), "dirs": run.stage.MANY_DIRS, "files": run.stage.MANY_FILES}
            got = run.loop("lookups", **shape)
            out[f"stat.branches{count}"] = got["stat"][0]
            out[f"negative.branches{count}"] = got["miss"][0]
            out[f"create.branches{count}"] = run.loop("create_here", root=f"{mnt}/d0000", count=run.scale.ops)
    return out
