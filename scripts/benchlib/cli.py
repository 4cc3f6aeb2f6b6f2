"""The command line: chooses peers and rows, interleaves the samples, hands the results to the reports."""

from __future__ import annotations

import argparse
import fnmatch
import os
import platform
import sys
import time
from pathlib import Path

from . import (  # noqa: F401  (rows register themselves)
    chart,
    report,
    rows_branches,
    rows_cost,
    rows_data,
    rows_jobs,
    rows_names,
    rows_redirect,
)
from .peers import QUICK_PEERS, ROOT, FuseOverlayfs, Ours, Peer, known
from .progress import Bar
from .registry import LONG, NORMAL, QUICK, WORKLOADS, Skip, Workload
from .results import Results
from .run import Run
from .stage import Stage, stage_root


def main(argv: list[str]) -> int:
    args = parse(argv)
    if args.from_json:
        results = Results.load(args.from_json)
        if args.out:
            write(results, args.out)
        if args.check:
            sys.stdout.write(report.check(results))
        return 0
    if os.geteuid():
        sys.exit("bench: mounting every peer needs root")
    everyone = known()
    everyone += [FuseOverlayfs(path, key) for key, path in pairs(args.fuse_overlayfs)]
    everyone += [Ours(key, "direct", "auto", path) for key, path in pairs(args.unionfs)]
    peers = choose_peers(everyone, args)
    todo = choose_rows(args)
    scale = LONG if args.all else QUICK if args.quick else NORMAL
    rounds = args.rounds or (3 if args.quick else 5)
    results = Results(
        scale=scale.name, rounds=rounds, date=time.strftime("%Y-%m-%d"),
        machine=f"{os.cpu_count()} CPUs, Linux {platform.release()}, Python {platform.python_version()}, layers on "
        + ("an ext4 in memory" if args.ram else "the disk"),
    )  # fmt: skip
    with stage_root(args.dir, args.ram) as place:
        measure(results, peers, todo, rounds, Stage(place, scale))
    if args.out:
        write(results, args.out)
    sys.stdout.write(report.check(results) if args.check else report.table(results))
    return 0


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every row at a small scale, in a few minutes")
    parser.add_argument("--all", action="store_true", help="long scale: 2 GiB copy-ups, a million inodes")
    parser.add_argument("--rows", metavar="GLOB", help="only rows whose key matches (comma-separated)")
    parser.add_argument("--peers", metavar="A,B", help="only these, of: " + ", ".join(p.key for p in known()))
    parser.add_argument("--rounds", type=int, metavar="N", help="samples of each row (default 5; 3 with --quick)")
    parser.add_argument("--fuse-overlayfs", action="append", default=[], metavar="KEY=PATH",
                        help="another fuse-overlayfs to compare with")  # fmt: skip
    parser.add_argument("--unionfs", action="append", default=[], metavar="KEY=PATH",
                        help="another build of unionfs to compare with: its `unionfs` command")  # fmt: skip
    parser.add_argument("--dir", type=Path, help="where to build the layers: a new directory on a disk filesystem")
    parser.add_argument("--ram", action="store_true",
                        help="layers on an ext4 in memory: less noise of a busy disk, no cost of syncing")  # fmt: skip
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="where to write JSON, table and charts (a whole run: docs/benchmarks)")  # fmt: skip
    parser.add_argument("--check", action="store_true", help="print the ratios that the project demands of itself")
    parser.add_argument("--from-json", type=Path, metavar="FILE", help="report on an earlier run instead of measuring")
    args = parser.parse_args(argv)
    if args.out is None and not (args.quick or args.rows or args.peers or args.from_json):
        args.out = ROOT / "docs" / "benchmarks"  # a whole run is worth keeping
    if args.dir and args.dir.exists():
        parser.error(f"{args.dir} exists")
    return args


def pairs(options: list[str]) -> list[tuple[str, str]]:
    return [(key, path) for key, _, path in (option.partition("=") for option in options)]


def choose_peers(everyone: list[Peer], args: argparse.Namespace) -> list[Peer]:
    if args.peers:
        wanted = args.peers.split(",")
        unknown = set(wanted) - {p.key for p in everyone}
        if unknown:
            sys.exit(f"bench: no such peer: {', '.join(sorted(unknown))}")
        return [p for p in everyone if p.key in wanted]
    if args.quick:
        extra = {key for key, _ in pairs(args.fuse_overlayfs + args.unionfs)}
        return [p for p in everyone if p.key in QUICK_PEERS or p.key in extra]
    return everyone


def choose_rows(args: argparse.Namespace) -> list[Workload]:
    globs = args.rows.split(",") if args.rows else report.CHECK_ROWS if args.check else ["*"]
    todo = [w for w in WORKLOADS if any(fnmatch.fnmatch(r.key, g) for r in w.rows for g in globs)]
    if not args.rows:
        todo = [w for w in todo if args.all or not w.long]
    if not todo:
        sys.exit(f"bench: no row matches {args.rows}")
    return todo


def measure(results: Results, peers: list[Peer], todo: list[Workload], rounds: int, stage: Stage) -> None:
    present = []
    for peer in peers:
        missing = peer.missing()
        results.add_peer(peer.key, peer.label, "" if missing else peer.version(), peer.options, missing)
        if not missing:
            present.append(peer)
    runs = {peer.key: Run(peer, stage) for peer in present}
    bar = Bar(len(todo) * len(present) * rounds)
    try:
        for work in todo:
            results.add_rows(work.rows)
            given_up: set[str] = set()
            # A B C A B C: a disturbance of the machine meets every peer, not one.
            for turn in range(rounds):
                for peer in present:
                    runs[peer.key].messages = {} if turn == 0 else None
                    bar.say(f"{work.name} {peer.label}")
                    if peer.key not in given_up and not sample(results, bar, work, runs[peer.key]):
                        given_up.add(peer.key)
                    bar.step()
    finally:
        bar.close()
        stage.remove()


def sample(results: Results, bar: Bar, work: Workload, run: Run) -> bool:
    """One sample into the results; False when this peer need not be asked again."""
    try:
        got = work.function(run)
    except Skip as skip:
        results.add_reason(work.rows, run.peer.key, f"n/a: {skip}")
        return False
    except Exception as problem:
        text = " ".join(str(problem).split()) or type(problem).__name__
        bar.note(f"{work.name}, {run.peer.label}: {text}")
        results.add_reason(work.rows, run.peer.key, f"failed: {text[:160]}")
        return False
    for key, value in got.items():
        results.add(key, run.peer.key, value)
    if run.messages:
        results.messages.setdefault(work.name, {})[run.peer.key] = run.messages
    return True


def write(results: Results, out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    results.save(out / "results.json")
    (out / "table.md").write_text(report.document(results))
    (out / "ratios.svg").write_text(chart.ratios(results))
    (out / "growth.svg").write_text(chart.growth(results))
    sys.stderr.write(f"written: {out}/results.json, table.md, ratios.svg, growth.svg\n")
