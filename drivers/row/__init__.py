"""The row driver: block-level redirect-on-write on sparse files. See docs/row-format.md."""

from .driver import RowDriver

__all__ = ["RowDriver"]
