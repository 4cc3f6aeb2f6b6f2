"""`unionfs fsck`: the chain of a row upper, its layers and its clones, checked while nothing has it mounted."""

from __future__ import annotations

import os

from unionfs.errors import MountError

from . import chain as chains
from .chain import Chain
from .check import Finding


def check_chain(upper: bytes, repair: bool) -> list[Finding]:
    """Snapshot links: layers that are missing, left over, or kept for nobody."""
    root = os.open(upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        chain = Chain.load(root)
        kept = [*_layers(upper, chain), *_base(upper, chain)]
        return [*kept, *_clones(upper, chain, repair), *_left(upper, chain, repair)]
    except MountError as e:
        return [Finding(os.path.join(upper, chains.CHAIN), str(e), True)]
    finally:
        os.close(root)


def _layers(upper: bytes, chain: Chain) -> list[Finding]:
    findings = []
    for number in sorted(chain.parents):
        if os.access(chain.path(number), os.F_OK, dir_fd=chain.root, follow_symlinks=False):
            continue
        path = os.path.join(upper, chain.path(number))
        names = [s.name for s in chain.snapshots if number in chain.stack(s.layer)]
        if number == chain.top and not names:
            findings.append(Finding(path, "the newest layer is missing: it will begin empty", False))
        else:
            which = f"snapshots {', '.join(names)}" if names else "the present"
            findings.append(Finding(path, f"the layer is missing, which {which} need", True))
    return findings


def _base(upper: bytes, chain: Chain) -> list[Finding]:
    base = chain.base
    if base is None:
        return []
    try:
        root = os.open(base.upper, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as e:
        return [Finding(upper, f"is a clone of {os.fsdecode(base.upper)}: {e.strerror}", True)]
    try:
        original = Chain.load(root)
    except MountError as e:
        return [Finding(upper, f"is a clone: {e}", True)]
    finally:
        os.close(root)
    if original.id != base.id or base.layer not in original.parents:
        return [Finding(upper, f"is a clone of {os.fsdecode(base.upper)}, which has lost what it stands on", True)]
    return []


def _clones(upper: bytes, chain: Chain, repair: bool) -> list[Finding]:
    findings = []
    for ident, path, layer in chains.clones(chain.root):
        if layer not in chain.parents:
            findings.append(Finding(path, f"a clone that stands on layer {layer}, which is gone", True))
        elif not chains.is_alive(ident, path):
            if repair:
                os.unlink(chains.CLONES + b"/" + ident.encode(), dir_fd=chain.root)
            words = "a clone that is not there any more, for which layers are kept"
            findings.append(Finding(path, words, False, repair))
    return findings


def _left(upper: bytes, chain: Chain, repair: bool) -> list[Finding]:
    from .snapshot import discard

    findings = []
    for path in chains.leftovers(chain):
        if repair:
            discard(chain.root, path)
        findings.append(Finding(os.path.join(upper, path), "belongs to no snapshot", False, repair))
    return findings
