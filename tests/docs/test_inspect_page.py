"""docs/inspect.md: its program runs as it is printed, and it names every finding, limit and picture."""

from __future__ import annotations

import re
import runpy
from dataclasses import fields
from pathlib import Path

import pytest

from klif_sj.inspection import Inspection, Thresholds
from klif_sj.inspection.findings import CAUSES_FIRST
from klif_sj.inspection.result import load_all

pytest.importorskip("matplotlib")

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "inspect.md").read_text()


def test_the_program_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], one_thread: None
) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("program.py").write_text(program)
    found: Inspection = runpy.run_path("program.py")["before"]
    assert [finding.layer for finding in found.findings if finding.name == "silent"] == ["3"]
    assert "silent\n  3: 100 % of its neurons never fire" in capsys.readouterr().out
    assert [each.layers["3"].neuron for each in load_all(tmp_path / "swap")] == ["LIFNode", "CLIFNode"]


def test_every_finding_and_limit_is_named() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (?:`(\w+)=([\d.]+)`)? ?\|", PAGE, re.MULTILINE)
    assert {name for name, _, _ in rows} == set(CAUSES_FIRST)
    limits = {limit: float(value) for _, limit, value in rows if limit}
    assert limits == {each.name: each.default for each in fields(Thresholds)}


def test_pictures_are_there_and_all_are_shown() -> None:
    shown = set(re.findall(r"\((inspect/.*?)\)", PAGE)) | {"inspect/cost.md"}
    assert shown == {f"inspect/{file.name}" for file in (DOCS / "inspect").iterdir()}
