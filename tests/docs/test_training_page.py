"""docs/training.md: it names every recipe and field, and its program runs."""

from __future__ import annotations

import re
import runpy
from dataclasses import fields
from pathlib import Path

import pytest

from klif_sj.training.recipe import LOSS_NAMES, OPTIMIZERS, PRECISIONS, Recipe, recipe_names

pytestmark = [pytest.mark.once, pytest.mark.usefixtures("one_thread")]

PAGE = (Path(__file__).parents[2] / "docs" / "training.md").read_text()


def first_cells(header: str) -> list[str]:
    """The names in the first column of the table with that header, and where a cell holds several, all of them."""
    table = PAGE.split(f"| {header} |", 1)[1].split("\n\n", 1)[0]
    rows = [line for line in table.splitlines()[2:] if line.startswith("|")]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


def test_every_recipe_is_named() -> None:
    assert sorted(first_cells("recipe | network")) == recipe_names()


def test_every_field_is_named_once() -> None:
    assert sorted(first_cells("field | default")) == sorted(each.name for each in fields(Recipe))


def test_every_choice_is_named() -> None:
    assert first_cells("loss | | used by") == list(LOSS_NAMES)
    for choice in (*OPTIMIZERS, *PRECISIONS):
        assert f"`{choice}`" in PAGE


def test_program_runs_as_it_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    Path("program.py").write_text(program)
    found = runpy.run_path("program.py")
    assert [row["epoch"] for row in found["result"]["history"]] == [1, 2]
    assert found["network"].notation == "(8C3+8C3+8C3)(enc)-8C3-MP2-128FC-(100FC-AP10)(dec)"
    assert (found["recipe"].epochs, found["recipe"].neuron) == (2, "klif")
