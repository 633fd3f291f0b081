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


# README's figure of fuse


def shown(provider_name: str, microseconds: float | None, **options: Any) -> dict[str, Any]:
    workload = Workload("fused-lif", 8, 23, threads=2)
    about = workload.columns() | {"allocator": "system", "spikingjelly": "2.0.0"}
    return result(provider_name, microseconds) | about | options


def test_the_figure_is_that_of_the_rows(tmp_path: Path) -> None:
    measured = [
        shown("klif_sj cpp", 50_000.0),
        shown("spikingjelly eager", 450_000.0),
        shown("spikingjelly compiled", 110_000.0),
        shown("klif_sj cpp", 1.0, **{"pass": "forward"}),
        shown("klif_sj cpp", 2.0, threads=1),
    ]
    write(tmp_path / "keeping", [row | {"allocator": "keeping", "median_us": 3.0} for row in measured])
    write(tmp_path / "machine", measured)
    text = " ".join(page.figure(report.machines(tmp_path)).split())
    assert (
        "2**20 neurons, float32, a machine, two threads, `keep_state=False`) takes 50 ms forward and backward" in text
    )
    assert "SpikingJelly 2.0.0 itself takes 9.0 times as long, and 2.2 times under `torch.compile`" in text


def test_without_rows_the_figure_says_how_to_measure_it(tmp_path: Path) -> None:
    write(tmp_path / "a", [shown("klif_sj cpp", 50_000.0), shown("spikingjelly eager", None)])
    assert page.figure(report.machines(tmp_path)).startswith("`python benchmarks/run.py --suite cpu --workload fused`")


def test_readme_has_the_figure_of_the_recorded_rows() -> None:
    readme = page.README.read_text()
    assert page.with_figure(readme, page.figure(report.machines(page.RESULTS))) == readme
    with pytest.raises(ValueError, match="expected README to have the lines"):
        page.with_figure("# A project", "a figure")


def test_one_command_writes_page_pictures_and_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "a", [shown("klif_sj cpp", 1.0, neurons=8 * size, T=8) for size in (16, 32)])
    (tmp_path / "README.md").write_text(f"Hello\n{page.BEGIN}\nold\n{page.END}\nBye\n")
    arguments = ["page.py", "--draw", f"--results={tmp_path}", f"--out={tmp_path / 'page.md'}"]
    monkeypatch.setattr(sys, "argv", [*arguments, f"--readme={tmp_path / 'README.md'}"])
    page.main()
    readme = (tmp_path / "README.md").read_text()
    assert "old" not in readme
    assert readme.startswith("Hello\n")
    assert readme.endswith("Bye\n")
    text = (tmp_path / "page.md").read_text()
    assert "### SpikingJelly's LIFNode, fused" in text
    assert "growth-cpu-fused-lif.svg" in text
    assert (tmp_path / "a" / "growth-cpu-fused-lif.svg").exists()


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
