"""containerd's filter language (pkg/filters): `kind==active,labels."a/b"~=/^x/`. Commas are "and"."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

from unionfs.store.api import Invalid

Field = Callable[[list[str]], str | None]  # the value at a path of names; None: there is none
Filter = Callable[[Field], bool]

_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_PATTERN = re.compile(r"/(?:[^/\\]|\\.)*/|\|(?:[^|\\]|\\.)*\|")  # quotes that only a pattern may have
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_OPERATOR = re.compile(r"==|!=|~=")
_VALUE = re.compile(r'[^\s,"]+')
_MAX = 4096


def parse(text: str) -> Filter:
    """Invalid names what is wrong. An empty text lets everything pass."""
    if len(text) > _MAX:
        raise Invalid(f"filter of {len(text)} characters: at most {_MAX}")
    selectors: list[Filter] = []
    position = 0
    while position < len(text):
        if selectors:
            if text[position] != ",":
                raise _error(text, position, "a comma")
            position += 1
        selector, position = _selector(text, position)
        selectors.append(selector)
    return lambda field: all(selector(field) for selector in selectors)


def parse_any(texts: list[str]) -> Filter:
    """What passes one of them; of none, everything."""
    filters = [parse(text) for text in texts]
    return lambda field: not filters or any(one(field) for one in filters)


def _error(text: str, position: int, expected: str) -> Invalid:
    return Invalid(f"filter {text!r}: expected {expected} at character {position + 1}")


def _selector(text: str, position: int) -> tuple[Filter, int]:
    path: list[str] = []
    while True:
        if match := _QUOTED.match(text, position):
            path.append(_unquoted(match[0], text, position))
        elif match := _NAME.match(text, position):
            path.append(match[0])
        else:
            raise _error(text, position, "a field")
        position = match.end()
        if text[position : position + 1] != ".":
            break
        position += 1
    operator = _OPERATOR.match(text, position)
    if operator is None:
        return (lambda field: field(path) is not None), position
    position = operator.end()
    pattern = operator[0] == "~="
    if match := _QUOTED.match(text, position):
        value = _unquoted(match[0], text, position)
    elif pattern and (match := _PATTERN.match(text, position)):
        quote = match[0][0]
        value = match[0][1:-1].replace(f"\\{quote}", quote)
    elif match := _VALUE.match(text, position):
        value = match[0]
    else:
        raise _error(text, position, "a value")
    end = match.end()
    if operator[0] == "==":
        return (lambda field: field(path) == value), end
    if operator[0] == "!=":
        return (lambda field: (field(path) or "") != value), end
    try:
        expression = re.compile(value)
    except re.error as error:
        raise Invalid(f"filter {text!r}: pattern {value!r}: {error}") from None
    return (lambda field: expression.search(field(path) or "") is not None), end


def _unquoted(quoted: str, text: str, position: int) -> str:
    try:
        value: str = json.loads(re.sub(r"\\x([0-9a-fA-F]{2})", r"\\u00\1", quoted), strict=False)
    except ValueError:
        raise _error(text, position, "a quoted string") from None
    return value
