"""The import table of docs/architecture.md holds, and the way to a ready mount imports nothing heavy."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGES = {"unionfs": ROOT / "unionfs", "unionfs_drivers": ROOT / "drivers"}
HEAVY = {
    "trio",
    "pyfuse3",
    "dataclasses",
    "typing",
    "enum",
    "logging",
    "importlib.metadata",
    "subprocess",
    "argparse",
    "json",
    "pathlib",
    "inspect",
    "tempfile",
    "shutil",
    "asyncio",
    "socket",
    "xattr",
}


def table() -> dict[str, set[str]]:
    """Room -> rooms that it may import, read from the table in docs/architecture.md."""
    text = (ROOT / "docs/architecture.md").read_text()
    rows = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 3 and cells[0].startswith("`"):
            rooms = [room(name) for name in re.findall(r"`([^`]+)`", cells[0]) if name not in ("unionfs_drivers",)]
            words = set(re.findall(r"[a-z_]+", cells[2]))
            for one in rooms:
                rows[one] = words
    return rows


def room(path: str) -> str:
    """`unionfs/wire/` -> wire, `errors.py` -> errors, `drivers/` -> drivers."""
    return path.removeprefix("unionfs/").rstrip("/").removesuffix(".py").split("/")[0]


def room_of(module: str) -> str | None:
    """The room that an imported module of ours belongs to; None for others and for the bare package."""
    parts = module.split(".")
    if parts[0] == "unionfs_drivers":
        return "drivers"
    if parts[0] == "unionfs" and len(parts) > 1:
        return parts[1]
    return None


def imports(path: Path) -> set[tuple[str, int]]:
    """(module, line) of every import in a file, local ones and those for type checkers included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {(alias.name, node.lineno) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if 0 < node.level < len(path.relative_to(ROOT).parts):
                continue  # a neighbour in the same room, or in a folder of it
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: relative import out of its folder"
            found |= {(f"{node.module}.{alias.name}", node.lineno) for alias in node.names}
    return found


def files() -> list[tuple[str, Path]]:
    found = []
    for top in PACKAGES.values():
        for path in sorted(top.rglob("*.py")):
            relative = path.relative_to(ROOT)
            where = "drivers" if relative.parts[0] == "drivers" else relative.parts[1].removesuffix(".py")
            found.append((where, path))
    return found


def allowed(rows: dict[str, set[str]], where: str) -> set[str]:
    words = rows[where]
    rooms = set(rows)
    if "all" in words:
        excluded = words & rooms if "but" in words else set()
        return rooms - excluded
    return (words & rooms) | {"api", "errors", where}


def test_table_names_every_room() -> None:
    rows = table()
    assert {where for where, _ in files()} - {"__init__"} <= set(rows), (
        "a folder that docs/architecture.md does not name"
    )
    assert {"core", "wire", "session", "drivers", "front", "sysio"} <= set(rows)


def test_import_table() -> None:
    rows = table()
    wrong = []
    for where, path in files():
        if where == "__init__":
            continue
        may = allowed(rows, where)
        for module, line in sorted(imports(path)):
            target = room_of(module)
            if target is not None and target in rows and target not in may:
                wrong.append(f"{path.relative_to(ROOT)}:{line}: {where} may not import {target}")
    assert wrong == []


def test_wire_does_no_io() -> None:
    for where, path in files():
        if where == "wire":
            banned = {name for name, _ in imports(path)} & {"os", "socket", "select", "fcntl", "threading", "io"}
            assert not banned, f"{path}: {banned}"


def loaded_by(*argv: object) -> set[str]:
    """The modules that a Python process imports while it runs to success, by -X importtime."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *map(str, argv)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}


def test_start_up_imports(tmp_path: Path) -> None:
    """Until the mount answers; what the interpreter's own start needs (an editable install's finder) is not ours."""
    for name in ("lower", "upper", "merged"):
        (tmp_path / name).mkdir()
    main = "from unionfs.front.cli import main; import sys; sys.exit(main())"
    layers = ["--lower", tmp_path / "lower", "--upper", tmp_path / "upper", tmp_path / "merged"]
    loaded = loaded_by("-c", main, "mount", "--session", "direct", *layers)
    try:
        assert {"unionfs.front.cli", "unionfs.core.ops", "unionfs_drivers.branches"} <= loaded
        assert (loaded - loaded_by("-c", "pass")) & HEAVY == set()
    finally:
        subprocess.run(["umount", tmp_path / "merged"], check=True)
