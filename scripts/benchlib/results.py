"""The samples of a run and what is said of them: medians, spreads, ratios. Saved as JSON."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from .registry import Row


class Results:
    def __init__(self, *, scale: str, rounds: int, machine: str, date: str) -> None:
        self.head: dict[str, Any] = {"scale": scale, "rounds": rounds, "machine": machine, "date": date}
        self.peers: dict[str, dict[str, Any]] = {}
        self.rows: dict[str, Row] = {}
        self.samples: dict[str, dict[str, list[float]]] = {}
        self.reasons: dict[str, dict[str, str]] = {}
        self.messages: dict[str, dict[str, dict[str, int]]] = {}  # workload, peer, request: how many in one sample

    def add_peer(self, key: str, label: str, version: str, options: str, missing: str | None) -> None:
        self.peers[key] = {"label": label, "version": version, "options": options, "missing": missing}

    def add_rows(self, rows: tuple[Row, ...]) -> None:
        for row in rows:
            self.rows[row.key] = row
            self.samples.setdefault(row.key, {})

    def add(self, row: str, peer: str, value: float) -> None:
        self.samples[row].setdefault(peer, []).append(value)

    def add_reason(self, rows: tuple[Row, ...], peer: str, text: str) -> None:
        for row in rows:
            self.reasons.setdefault(row.key, {})[peer] = text

    def median(self, row: str, peer: str) -> float | None:
        values = self.samples.get(row, {}).get(peer)
        return statistics.median(values) if values else None

    def spread(self, row: str, peer: str) -> float:
        """Half the distance between the quartiles, as a share of the median."""
        values = self.samples[row][peer]
        middle = statistics.median(values)
        if len(values) < 3 or not middle:
            return 0.0
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return (high - low) / 2 / middle

    def cost_ratio(self, row: str, peer: str, base: str) -> float | None:
        """How many times the base's cost: above 1 is worse, whichever way the row counts."""
        mine, theirs = self.median(row, peer), self.median(row, base)
        if not mine or not theirs:
            return None
        return theirs / mine if self.rows[row].better == "higher" else mine / theirs

    def present(self) -> list[str]:
        return [key for key, peer in self.peers.items() if not peer["missing"]]

    def save(self, path: Path) -> None:
        rows = {
            row.key: {
                "title": row.title, "unit": row.unit, "group": row.group, "better": row.better,
                "median": {p: self.median(row.key, p) for p in self.samples[row.key]},
                "spread": {p: round(self.spread(row.key, p), 4) for p in self.samples[row.key]},
                "samples": {p: [round(v, 4) for v in vs] for p, vs in self.samples[row.key].items()},
                "reasons": self.reasons.get(row.key, {}),
            }
            for row in self.rows.values()
        }  # fmt: skip
        everything = {**self.head, "peers": self.peers, "rows": rows, "messages": self.messages}
        path.write_text(json.dumps(everything, indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Results:
        data = json.loads(path.read_text())
        self = cls(**{k: data[k] for k in ("scale", "rounds", "machine", "date")})
        self.peers = data["peers"]
        self.messages = data["messages"]
        for key, row in data["rows"].items():
            self.rows[key] = Row(key, row["title"], row["unit"], row["group"], row["better"])
            self.samples[key] = row["samples"]
            self.reasons[key] = row["reasons"]
        return self
