"""`unionfs completion`: scripts for bash, zsh and fish, made from the command tables."""

from __future__ import annotations

from importlib import import_module

from unionfs.assemble import BUILT_IN
from unionfs.errors import EXIT_OK
from unionfs.front.args import Command, Option, Parsed
from unionfs.front.cli import COMMANDS
from unionfs.front.options import COMMON
from unionfs.session.mount import VFS_WORDS

SHELLS = ("bash", "zsh", "fish")
COMMAND = Command(
    "unionfs completion",
    "Prints a completion script.",
    arguments="|".join(SHELLS),
    minimum=1,
    maximum=1,
    epilog="Examples:\n"
    "  unionfs completion bash > /etc/bash_completion.d/unionfs\n"
    "  unionfs completion zsh > ~/.zfunc/_unionfs\n"
    "  unionfs completion fish > ~/.config/fish/completions/unionfs.fish",
)


def run(parsed: Parsed) -> int:
    from unionfs.front.args import usage_error

    shell = parsed.arguments[0]
    if shell not in SHELLS:
        raise usage_error(f"completion: one of {', '.join(SHELLS)}, not {shell!r}")
    print(script(shell), end="")
    return EXIT_OK


def script(shell: str) -> str:
    tables = {name: import_module("unionfs.front." + module).COMMAND for name, (module, _) in COMMANDS.items()}
    return {"bash": _bash, "zsh": _zsh, "fish": _fish}[shell](tables)


def _choices(option: Option) -> tuple[str, ...]:
    return tuple(BUILT_IN) if option.name == "driver" else option.choices


def _takes_path(option: Option) -> bool:
    return option.metavar.startswith(("DIR", "FILE"))


def _option_words() -> list[str]:
    """What may follow -o."""
    with_values = {"lowerdir", "upperdir", "workdir", "driver", "session", "data", "timeout", "log", "writeback",
                   "max_threads", "context", "fsname", "subtype"}  # fmt: skip
    return [name + "=" if name in with_values else name for name in COMMON] + list(VFS_WORDS)


def _bash(tables: dict[str, Command]) -> str:
    cases = []
    for name, command in tables.items():
        values = [f'      {"|".join(o.flags)}) words="{" ".join(_choices(o))}" ;;'
                  for o in command.options if _choices(o)]  # fmt: skip
        files = [flag for o in command.options if _takes_path(o) for flag in o.flags]
        options = [flag for o in command.options for flag in o.flags]
        listed = next((o.flags for o in command.options if o.name == "options"), [])
        lines = [f"    {name})", '      case "$prev" in', *("  " + value for value in values)]
        if files:
            lines.append(f"        {'|'.join(files)}) words=@files ;;")
        if listed:
            lines.append(f"        {'|'.join(listed)}) list=1; words=\"$mount_options\" ;;")
        lines += [f'        *) words="{" ".join(options)}" ;;', "      esac ;;"]
        cases += lines
    return f"""\
# bash completion for unionfs: made by `unionfs completion bash`
_unionfs() {{
  local cur prev command words list= head=
  local mount_options="{' '.join(_option_words())}"
  cur="${{COMP_WORDS[COMP_CWORD]}}" prev="${{COMP_WORDS[COMP_CWORD-1]}}" command="${{COMP_WORDS[1]}}"
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W "{' '.join(tables)} --help --version" -- "$cur"))
    return
  fi
  case "$command" in
{chr(10).join(cases)}
  esac
  if [ "$words" = @files ]; then
    compopt -o filenames
    COMPREPLY=($(compgen -f -- "$cur"))
  elif [ -n "$list" ]; then
    case "$cur" in *,*) head="${{cur%,*}}," cur="${{cur##*,}}" ;; esac
    compopt -o nospace
    COMPREPLY=($(compgen -P "$head" -W "$words" -- "$cur"))
  elif [[ "$cur" == -* || "$words" != -* ]]; then
    COMPREPLY=($(compgen -W "$words" -- "$cur"))
  elif [ "$command" = completion ]; then
    COMPREPLY=($(compgen -W "{' '.join(SHELLS)}" -- "$cur"))
  else
    compopt -o filenames
    COMPREPLY=($(compgen -f -- "$cur"))
  fi
}}
complete -F _unionfs unionfs
"""


def _zsh(tables: dict[str, Command]) -> str:
    overview = "\n".join(f"    {_quote(name + ':' + summary)}" for name, (_, summary) in COMMANDS.items())
    cases = []
    for name, command in tables.items():
        specs = []
        for option in command.options:
            action = ""
            if option.metavar:
                choices = _choices(option)
                kind = f"({' '.join(choices)})" if choices else "_files" if _takes_path(option) else ""
                if option.name == "options":
                    kind = "_values -s , option " + " ".join(word.rstrip("=") for word in _option_words())
                action = f":{option.metavar.split('[')[0].split('=')[0].lower()}:{kind}"
            text = option.help.replace("[", "\\[").replace("]", "\\]").replace(":", "\\:")
            specs += [_quote(f"{flag}[{text}]{action}") for flag in option.flags]
        last = f"'1:shell:({' '.join(SHELLS)})'" if name == "completion" else "'*:path:_files'"
        cases.append(f"    {name})\n      _arguments " + " \\\n        ".join([*specs, last]) + " ;;")
    return f"""\
#compdef unionfs
# zsh completion for unionfs: made by `unionfs completion zsh`
_unionfs() {{
  local -a commands=(
{overview}
  )
  if (( CURRENT == 2 )); then
    _describe command commands
    return
  fi
  local command=$words[2]
  shift words
  (( CURRENT-- ))
  case $command in
{chr(10).join(cases)}
  esac
}}
_unionfs "$@"
"""


def _fish(tables: dict[str, Command]) -> str:
    lines = ["# fish completion for unionfs: made by `unionfs completion fish`"]
    for name, (_, summary) in COMMANDS.items():
        lines.append(f"complete -c unionfs -n __fish_use_subcommand -f -a {name} -d {_quote(summary)}")
    for name, command in tables.items():
        for option in command.options:
            words = ["complete -c unionfs", f"-n '__fish_seen_subcommand_from {name}'"]
            words += [f"-l {flag[2:]}" if flag.startswith("--") else f"-s {flag[1:]}" for flag in option.flags]
            if option.metavar:
                choices = _choices(option)
                values = ",".join(_option_words()) if option.name == "options" else " ".join(choices)
                words.append(f"-x -a '{values.replace(',', ' ')}'" if values else "-r" if _takes_path(option) else "-x")
            lines.append(" ".join([*words, f"-d {_quote(option.help)}"]))
    lines.append(f"complete -c unionfs -n '__fish_seen_subcommand_from completion' -f -a '{' '.join(SHELLS)}'")
    return "\n".join(lines) + "\n"


def _quote(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
