"""Formats of judged text: each turns one row into the parts of an `Example`, or says what is wrong with it.

A format is a file with a pure function `parse` and a line in the table of `detect`.
"""

from raylign.data.formats.detect import SCALES, examples, resolve_format

__all__ = ["SCALES", "examples", "resolve_format"]
