"""Charts as hand-made SVG, without a library: bars of ratios on a log scale, and lines of growth."""

from __future__ import annotations

import math
from html import escape

from .results import Results

COLOURS = {
    "native": "#8a8a8a", "kernel": "#4c78a8", "fuse-overlayfs": "#f58518", "mergerfs": "#54a24b",
    "unionfs-fuse": "#b279a2", "ours": "#e02b35",
}  # fmt: skip
SPARE = ["#72b7b2", "#eeca3b", "#9d755d", "#ff9da6", "#79706e", "#d67195"]
BAR, GAP, LABEL, PLOT = 7, 9, 330, 560


def colours(keys: list[str]) -> dict[str, str]:
    spare = iter(SPARE * 3)
    return {k: COLOURS.get(k) or next(spare) for k in keys}


def page(width: float, height: float, body: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" font-family="sans-serif" font-size="11">\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(body) + "\n</svg>\n"
    )


def text(x: float, y: float, what: str, anchor: str = "start", **style: str) -> str:
    more = "".join(f' {k.replace("_", "-")}="{v}"' for k, v in style.items())
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222"{more}>{escape(what)}</text>'


def legend(results: Results, keys: list[str], tint: dict[str, str], x: float, y: float) -> list[str]:
    out = []
    for key in keys:
        label = results.peers[key]["label"]
        out.append(f'<rect x="{x:.1f}" y="{y - 9:.1f}" width="11" height="11" fill="{tint[key]}"/>')
        out.append(text(x + 15, y, label))
        x += 34 + 6.2 * len(label)
    return out


def ratios(results: Results) -> str:
    """For each row, one bar per union: cost against the native directory, or the kernel's overlayfs where there is
    no native figure. Left of the line is cheaper, right is dearer, each grid line a factor."""
    shown = [p for p in results.present() if p in COLOURS and p != "native"] or results.present()
    tint = colours(shown)
    lines = []
    for row in results.rows.values():
        base = next((b for b in ("native", "kernel") if results.median(row.key, b)), None)
        if base:
            bars = [(p, r) for p in shown if p != base and (r := results.cost_ratio(row.key, p, base))]
            lines.append((row, base, bars))
    values = [r for _, _, bars in lines for _, r in bars] or [1.0]
    low, high = math.log10(min(0.5, *values)), math.log10(max(2.0, *values))

    def place(ratio: float) -> float:
        return LABEL + PLOT * (math.log10(ratio) - low) / (high - low)

    body = [text(10, 20, "Cost against the native directory (log scale; shorter is better)", font_size="14")]
    body += legend(results, shown, tint, 10, 42)
    top = y = 62.0
    group = ""
    for row, base, bars in lines:
        if row.group != group:
            group = row.group
            y += 8
            body.append(text(10, y + 8, group.capitalize(), font_weight="bold"))
            y += 16
        note = row.title if base == "native" else f"{row.title} [against kernel]"
        body.append(text(LABEL - 8, y + max(len(bars), 1) * BAR / 2 + 3, note, "end"))
        for peer, ratio in bars:
            a, b = sorted((place(1.0), place(ratio)))
            body.append(
                f'<rect x="{a:.1f}" y="{y:.1f}" width="{max(b - a, 1):.1f}" height="{BAR - 1}" fill="{tint[peer]}">'
                f"<title>{escape(results.peers[peer]['label'])}: {ratio:.2f} x</title></rect>"
            )
            y += BAR
        y += GAP
    grid = []
    for power in range(math.floor(low), math.ceil(high) + 1):
        for step in (1, 2, 5):
            ratio = step * 10.0**power
            if low <= math.log10(ratio) <= high:
                x = place(ratio)
                colour = "#222" if ratio == 1 else "#ddd"
                grid.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{y:.1f}" stroke="{colour}"/>')
                grid.append(text(x, y + 12, f"{ratio:g}x", "middle"))
    return page(LABEL + PLOT + 30, y + 24, [*grid, *body])


PLOTS = [
    ("cold stat by number of lowers (us)", [(1, "lowers1.cold"), (10, "lowers10.cold"), (128, "lowers128.cold")]),
    ("cold stat by clients at once (us)", [(n, f"clients{n}.cold") for n in (1, 2, 4, 8)]),
    ("cold listing by size of directory (us per entry)", [
        (1_000, "dir1k.cold"), (10_000, "dir10k.cold"), (100_000, "wide.cold"),
    ]),
]  # fmt: skip


def growth(results: Results) -> str:
    """Small multiples, both axes logarithmic: how a row's cost moves as its load grows."""
    keys = [p for p in results.present() if p in COLOURS] or results.present()
    tint = colours(keys)
    body = [*legend(results, keys, tint, 10, 18)]
    for i, (title, points) in enumerate(PLOTS):
        body += _plot(results, keys, tint, 50 + 330 * i, title, points)
    return page(1000, 290, body)


def _plot(
    results: Results, keys: list[str], tint: dict[str, str], left: float, title: str, points: list[tuple[int, str]]
) -> list[str]:
    series = {k: [(n, v) for n, row in points if (v := results.median(row, k))] for k in keys}
    values = [v for line in series.values() for _, v in line]
    body = [text(left, 48, title, font_weight="bold")]
    if not values:
        return [*body, text(left, 80, "not measured in this run")]
    top, height, width = 60, 190, 260
    x_low, x_high = math.log10(points[0][0]), math.log10(points[-1][0])
    y_low, y_high = math.log10(min(values) / 1.2), math.log10(max(values) * 1.2)

    def at(n: float, v: float) -> tuple[float, float]:
        return (
            left + width * (math.log10(n) - x_low) / (x_high - x_low),
            top + height * (y_high - math.log10(v)) / (y_high - y_low),
        )

    for n, _ in points:
        x, _y = at(n, values[0])
        body.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top}" y2="{top + height}" stroke="#ddd"/>')
        body.append(text(x, top + height + 14, f"{n:,}", "middle"))
    for power in range(math.floor(y_low), math.ceil(y_high) + 1):
        for step in (1, 2, 5):
            v = step * 10.0**power
            if y_low <= math.log10(v) <= y_high:
                _x, y = at(points[0][0], v)
                body.append(f'<line x1="{left}" x2="{left + width}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
                body.append(text(left - 5, y + 4, f"{v:g}", "end"))
    for key, line in series.items():
        if line:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(n, v) for n, v in line))
            body.append(f'<polyline points="{path}" fill="none" stroke="{tint[key]}" stroke-width="2"/>')
    return body
