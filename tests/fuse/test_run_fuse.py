"""klif-sj run --fuse: a script's own neurons on kernels."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from klif_sj.cli import main

SCRIPT = """
    import torch
    from spikingjelly.activation_based import functional, neuron
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), neuron.LIFNode(), torch.nn.Linear(4, 4), neuron.IFNode())
    functional.set_step_mode(net, "m")
    print(net(torch.rand(3, 2, 4) * 5).sum().item())
    print([type(m) is c for m, c in zip(net[1::2], (neuron.LIFNode, neuron.IFNode))])
"""


@pytest.fixture
def script(tmp_path: Path) -> Path:
    file = tmp_path / "script.py"
    file.write_text(textwrap.dedent(SCRIPT))
    return file


def execute(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True, env=environment)


def test_a_script_gives_the_same_on_kernels(script: Path) -> None:
    plain = execute(sys.executable, script).stdout.splitlines()
    fused = execute(sys.executable, "-m", "klif_sj", "run", "--fuse", script)
    assert plain[0] == fused.stdout.splitlines()[0]
    assert (plain[1], fused.stdout.splitlines()[1]) == ("[True, True]", "[False, False]")
    assert "2 neurons fused" in fused.stderr


def test_with_swap_the_others_are_fused(script: Path) -> None:
    run = [sys.executable, "-m", "klif_sj", "run", "--swap", "LIFNode=KLIFNode", "--fuse", script]
    told = execute(*run).stderr
    assert "1 neuron swapped" in told
    assert "1 neuron fused" in told


@pytest.mark.parametrize(
    ("options", "words"),
    [([], "expected --swap OLD=NEW, --fuse or --inspect OUT"), (["--fuse", "--set", "tau=2"], "with --set")],
)
def test_mistakes(options: list[str], words: str, script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["run", *options, str(script)])
    assert words in capsys.readouterr().err
