"""Find out within ten minutes on a GPU what is right, what is not, and how fast kernels are beside the prediction.

    python benchmarks/first.py OUT        (benchmarks/gpu.sh --first OUT)

Each part has its own time limit. A part that cannot run says what it lacks. Three files are written to OUT while the
parts run: report.md is the page to read, log.txt has all that the parts printed, and measured.json has the timings.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PREDICTED = ROOT / "benchmarks" / "predicted.json"
KEYS = ("neuron", "pass", "dtype", "T", "layout")
BELOW = 0.1
"""How far a kernel's share of a copy's bandwidth may be below the prediction. The model may be off by that much."""

ASKING = 120
"""How many seconds torch may take to look for a GPU, as a driver that hangs must not use up the ten minutes."""

HELD, FAILED, SKIPPED = "held", "did not hold", "skipped"

Row = dict[str, Any]


@dataclass(frozen=True)
class Part:
    """A command with its time limit, and what it needs: modules of Python, programs, or ``gpu``."""

    title: str
    seconds: int
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    title: str
    status: str
    seconds: float
    told: str


def parts(out: Path) -> list[Part]:
    """The parts in the order of importance. If an early one does not hold, the later ones are worth nothing."""

    def check(title: str, seconds: int, *words: str, needs: tuple[str, ...] = ("gpu", *KERNELS_NEED)) -> Part:
        return Part(title, seconds, (sys.executable, "-m", "bench.gpu_checks", *words), needs)

    def tests(title: str, seconds: int, chosen: str, *needs: str) -> Part:
        workers = ("-n", "4") if missing("xdist") is None else ()
        command = (sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests/gpu", *workers)
        return Part(title, seconds, (*command, "-k", chosen), ("gpu", *KERNELS_NEED, "pytest", *needs))

    def tool(title: str, seconds: int, program: str, *words: str) -> Part:
        command = (found_program(program) or program, *words)
        return Part(title, seconds, command, ("gpu", *KERNELS_NEED, program))

    python = (sys.executable, "-m", "bench.gpu_checks", "profiled")
    memcheck = ("--tool", "memcheck", "--error-exitcode", "1", sys.executable, "tests/gpu/every_kernel.py")
    ncu = ("--kernel-name", "regex:^(forward|backward)$", "--launch-count", "3", "--set", "full", *python)
    return [
        check("versions", 30, "versions", needs=("torch", "spikingjelly")),
        check("one KLIF against torch, with subnormal input", 60, "equals_torch"),
        check("the same in a fresh thread", 45, "in_a_fresh_thread"),
        tests("the GPU's tests", 150, "not compiled"),
        tests("the GPU's tests of torch.compile", 60, "compiled", "g++", "triton"),
        tool("compute-sanitizer memcheck over every kind of kernel", 75, "compute-sanitizer", *memcheck),
        check("kernels beside a copy", 135, "timings", str(out / "measured.json")),
        tool("ncu: KLIF float16 forward, GLIF float16 backward", 45, "ncu", *ncu),
    ]


KERNELS_NEED = ("torch", "spikingjelly", "cupy")


def missing(need: str) -> str | None:
    """Why a need is not met, or None if it is."""
    if need == "gpu":
        return no_gpu()
    if need == "g++":
        return None if os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") else "no C++ compiler"
    if need in ("compute-sanitizer", "ncu"):
        return None if found_program(need) else f"{need} is not on the PATH nor in /usr/local/cuda/bin"
    return None if importlib.util.find_spec(need) else f"{need} is not installed"


def found_program(name: str) -> str | None:
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin")


def no_gpu() -> str | None:
    if importlib.util.find_spec("torch") is None:
        return "torch is not installed"
    code = "import sys, torch; sys.exit(0 if torch.cuda.is_available() else 1)"
    try:
        asked = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, timeout=ASKING)
    except subprocess.TimeoutExpired:
        return f"torch did not say within {ASKING} s whether there is an NVIDIA GPU"
    return "no NVIDIA GPU that torch can use" if asked.returncode else None


def run(part: Part, log: Path, lacks: Callable[[str], str | None]) -> Result:
    """Run a part until it ends or its time is up. What it prints goes to the log at once."""
    if reasons := list(dict.fromkeys(filter(None, map(lacks, part.needs)))):
        return Result(part.title, SKIPPED, 0.0, "; ".join(reasons))
    started, begin = time.monotonic(), log.stat().st_size if log.exists() else 0
    path = os.pathsep.join([str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")])
    with log.open("ab") as file:
        process = subprocess.Popen(
            part.command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip
        try:
            status: int | None = process.wait(part.seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # this ends all processes of the part's session
            process.wait()
            status = None
    lines = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    told = lines[-1] if lines else ""
    if status is None:
        told = f"stopped after {part.seconds} s; {told}"
    elif status:
        told = f"exit status {status}; {told}"
    return Result(part.title, FAILED if status != 0 else HELD, time.monotonic() - started, told)


def page(results: list[Result], measured: list[Row], predicted: list[Row]) -> str:
    """The text of the report."""
    told = [(r.title, r.status, f"{r.seconds:.0f}", r.told.replace("|", "\\|")[:300]) for r in results]
    lines = ["# The first ten minutes on a GPU", "", *table(("part", "result", "seconds", "last words"), told)]
    for heading, status in (("What did not hold", FAILED), ("What was skipped", SKIPPED)):
        if chosen := [r for r in results if r.status == status]:
            lines += ["", f"## {heading}", "", *(f"- {r.title}: {r.told}" for r in chosen)]
    lines += ["", "## Kernels: share of a copy of as many bytes", ""]
    if not predicted:
        lines += ["There are no predictions: `benchmarks/sass.py --table` writes them.", ""]
    if not measured:
        return "\n".join([*lines, "Nothing was measured.", ""])
    of_case = {tuple(row[key] for key in KEYS): row for row in predicted}
    cells: list[tuple[str, ...]] = []
    for row in measured:
        expected = of_case.get(tuple(row[key] for key in KEYS), {})
        prediction = expected.get("predicted_share")
        short = prediction is not None and row["share"] < prediction - BELOW
        about = (str(expected.get(name, "")) for name in ("registers", "spills", "instructions_per_neuron_step"))
        cells.append(
            (*(str(row[key]) for key in KEYS), *about, "" if prediction is None else f"{prediction:.0%}",
             f"{row['share']:.0%}", f"{row['microseconds']:.0f}", "short of it" if short else "")
        )  # fmt: skip
    columns = (*KEYS, "registers", "spills", "instructions a neuron-step", "predicted", "measured", "us", "")
    return "\n".join([*lines, *table(columns, cells), ""])


def table(heading: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (heading, ("---",) * len(heading), *rows)]


def rows_of(file: Path) -> list[Row]:
    rows: list[Row] = json.loads(file.read_text()) if file.exists() else []
    return rows


def main(out: Path) -> int:
    out.mkdir(parents=True, exist_ok=True)
    for name in ("report.md", "log.txt", "measured.json"):
        (out / name).unlink(missing_ok=True)
    known: dict[str, str | None] = {}

    def lacks(need: str) -> str | None:
        if need not in known:
            known[need] = missing(need)
        return known[need]

    results: list[Result] = []
    for part in parts(out):
        print(f"{part.title} (at most {part.seconds} s)", flush=True)
        with (out / "log.txt").open("a") as log:
            log.write(f"\n==== {part.title}\n")
        result = run(part, out / "log.txt", lacks)
        results.append(result)
        print(f"    {result.status}: {result.told}", flush=True)
        (out / "report.md").write_text(page(results, rows_of(out / "measured.json"), rows_of(PREDICTED)))
    print((out / "report.md").read_text())
    if lacks("gpu"):
        print(lacks("gpu"), file=sys.stderr)
        return 2
    return int(any(result.status == FAILED for result in results))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python benchmarks/first.py OUT: expected a folder for the results")
    sys.exit(main(Path(sys.argv[1]).resolve()))
