"""Storage options as command lines and dockerd have them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from unionfs.store.api import Invalid


def storage_options(words: Iterable[Any]) -> dict[str, str]:
    """A list of KEY=VALUE, with or without "unionfs." before it."""
    options = {}
    for word in words:
        key, equals, value = str(word).partition("=")
        if not equals:
            raise Invalid(f"--storage-opt {word}: must be KEY=VALUE")
        options[key.removeprefix("unionfs.")] = value
    return options
