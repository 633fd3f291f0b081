"""The package and its reference backend need nothing that only POSIX systems have."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

WITHOUT_POSIX = """
import mmap, os, sys
import torch, spikingjelly.activation_based.neuron  # they have branches of their own for other systems

for module in ("fcntl", "grp", "pwd", "resource", "termios"):
    sys.modules[module] = None  # importing it fails
removed = [
    (os, ("fork", "geteuid", "getuid", "register_at_fork", "sched_getaffinity", "sysconf", "uname")),
    (mmap, ("MADV_HUGEPAGE", "MAP_ANON", "MAP_ANONYMOUS", "MAP_PRIVATE", "MAP_SHARED", "PROT_READ", "PROT_WRITE")),
]
for module, names in removed:
    for name in names:
        vars(module).pop(name, None)

import klif_sj, klif_sj.cli, klif_sj.models, klif_sj.swap

x = torch.tensor([[2.0], [0.5], [3.0]], requires_grad=True)
for backend in ("torch", "auto"):
    spikes = klif_sj.KLIFNode(backend=backend, step_mode="m")(x)
    spikes.sum().backward()
    assert x.grad.all()
    print(backend, spikes.flatten().tolist())
"""


@pytest.mark.once
def test_a_neuron_runs_without_posix() -> None:
    """Nor is there a compiler, so that ``auto`` is ``torch`` too. The potentials are 1, 0.25 and 1.625."""
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | {"PATH": ""}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_POSIX], env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == ["torch [1.0, 0.0, 1.0]", "auto [1.0, 0.0, 1.0]"]
