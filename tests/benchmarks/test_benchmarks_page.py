"""The page and the pictures that benchmarks/ draws from rows, and its command for a GPU machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import page  # noqa: E402
import plot  # noqa: E402
import run  # noqa: E402
from bench import report, rows  # noqa: E402
from bench.providers import ALLOCATORS  # noqa: E402
from bench.workload import Workload  # noqa: E402

ENVIRONMENT = {"commit": "12e4567890", "device_name": "a machine", "date": "2026-11-22", "torch": "2.11.0"}


def result(provider_name: str, microseconds: float | None, **options: Any) -> dict[str, Any]:
    workload = Workload("klif", options.pop("steps", 8), options.pop("size", 20))
    row = {"suite": "cpu", "provider": provider_name, "pass": "both", "launch": "eager", "status": "ok"}
    row |= {"median_us": microseconds, "percent_of_copy": 50.0, "configuration": "as published"}
    return ENVIRONMENT | workload.columns() | row | options


def write(folder: Path, found: list[dict[str, Any]]) -> None:
    results = rows.Results(folder, {})
    for row in found:
        results.add(row)


def test_the_page_shows_ratios_losses_and_refusals(tmp_path: Path) -> None:
    write(
        tmp_path / "a-machine",
        [
            result("klif_sj cpp", 1000.0),
            result("copy", 500.0),
            result("spikingjelly eager", 12000.0),
            result("klif_sj torch compiled", 800.0),
            result("spikingjelly compiled", None, status="refused: 3.00% of the spikes differ, allowed 0.01%"),
        ],
    )
    text = page.page(tmp_path)
    assert "GPU figures are missing" in text
    assert "| T 8, 131072 neurons, float32, 1 thread | both | 1 ms | 50 | 2x | 0.8x | refused | 12x |" in text
    lost = text[text.index("### Where we lose") : text.index("### Not timed")]
    assert "| klif_sj torch compiled | 800 µs | 1 ms | 1.25x |" in lost
    assert "spikingjelly eager" not in lost
    assert "refused: 3.00% of the spikes differ" in text[text.index("### Not timed") :]


def test_the_page_says_where_nothing_is_lost(tmp_path: Path) -> None:
    write(tmp_path / "a", [result("klif_sj cpp", 1.0), result("spikingjelly eager", 2.0)])
    assert "No rival was faster than ours in any measurement of this run." in page.page(tmp_path)


def test_losses_are_found_per_workload() -> None:
    found = list(
        report.losses(
            [
                result("klif_sj cpp", 10.0),
                result("spikingjelly eager", 5.0),
                result("klif_sj cpp", 1.0, steps=4),
                result("spikingjelly eager", 5.0, steps=4),
                result("copy", 0.1),
            ]
        )
    )
    assert [(factor, row["T"]) for factor, row, _ in found] == [(2.0, 8)]


def test_pictures_show_growth(tmp_path: Path) -> None:
    sizes = [result(name, 2.0**size, size=size) for name in ("klif_sj cpp", "copy") for size in (12, 14, 16)]
    steps = [result("klif_sj cpp", 2.0**t, steps=t, size=16) for t in (1, 2, 4)]
    drawn = plot.draw_all(tmp_path, [row | {"saved_bytes": None} for row in sizes + steps])
    assert [path.name for path in drawn] == ["growth-cpu-klif.svg"]
    text = drawn[0].read_text()
    assert all(f"<!-- {label} -->" in text for label in ("neuron-steps", "T", "klif_sj cpp", "copy"))


# The one command for a GPU machine


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_gpu_script_wants_a_budget() -> None:
    told = subprocess.run(["bash", str(BENCHMARKS / "gpu.sh")], capture_output=True, text=True, check=False)
    assert told.returncode == 2
    assert "expected a number of seconds, got ''" in told.stderr


def test_a_run_with_another_allocator_says_so(tmp_path: Path) -> None:
    for name in ("keeping", "system"):
        write(tmp_path / name, [result("klif_sj cpp", 1.0, allocator=name)])
    headings = [line for line in page.page(tmp_path).splitlines() if line.startswith("## ")]
    assert headings == ["## a machine, freed memory kept by the allocator", "## a machine"]


def test_each_allocator_has_a_folder_of_its_own() -> None:
    folders = {run.default_folder("cpu", allocator) for allocator in ALLOCATORS}
    assert len(folders) == len(ALLOCATORS)
