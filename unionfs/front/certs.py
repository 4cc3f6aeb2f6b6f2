"""`unionfs certs create`: certificates for a daemon on a tcp socket, and for its clients."""

from __future__ import annotations

from unionfs.errors import EXIT_OK, EXIT_USAGE, MountError
from unionfs.front.args import Command, Option, Parsed
from unionfs.session.mount import show

COMMAND = Command(
    "unionfs certs",
    "Makes a CA, a certificate for the daemon and one for its clients, for `unionfs daemon --tlsverify`.",
    [
        Option(
            "--host", "name or address that clients reach the daemon by; may be repeated (default: this host)", "HOST"
        ),
        Option("--days", "how long they are valid (default 365)", "DAYS"),
        Option("--force", "replace files that are there"),
    ],
    "create DIR",
    2,
    2,
    epilog="""\
Five files: ca.pem; server-cert.pem, server-key.pem for the daemon; cert.pem, key.pem for its clients. The CA's key is
not kept: for another client give it the same pair, or make a new set.
  unionfs certs create /etc/unionfs/tls --host build.example.org --host 10.0.0.7""",
)


def run(parsed: Parsed) -> int:
    verb, directory = parsed.arguments
    if verb != "create":
        raise MountError(f"certs: unknown verb {verb!r}: unionfs certs create DIR", EXIT_USAGE)
    days = parsed.get("days", "365")
    if not (days.isascii() and days.isdigit() and int(days) > 0):
        raise MountError(f"certs: --days {days}: must be a number of days", EXIT_USAGE)
    try:
        from unionfs.daemon.certs import create
    except ModuleNotFoundError as error:
        raise MountError(f"certs: the Python package {error.name} is missing: pip install 'unionfs[daemon]'") from None
    for path in create(directory, parsed.all("host"), int(days), "force" in parsed):
        print(show(path.encode("utf-8", "surrogateescape")))
    return EXIT_OK
