"""The tables of reports. Their columns are paths, a word, and a wrapped text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest

TEXT_WIDTH = 88

Cells = tuple[str, str, str]


def group_lines(paths: list[str], details: list[tuple[str, str]]) -> Iterator[Cells]:
    yield ("", "", "")
    yield from _columns(paths, details)


def _columns(paths: Iterable[str], details: Iterable[tuple[str, str]]) -> Iterator[Cells]:
    wrapped = []
    for word, text in details:
        first, *rest = textwrap.wrap(text, TEXT_WIDTH, break_long_words=False)
        wrapped += [(word, first), *(("", line) for line in rest)]
    for path, line in zip_longest(paths, wrapped):
        yield path or "", *(line or ("", ""))


def aligned(cells: Sequence[Cells]) -> list[str]:
    """The lines of a table with aligned columns."""
    left, middle = (max(len(row[column]) for row in cells) for column in (0, 1))
    return [f"{a:{left}}  {b:{middle}}  {c}".rstrip() for a, b, c in cells]
