"""A command line as a table: parsing, help texts and completion all come from the same rows.

Instead of argparse, whose import alone takes 7 of the 45 ms that a mount may take. Understands what getopt_long
does: `--name value`, `--name=value`, `-o value`, `-ovalue`, `-fd`, `--`, options after arguments. No I/O.
"""

from __future__ import annotations

from unionfs.errors import EXIT_USAGE, MountError, nearest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence


class Option:
    """One row: `flags` like "-o" or "-d --debug" (the last one names it), `metavar` if it takes a value."""

    __slots__ = ("choices", "flags", "help", "metavar", "name")

    def __init__(self, flags: str, help: str, metavar: str = "", choices: tuple[str, ...] = ()) -> None:
        self.flags = flags.split()
        self.name = self.flags[-1].lstrip("-")
        self.help = help
        self.metavar = metavar
        self.choices = choices


class Command:
    """A command: its options, its arguments as people read them ("MOUNTPOINT"), how many, and its prose."""

    __slots__ = ("arguments", "epilog", "maximum", "minimum", "name", "options", "summary")

    def __init__(
        self,
        name: str,
        summary: str,
        options: Sequence[Option] = (),
        arguments: str = "",
        minimum: int = 0,
        maximum: int = 0,
        epilog: str = "",
    ) -> None:
        self.name = name
        self.summary = summary
        self.options = [*options, HELP]
        self.arguments = arguments
        self.minimum = minimum
        self.maximum = maximum
        self.epilog = epilog


class Parsed:
    """What was given: for each option the list of its values ("" for a bare flag), and the arguments in order."""

    __slots__ = ("arguments", "given")

    def __init__(self) -> None:
        self.given: dict[str, list[str]] = {}
        self.arguments: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self.given

    def get(self, name: str, default: str = "") -> str:
        return self.given[name][-1] if name in self.given else default

    def all(self, name: str) -> list[str]:
        return self.given.get(name, [])


HELP = Option("-h --help", "show this help")


def usage_error(message: str) -> MountError:
    return MountError(message, EXIT_USAGE)


def parse(command: Command, argv: Sequence[str]) -> Parsed:
    """Raises `MountError` (usage) for what the table doesn't know. `--help` ends parsing: look for "help"."""
    by_flag = {flag: option for option in command.options for flag in option.flags}
    result = Parsed()
    position, count, options_ended = 0, len(argv), False
    while position < count:
        word = argv[position]
        position += 1
        if options_ended or word == "-" or not word.startswith("-"):
            result.arguments.append(word)
            continue
        if word == "--":
            options_ended = True
            continue
        if word.startswith("--"):
            flag, has_value, value = word.partition("=")
            rest = ""
        else:
            flag, value, rest = word[:2], word[2:], ""
            has_value = value
        option = by_flag.get(flag)
        if option is None:
            raise usage_error(
                f"{command.name}: unknown option {flag}{nearest(flag, list(by_flag))} (see {command.name} --help)"
            )
        if option.metavar:
            if not has_value:
                if position == count:
                    raise usage_error(f"{command.name}: {flag} needs a value: {flag} {option.metavar}")
                value = argv[position]
                position += 1
            if option.choices and value not in option.choices:
                raise usage_error(f"{command.name}: {flag} is one of {', '.join(option.choices)}, not {value!r}")
        elif has_value:
            if word.startswith("--"):
                raise usage_error(f"{command.name}: {flag} takes no value")
            rest, value = "-" + value, ""  # -fd: the next flag of the bundle
        result.given.setdefault(option.name, []).append(value)
        if option is HELP:
            return result
        if rest:
            argv = [*argv[:position], rest, *argv[position:]]
            count += 1
    if len(result.arguments) < command.minimum:
        raise usage_error(f"{command.name}: missing argument: {command.name} {command.arguments}")
    if len(result.arguments) > command.maximum:
        extra = result.arguments[command.maximum]
        raise usage_error(f"{command.name}: unexpected argument {extra!r} (see {command.name} --help)")
    return result


def help_text(command: Command) -> str:
    synopsis = " ".join(filter(None, ["usage:", command.name, "[OPTIONS]", command.arguments]))
    lines = [synopsis, "", command.summary, "", "Options:"]
    for option in command.options:
        label = ", ".join(option.flags) + (f" {option.metavar}" if option.metavar else "")
        text = option.help + (f" ({'|'.join(option.choices)})" if option.choices else "")
        lines.append(f"  {label:<26} {text}" if len(label) <= 26 else f"  {label}\n{'':29}{text}")
    if command.epilog:
        lines += ["", command.epilog.strip("\n")]
    return "\n".join(lines) + "\n"
