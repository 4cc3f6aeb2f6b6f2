"""`python -m unionfs.front.resume STATE DEVICE JOURNAL`: go on with a mount whose supervisor became this program.

Run by a supervisor, never by people: by exec, so that it keeps its process id, its log and its descriptors. With
`--check` it says which journals it understands, which is asked before.
"""

from __future__ import annotations

import os
import sys

from unionfs.errors import EXIT_FAILURE, EXIT_OK

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    from unionfs.front.server import resume
    from unionfs.guard import state
    from unionfs.guard.journal import VERSION

    if list(argv) == ["--check"]:
        print(VERSION)
        return EXIT_OK
    kept, device, journal = (int(word) for word in argv)
    for fd in (kept, device, journal):
        os.set_inheritable(fd, False)
    try:
        return resume(state.load(kept), device, journal, kept, pins=True)
    except Exception:
        import traceback

        traceback.print_exc()
        from unionfs.session import mount

        mount.detach(state.load(kept).mountpoint, lazy=True)
        return EXIT_FAILURE


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
