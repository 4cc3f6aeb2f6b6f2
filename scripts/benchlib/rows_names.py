"""Rows about names: lookups, listings, small files. Cold: the first pass over a fresh mount. Warm: the best of the
next passes over the same names."""

from __future__ import annotations

from .peers import need_cow
from .registry import workload
from .run import Run, timed


@workload("metadata", [
    ("stat.cold", "stat, cold", "us"),
    ("stat.warm", "stat, warm", "us"),
    ("negative.cold", "lookup of a missing name, cold", "us"),
    ("negative.warm", "lookup of a missing name, warm", "us"),
    ("read.cold", "open+read+close 1 KiB, cold", "us"),
    ("read.warm", "open+read+close 1 KiB, warm", "us"),
])  # fmt: skip
def lookups(run: Run) -> dict[str, float]:
    with run.union([run.stage.small], writes=True, copy=False) as mnt:
        got = run.loop("lookups", root=str(mnt), dirs=run.scale.dirs, files=run.scale.files)
    return {
        f"{row}.{state}": got[kind][i]
        for row, kind in (("stat", "stat"), ("negative", "miss"), ("read", "read"))
        for i, state in enumerate(("cold", "warm"))
    }


@workload("metadata", [
    ("scandir.cold", "scandir+stat per entry, 100 directories of 100, cold", "us"),
    ("scandir.warm", "scandir+stat per entry, 100 directories of 100, warm", "us"),
])  # fmt: skip
def scandir(run: Run) -> dict[str, float]:
    with run.union([run.stage.hundred], copy=False) as mnt:
        dirs = sorted(p.name for p in run.stage.hundred.iterdir())
        cold, warm = run.loop("scans", root=str(mnt), dirs=dirs)
    return {"scandir.cold": cold, "scandir.warm": warm}


@workload("metadata", [
    ("wide.cold", "scandir+stat per entry, one big directory, cold", "us"),
    ("wide.warm", "scandir+stat per entry, one big directory, warm", "us"),
])  # fmt: skip
def wide(run: Run) -> dict[str, float]:
    with run.union([run.stage.wide(run.scale.wide)], copy=False) as mnt:
        cold, warm = run.loop("scans", root=str(mnt), dirs=["wide"], warm=1)
    return {"wide.cold": cold, "wide.warm": warm}


@workload("metadata", [
    ("find.cold", "find by size in the source tree, cold", "ms"),
    ("find.warm", "find by size in the source tree, warm", "ms"),
    ("git.cold", "git status of the source tree, first", "ms"),
    ("git.warm", "git status of the source tree, again", "ms"),
])  # fmt: skip
def whole_tree(run: Run) -> dict[str, float]:
    out = {}
    find = ["find", ".", "-size", "+100000k"]
    git = ["git", "-c", "safe.directory=*", "--no-optional-locks", "status", "--porcelain"]
    for name, argv in (("find", find), ("git", git)):
        with run.union([run.stage.tree], copy=False) as mnt:
            out[f"{name}.cold"] = 1000 * timed(argv, cwd=mnt)
            out[f"{name}.warm"] = 1000 * min(timed(argv, cwd=mnt) for _ in range(2))
    return out


@workload("metadata", [
    ("deep.cold", "stat at depth 20, cold", "us"),
    ("deep.warm", "stat at depth 20, warm", "us"),
])  # fmt: skip
def deep(run: Run) -> dict[str, float]:
    with run.union([run.stage.deep], copy=False) as mnt:
        cold, warm = run.loop("stat_list", root=str(mnt), names=run.stage.deep_names())
    return {"deep.cold": cold, "deep.warm": warm}


@workload("metadata", [
    ("lowers1.cold", "stat with 1 lower, cold", "us"),
    ("lowers10.cold", "stat with 10 lowers, cold", "us"),
    ("lowers128.cold", "stat with 128 lowers, cold", "us"),
])  # fmt: skip
def many_lowers(run: Run) -> dict[str, float]:
    out = {}
    for count in (1, 10, 128):
        with run.union(run.stage.many(count), copy=False) as mnt:
            cold, _ = run.loop(
                "stat_tree", root=str(mnt), dirs=run.stage.MANY_DIRS, files=run.stage.MANY_FILES, warm=1
            )
        out[f"lowers{count}.cold"] = cold
    return out


@workload("small files", [
    ("create", "create, write 1 KiB, close", "us"),
    ("rename.new", "rename of a new file", "us"),
    ("unlink.new", "unlink of a new file", "us"),
])  # fmt: skip
def create(run: Run) -> dict[str, float]:
    with run.union([run.stage.empty]) as mnt:
        got = run.loop("create", root=str(mnt), count=run.scale.ops)
    return {"create": got["create"], "rename.new": got["rename"], "unlink.new": got["unlink"]}


@workload("small files", [
    ("append.copyup", "append to a 1 KiB lower file (copies up)", "us"),
    ("rename.lower", "rename of a lower file", "us"),
    ("unlink.lower", "unlink of a lower file (whiteout)", "us"),
])  # fmt: skip
def change_lower(run: Run) -> dict[str, float]:
    need_cow(run.peer)
    with run.union([run.stage.small]) as mnt:
        got = run.loop(
            "change_lower", root=str(mnt), dirs=run.scale.dirs, files=run.scale.files, count=run.scale.ops
        )
    return {"append.copyup": got["append"], "rename.lower": got["rename"], "unlink.lower": got["unlink"]}


@workload("small files", [
    ("tar.x", "tar x of the source tree", "ms"),
    ("rm.new", "rm -rf of what tar wrote", "ms"),
])  # fmt: skip
def tar(run: Run) -> dict[str, float]:
    with run.union([run.stage.empty]) as mnt:
        unpack = 1000 * timed(["tar", "-xf", run.stage.tarball, "-C", mnt])
        remove = 1000 * timed(["rm", "-rf", mnt / "src"])
    return {"tar.x": unpack, "rm.new": remove}


@workload("small files", [("rm.lower", "rm -rf of a lower source tree", "ms")])
def remove_lower(run: Run) -> dict[str, float]:
    need_cow(run.peer)
    with run.union([run.stage.tree]) as mnt:
        return {"rm.lower": 1000 * timed(["rm", "-rf", mnt / "src"])}


@workload("growth", [
    ("dir1k.cold", "scandir+stat per entry, 1,000 entries, cold", "us"),
    ("dir10k.cold", "scandir+stat per entry, 10,000 entries, cold", "us"),
])  # fmt: skip
def directory_growth(run: Run) -> dict[str, float]:
    out = {}
    for label, count in (("1k", 1_000), ("10k", 10_000)):
        with run.union([run.stage.wide(count)], copy=False) as mnt:
            out[f"dir{label}.cold"] = run.loop("scans", root=str(mnt), dirs=["wide"], warm=1)[0]
    return out


@workload("growth", [(f"clients{n}.cold", f"stat, cold, {n} clients at once", "us") for n in (1, 2, 4, 8)])
def clients(run: Run) -> dict[str, float]:
    out = {}
    for count in (1, 2, 4, 8):
        with run.union([run.stage.small], copy=False) as mnt:
            out[f"clients{count}.cold"] = run.loop(
                "clients", root=str(mnt), dirs=run.scale.dirs, files=run.scale.files, count=count
            )
    return out
