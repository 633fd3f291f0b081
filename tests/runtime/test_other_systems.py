"""The package and its reference backend need nothing that only POSIX systems have."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

WITHOUT_POSIX = """
import importlib, mmap, os, pkgutil, sys
from pathlib import Path
import lightning, torch._dynamo, spikingjelly.activation_based.neuron  # they have branches for other systems

for module in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[module] = None  # importing it fails
removed = [
    (os, ("O_DIRECTORY", "fork", "geteuid", "getuid", "register_at_fork", "sched_getaffinity", "sysconf", "uname")),
    (mmap, ("MADV_HUGEPAGE", "MAP_ANON", "MAP_ANONYMOUS", "MAP_PRIVATE", "MAP_SHARED", "PROT_READ", "PROT_WRITE")),
]
for module, names in removed:
    for name in names:
        vars(module).pop(name, None)

import klif_sj

for module in pkgutil.walk_packages(klif_sj.__path__, "klif_sj."):
    if module.name not in ("klif_sj.__main__", "klif_sj.swap.child"):  # programs
        importlib.import_module(module.name)

with klif_sj.training.atomic.locked(Path(sys.argv[1])):
    klif_sj.training.atomic.write_json(Path(sys.argv[1], "settings.json"), {})

x = torch.tensor([[2.0], [0.5], [3.0]], requires_grad=True)
for backend in ("torch", "auto"):
    spikes = klif_sj.KLIFNode(backend=backend, step_mode="m")(x)
    spikes.sum().backward()
    assert x.grad.all()
    print(backend, spikes.flatten().tolist())
"""


@pytest.mark.once
def test_a_neuron_runs_without_posix(tmp_path: Path) -> None:
    """Every module imports, and files are written under a lock.

    Nor is there a compiler, so that ``auto`` is ``torch`` too. The potentials are 1, 0.25 and 1.625.
    """
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX, tmp_path], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "settings.json").read_text() == "{}\n"
    assert run.stdout.splitlines() == ["torch [1.0, 0.0, 1.0]", "auto [1.0, 0.0, 1.0]"]
