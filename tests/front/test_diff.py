"""`unionfs diff` and `which` on a real mount, and the layer that a changed tree becomes."""

from __future__ import annotations

import json
import os
import subprocess
import tarfile
from pathlib import Path

from support.commands import Place


def apply_layer(layer: Path, tree: Path) -> None:
    """What an engine does with a layer: whiteouts first, then the members."""
    with tarfile.open(layer) as tar:
        members = tar.getmembers()
        for member in members:
            parent, name = os.path.split(member.name)
            if name.startswith(".wh."):
                subprocess.run(["rm", "-rf", tree / parent / name.removeprefix(".wh.")], check=True)
        for member in members:
            if not os.path.basename(member.name).startswith(".wh."):
                target = tree / member.name
                if target.is_symlink() or (target.exists() and target.is_dir() != member.isdir()):
                    subprocess.run(["rm", "-rf", target], check=True)
                tar.extract(member, tree)


def names_and_contents(tree: Path) -> dict[str, str]:
    found = {}
    for path in sorted(tree.rglob("*")):
        kind = "link " + os.readlink(path) if path.is_symlink() else "dir" if path.is_dir() else path.read_text()
        found[str(path.relative_to(tree))] = kind
    return found


def build(place: Place) -> None:
    for name in ("b/x", "c/y", "gone/deep/z", "opaque/old", "opaque/same", "kind/inside", "meta", "other"):
        path = place.lower / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def change(merged: Path) -> None:
    (merged / "b/x").unlink()
    os.rename(merged / "c", merged / "b")  # over a directory that is empty here, and not below
    subprocess.run(["rm", "-r", merged / "gone", merged / "opaque", merged / "kind"], check=True)
    (merged / "opaque").mkdir()
    (merged / "opaque/same").write_text("new")
    (merged / "kind").write_text("a file now")
    os.chmod(merged / "meta", 0o600)
    (merged / "n/deep").mkdir(parents=True)
    (merged / "n/deep/f").write_text("f")
    os.symlink("deep/f", merged / "n/l")
    os.rename(merged / "other", merged / "renamed")


def test_diff(place: Place) -> None:
    build(place)
    place.mount()
    change(place.merged)
    done = place.run("diff", "--json", place.merged)
    rows = [(row["kind"], row["path"]) for row in json.loads(done.stdout)]
    assert rows == [
        ("C", "/b"), ("D", "/b/x"), ("A", "/b/y"), ("D", "/c"), ("D", "/gone"), ("C", "/kind"), ("C", "/meta"),
        ("A", "/n"), ("A", "/n/deep"), ("A", "/n/deep/f"), ("A", "/n/l"), ("C", "/opaque"), ("D", "/opaque/old"),
        ("C", "/opaque/same"), ("D", "/other"), ("A", "/renamed"),
    ]  # fmt: skip
    assert place.run("diff", place.merged).stdout == "".join(f"{kind} {path}\n" for kind, path in rows)
    place.umount()


def test_the_layer_makes_the_lower_the_merged_tree(place: Place) -> None:
    build(place)
    before = names_and_contents(place.lower)
    place.mount()
    change(place.merged)
    merged = names_and_contents(place.merged)
    layer = place.base / "layer.tar"
    done = place.run("diff", "--tar", layer, place.merged)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    place.umount()
    assert names_and_contents(place.lower) == before
    apply_layer(layer, place.lower)
    assert names_and_contents(place.lower) == merged
    assert (place.lower / "meta").stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(place.base)) == ["layer.tar", "lower", "merged", "upper", "work"]


def test_which(place: Place) -> None:
    build(place)
    place.mount()
    (place.merged / "b/x").write_text("changed")
    (place.merged / "meta").unlink()
    rows = json.loads(place.run("which", "--json", place.merged / "b/x").stdout)
    assert [(row["state"], row["path"]) for row in rows] == [
        ("shown", f"{place.upper}/b/x"), ("shadowed", f"{place.lower}/b/x"),
    ]  # fmt: skip
    rows = json.loads(place.run("which", "--json", place.merged / "meta").stdout)
    assert [row["state"] for row in rows] == ["whiteout", "shadowed"]
    assert f"{place.lower}/b/x" in place.run("which", place.merged / "b/x").stdout
    done = place.run("which", place.merged / "never")
    assert done.returncode == 1 and "No such file" in done.stderr and done.stderr.count("\n") == 1
    place.umount()
