"""Results as text: the table in markdown, and the ratios that the project demands of itself."""

from __future__ import annotations

from .registry import Row
from .results import Results

# (what, rows, ours against, at most): issue numbers change, the demands do not. A list of keys as "against" means the
# fastest of those present; "@row" means another row of ours.
DEMANDS: list[tuple[str, list[str], list[str], float]] = [
    ("foundation: no slower than fuse-overlayfs", [
        "negative.cold", "stat.cold", "read.cold", "read.warm", "scandir.cold", "create", "unlink.lower",
        "append.copyup",
    ], ["fuse-overlayfs"], 1.0),
    ("warm: at most 1.1 x kernel overlayfs", [
        "stat.warm", "negative.warm", "scandir.warm", "read.warm",
    ], ["kernel"], 1.1),
    ("cold: at most 0.9 x fuse-overlayfs", [
        "stat.cold", "negative.cold", "read.cold", "scandir.cold", "wide.cold", "find.cold", "git.cold", "deep.cold",
        "lowers1.cold", "lowers10.cold", "lowers128.cold", "append.copyup", "unlink.lower", "rename.lower", "rm.lower",
    ], ["fuse-overlayfs"], 0.9),
    ("writing: at most 1.0 x fuse-overlayfs", ["create", "tar.x", "rm.new"], ["fuse-overlayfs"], 1.0),
    ("data: at most 1 / 0.9 x native", [
        "seqread.cold", "seqread.warm", "randread", "seqread.mmap", "randread.mmap",
        "up.seqread", "up.randread", "up.seqwrite", "up.randwrite", "up.seqwrite.mmap", "up.randwrite.mmap",
    ], ["native"], 1 / 0.9),
    ("128 lowers: at most 1.2 x 1 lower", ["lowers128.cold"], ["@lowers1.cold"], 1.2),
]  # fmt: skip
# Of the aufs driver: ahead of the other unions with branches; flat in their number; placement costs lookups nothing.
_METADATA = [
    "stat.cold", "stat.warm", "negative.cold", "negative.warm", "read.cold", "read.warm",
    "scandir.cold", "scandir.warm", "wide.cold", "wide.warm",
    "find.cold", "find.warm", "git.cold", "git.warm", "deep.cold", "deep.warm",
    "lowers1.cold", "lowers10.cold", "lowers128.cold",
]  # fmt: skip
_SMALL_FILES = [
    "create", "rename.new", "unlink.new", "append.copyup", "rename.lower", "unlink.lower",
    "tar.x", "rm.new", "rm.lower",
]  # fmt: skip
AUFS_DEMANDS: list[tuple[str, list[str], list[str], float]] = [
    *(
        (f"aufs: ahead of {peer}", _METADATA + _SMALL_FILES, [peer], 1.0)
        for peer in ("mergerfs", "unionfs-fuse")
    ),
    *(
        (f"aufs: flat from 2 to {count} branches", [f"{row}.branches{count}"], [f"@{row}.branches2"], 1.2)
        for row in ("stat", "negative", "create") for count in (16, 64)
    ),
    ("aufs: mfs over two writable branches costs lookups nothing", [
        "stat.cold", "negative.cold", "read.cold",
    ], ["ours-aufs-mfs"], 1.05),
]  # fmt: skip
# Of the row driver, against what copies. docs/row-format.md says what the disk's syncs leave of the last ones.
ROW_DEMANDS: list[tuple[str, list[str], list[str], float]] = [
    ("row: random writes at least 0.5 x the overlay driver's", ["big.randwrite"], ["ours"], 2.0),
    ("row: half-redirected, read at 0.7 x of plain", ["half.seqread"], ["@half.plain"], 1 / 0.7),
    *(
        demand for peer in ("kernel", "fuse-overlayfs") for demand in (
            (f"row: first write 200 x faster than {peer}", ["firstwrite.cold"], [peer], 1 / 200),
            (f"row: 1,000 commits 10 x faster than {peer}", ["db.delete", "db.wal", "db.walnormal"], [peer], 0.1),
        )
    ),
]  # fmt: skip
BOUNDS: list[tuple[str, float]] = [
    ("ready", 80), ("rss.idle", 20), ("rss.inode", 400), ("wakeups", 0), ("copyup.p99", 2),
]  # fmt: skip
# (the least load, the most): between them a row must not grow faster than fuse-overlayfs's
GROWTH = [("lowers1.cold", "lowers128.cold"), ("clients1.cold", "clients8.cold"), ("dir1k.cold", "dir10k.cold")]
CHECK_ROWS = sorted(
    {r for _, rows, _, _ in DEMANDS + AUFS_DEMANDS + ROW_DEMANDS for r in rows}
    | {r for r, _ in BOUNDS}
    | {r for rows in GROWTH for r in rows}
    | {"stat.branches2", "half.plain"}
)


