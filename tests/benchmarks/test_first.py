"""The first ten minutes on a GPU, without one: what is skipped and said, what a part may do, and the page."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import first  # noqa: E402
from bench import gpu_checks  # noqa: E402
from bench.workload import Workload  # noqa: E402
from first import Part, Result  # noqa: E402

from klif_sj import runtime  # noqa: E402

pytestmark = pytest.mark.once

needs_cpp = pytest.mark.skipif("cpp" not in runtime.supported_backends(), reason="no C++ compiler")


def part(code: str, seconds: int = 30, needs: tuple[str, ...] = ()) -> Part:
    return Part("a part", seconds, (sys.executable, "-c", code), needs)


def test_the_parts_end_in_ten_minutes(tmp_path: Path) -> None:
    assert sum(p.seconds for p in first.parts(tmp_path)) <= 600


@pytest.mark.parametrize(
    ("code", "status", "told"),
    [
        ("print('first'); print('fine')", first.HELD, "fine"),
        ("print('told'); raise SystemExit(3)", first.FAILED, "exit status 3; told"),
        ("raise ValueError('broken')", first.FAILED, "exit status 1; ValueError: broken"),
    ],
)
def test_a_part_says_how_it_ended(code: str, status: str, told: str, tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("of another part\n")
    result = first.run(part(code), log, first.missing)
    assert (result.status, result.told) == (status, told)
    assert log.read_text().startswith("of another part\n")


def test_a_part_that_hangs_is_stopped_with_all_that_it_started(tmp_path: Path) -> None:
    file = tmp_path / "child"
    child = f"import time, pathlib; time.sleep(4); pathlib.Path({str(file)!r}).touch()"
    code = f"import subprocess, sys; print('began', flush=True); subprocess.run([sys.executable, '-c', {child!r}])"
    result = first.run(part(code, seconds=3), tmp_path / "log.txt", first.missing)
    assert (result.status, result.told) == (first.FAILED, "stopped after 3 s; began")
    time.sleep(2)
    assert not file.exists()


def test_what_is_missing_is_said_and_not_run(tmp_path: Path) -> None:
    result = first.run(
        part("raise SystemExit(1)", needs=("no_such_module", "g++")), tmp_path / "log.txt", first.missing
    )
    assert result.status == first.SKIPPED
    assert result.told.startswith("no_such_module is not installed")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_driver_that_hangs_does_not_use_up_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def hangs(command: Any, *, timeout: int, **options: Any) -> Any:
        raise subprocess.TimeoutExpired(command, timeout)

    monkeypatch.setattr(subprocess, "run", hangs)
    assert first.no_gpu() == f"torch did not say within {first.ASKING} s whether there is an NVIDIA GPU"


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = ["bash", str(BENCHMARKS / "gpu.sh"), "--first", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert done.stderr == "no NVIDIA GPU that torch can use\n"
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["log.txt", "report.md"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "| versions | held |" in report
    assert report.count("no NVIDIA GPU that torch can use") == 2 * 7
    assert "Nothing was measured." in report
    assert "torch: " in (tmp_path / "out" / "log.txt").read_text()


def row(neuron: str, share: float, **more: Any) -> dict[str, Any]:
    case = {"neuron": neuron, "pass": "forward", "dtype": "float32", "T": 4, "layout": "contiguous"}
    return {**case, "share": share, "microseconds": 180.4, **more}


def test_the_page_has_prediction_beside_measurement() -> None:
    predicted = [
        {**row("klif", 0), "registers": 40, "spills": 0, "instructions_per_neuron_step": 20.5, "predicted_share": 0.97},
        {**row("clif", 0), "registers": 48, "spills": 0, "instructions_per_neuron_step": 63, "predicted_share": 0.95},
    ]
    results = [
        Result("kernels", first.HELD, 41.2, "done"),
        Result("tests", first.FAILED, 150.0, "exit status 1; 3 failed | 2 passed"),
    ]
    text = first.page(results, [row("klif", 0.93), row("clif", 0.71), row("glif", 0.5)], predicted)
    assert "| kernels | held | 41 | done |" in text
    assert "## What did not hold\n\n- tests: exit status 1; 3 failed | 2 passed\n" in text
    assert "| klif | forward | float32 | 4 | contiguous | 40 | 0 | 20.5 | 97% | 93% | 180 |  |" in text
    assert "| clif | forward | float32 | 4 | contiguous | 48 | 0 | 63 | 95% | 71% | 180 | short of it |" in text
    assert "| glif | forward | float32 | 4 | contiguous |  |  |  |  | 50% | 180 |  |" in text
    assert "What was skipped" not in text


def test_predictions_are_of_the_cases_that_are_timed() -> None:
    """Every timed kernel has a prediction in the committed file."""
    predicted = {tuple(r[key] for key in first.KEYS) for r in first.rows_of(first.PREDICTED)}
    for workload in gpu_checks.timed():
        for of_pass in ("forward", "backward"):
            neuron, layout = workload.neuron.removesuffix("-channel"), workload.layout.replace("_", "-")
            assert (neuron, of_pass, workload.dtype, workload.steps, layout) in predicted


@needs_cpp
def test_the_checks_notice_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, where nothing is wrong until subnormal numbers are flushed."""
    gpu_checks.equals_torch(2.0, "cpp", "cpu")
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        with pytest.raises(AssertionError, match="flushed to 0"):
            gpu_checks.equals_torch(2.0, "cpp", "cpu")
    finally:
        torch.set_flush_denormal(False)


@needs_cpp
def test_timings_are_beside_a_copy_of_as_many_bytes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    times = iter([2.0, 2.5, 3.0, 6.0])

    def milliseconds(call: Any) -> float:
        call()
        return next(times)

    monkeypatch.setattr(gpu_checks, "milliseconds", milliseconds)
    workload, shares = Workload("glif-channel", 4, 12, "float16", "channels_last"), gpu_checks.shares
    monkeypatch.setattr(gpu_checks, "timed", lambda: iter([workload]))
    monkeypatch.setattr(gpu_checks, "shares", lambda workload: shares(workload, "cpp"))
    gpu_checks.timings(str(tmp_path / "measured.json"))
    rows = json.loads((tmp_path / "measured.json").read_text())
    assert [(r["pass"], r["share"], r["microseconds"]) for r in rows] == [
        ("forward", 0.8, 2500.0),
        ("backward", 0.5, 6000.0),
    ]
    assert all((r["neuron"], r["T"], r["layout"]) == ("glif", 4, "channels-last") for r in rows)
