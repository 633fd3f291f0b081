"""The columns that say on which machine and with which versions a row was measured."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[2]


def environment(device: str) -> dict[str, str]:
    """Hardware, versions, commit and date."""
    on_gpu = device == "cuda" and torch.cuda.is_available()
    return {
        "device_name": torch.cuda.get_device_name() if on_gpu else processor(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else "",
        "cuda": torch.version.cuda or "",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cupy": _version("cupy-cuda13x", "cupy-cuda12x", "cupy"),
        "triton": _version("triton"),
        "spikingjelly": _version("spikingjelly"),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }


def processor() -> str:
    """The CPU's name and how many of its cores there are."""
    try:
        found = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{name}, {torch.multiprocessing.cpu_count()} cores"


def machine_name(device: str) -> str:
    """The name of the folder for results of this hardware."""
    return re.sub(r"[^a-z0-9]+", "-", environment(device)["device_name"].lower()).strip("-")


def _commit() -> str:
    """The commit that is checked out, marked if the package or the harness has been changed since."""
    found = _output("git", "rev-parse", "--short=10", "HEAD")
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "klif_sj", "benchmarks/bench")
    return f"{found}-changed" if changed else found or "unknown"


def _output(*command: str) -> str:
    try:
        told = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return told.stdout.strip()


def _version(*packages: str) -> str:
    for package in packages:
        try:
            return metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return ""