def number(value: float) -> str:
    """Three significant digits, no exponents."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def cell(results: Results, row: Row, peer: str) -> str:
    value = results.median(row.key, peer)
    if value is None:
        reason = results.reasons.get(row.key, {}).get(peer, "")
        return "failed" if reason.startswith("failed") else "n/a" if reason else "-"
    spread = round(100 * results.spread(row.key, peer))
    return f"{number(value)} ±{spread}%"


def table(results: Results) -> str:
    present = results.present()
    best = {key: best_peer(results, key) for key in results.rows}
    lines = []
    group = ""
    for row in results.rows.values():
        if row.group != group:
            group = row.group
            lines += [
                "", f"### {group.capitalize()}", "",
                "| row | unit | " + " | ".join(results.peers[p]["label"] for p in present) + " |",
                "|---|---|" + "---:|" * len(present),
            ]  # fmt: skip
        cells = [cell(results, row, p) for p in present]
        cells = [f"**{c}**" if p == best[row.key] else c for p, c in zip(present, cells, strict=True)]
        unit = f"{row.unit} ↑" if row.better == "higher" else row.unit
        lines.append(f"| {row.title} | {unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines).lstrip("\n") + "\n"


def best_peer(results: Results, row: str) -> str:
    """The fastest union in user space (the native directory and the kernel's overlayfs are the yardsticks)."""
    unions = [p for p in results.present() if p not in ("native", "kernel") and results.median(row, p) is not None]
    higher = results.rows[row].better == "higher"
    return (max if higher else min)(unions, key=lambda p: results.median(row, p) or 0.0, default="")


def document(results: Results) -> str:
    """table.md: head, peers, table, what could not be measured."""
    head = results.head
    lines = [
        f"Measured on {head['date']}: {head['machine']}; scale {head['scale']}, median of {head['rounds']} interleaved "
        "rounds ± half the distance between the quartiles.",
        "Lower is better except where the unit has ↑. Bold: the fastest union in user space.",
        "Layers' metadata and data were in memory before each sample (warm-up: one pass of `find` over the layers);",
        "*cold* means the first pass over a freshly made mount, *warm* the best of the next passes.",
        "",
        "| peer | version | options |",
        "|---|---|---|",
    ]
    for peer in results.peers.values():
        version = f"**missing: {peer['missing']}**" if peer["missing"] else peer["version"]
        lines.append(f"| {peer['label']} | {version} | `{peer['options']}` |")
    text = "\n".join(lines) + "\n\n" + table(results)
    reasons = sorted(
        {(results.peers[p]["label"], why, row.group if why.startswith("n/a") else row.title)
         for row in results.rows.values() for p, why in results.reasons.get(row.key, {}).items()}
    )  # fmt: skip
    if reasons:
        text += "\n### Not measured\n\n" + "".join(f"- {label}, {where}: {why}\n" for label, why, where in reasons)
    return text + messages(results)


def messages(results: Results, peer: str = "ours") -> str:
    """What one sample of each workload asked of our server."""
    rows = [(work, counts[peer]) for work, counts in results.messages.items() if peer in counts]
    if not rows:
        return ""
    lines = ["", "### Messages of one sample", "", "| workload | messages | of these |", "|---|---:|---|"]
    for work, counts in rows:
        most = sorted(counts.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{name} {count:,}" for name, count in most if count > 2)
        lines.append(f"| {work} | {sum(counts.values()):,} | {shown} |")
    return "\n".join(lines) + "\n"


def check(results: Results, peer: str = "ours") -> str:
    """Each demand with its figure. Judges nothing: a reader does, knowing the machine."""
    lines = ["| demand | row | unionfs | against | ratio | at most | |", "|---|---|---:|---:|---:|---:|---|"]
    for what, rows, against, limit in DEMANDS:
        for key in rows:
            if key in results.rows:
                lines.append(_demand(results, peer, what, key, against[0], limit))
    for what, rows, against, limit in AUFS_DEMANDS:
        for key in rows:
            if key in results.rows and "ours-aufs" in results.present():
                lines.append(_demand(results, "ours-aufs", what, key, against[0], limit))
    for what, rows, against, limit in ROW_DEMANDS:
        for key in rows:
            if key in results.rows and "ours-row" in results.present():
                lines.append(_demand(results, "ours-row", what, key, against[0], limit))
    for least, most in GROWTH:
        mine, theirs = _growth(results, peer, least, most), _growth(results, "fuse-overlayfs", least, most)
        if mine and theirs:
            lines.append(_growth_line(results, most, mine, theirs))
    for key, bound in BOUNDS:
        value = results.median(key, peer)
        if value is not None:
            row = results.rows[key]
            mark = "ok" if value <= bound else "OVER"
            lines.append(f"| bound | {row.title} | {number(value)} {row.unit} | | | {bound} {row.unit} | {mark} |")
    return "\n".join(lines) + "\n"


def _growth(results: Results, peer: str, least: str, most: str) -> float | None:
    first, last = results.median(least, peer), results.median(most, peer)
    return last / first if first and last else None


def _growth_line(results: Results, most: str, mine: float, theirs: float) -> str:
    ratio = mine / theirs
    mark = "ok" if ratio <= 1 else "OVER"
    return (
        f"| growth: no faster than fuse-overlayfs | {results.rows[most].title} | {mine:.2f} x | {theirs:.2f} x "
        f"| {ratio:.2f} | 1.00 | {mark} |"
    )


def _demand(results: Results, peer: str, what: str, key: str, against: str, limit: float) -> str:
    row = results.rows[key]
    mine = results.median(key, peer)
    if against.startswith("@"):
        theirs = results.median(against[1:], peer)
        ratio = mine / theirs if mine and theirs else None
        if ratio and row.better == "higher":
            ratio = 1 / ratio
    else:
        theirs, ratio = results.median(key, against), results.cost_ratio(key, peer, against)
    if ratio is None or mine is None or theirs is None:
        return f"| {what} | {row.title} | {cell(results, row, peer)} | | - | {limit:.2f} | not measured |"
    mark = "ok" if ratio <= limit else "OVER"
    return (
        f"| {what} | {row.title} | {number(mine)} {row.unit} | {number(theirs)} | {ratio:.3g} | {limit:.3g} | {mark} |"
    )
