"""klif-sj inspect and klif-sj run --inspect: what they print and write, and what they say to mistakes."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
import textwrap
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import torch
from spikingjelly.activation_based import functional
from spikingjelly.activation_based.neuron import IFNode
from torch import nn
from trainings import training

from klif_sj import KLIFNode, cli, patched
from klif_sj.fuse import fusing
from klif_sj.inspection import Inspection
from klif_sj.inspection.result import load_all
from klif_sj.inspection.running import WINDOW, inspecting

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = training(tmp_path_factory.mktemp("trained") / "run")
    run.run()
    return run.checkpoint


def refusal(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_a_checkpoint_and_two(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    limits = ["--threshold", "silent=2", "--threshold=coverage=0"]
    assert cli.main(["inspect", str(checkpoint), "--inputs=100", f"--out={one}", "--device=cpu", *limits]) == 0
    printed = capsys.readouterr().out
    found = Inspection.load(one)
    assert list(found.layers) == ["encoder", "conv1", "fc1", "decoder"]
    assert (found.thresholds.silent, found.thresholds.coverage) == (2.0, 0.0)
    assert 100 <= found.inputs <= 240
    assert found.layers["encoder"].steps == 2
    for name, figures in found.layers.items():
        assert name in printed
        assert f"{figures.rate:.4f}" in printed
        assert figures.gradient is not None
    assert str(one / "inspection.html") in printed.replace("\n", "")

    assert cli.main(["inspect", str(checkpoint), str(one), f"--out={two}", "--inputs=100", "--device=cpu"]) == 0
    both = load_all(two)
    assert both[1].layers == found.layers
    assert [each.title for each in both] == [str(checkpoint), str(one)]


def test_files_that_are_no_checkpoints(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, other, cut = tmp_path / "notes.ckpt", tmp_path / "other.ckpt", tmp_path / "cut.ckpt"
    text.write_text("notes")
    torch.save({"state_dict": {}}, other)
    cut.write_bytes(checkpoint.read_bytes()[:-100])
    out = f"--out={tmp_path / 'out'}"
    assert f"the checkpoint {text} cannot be read" in refusal(capsys, "inspect", text, out)
    assert f"{other} is no checkpoint of klif-sj train" in refusal(capsys, "inspect", other, out)
    assert f"the checkpoint {cut} cannot be read" in refusal(capsys, "inspect", cut, out)
    assert "there is no checkpoint" in refusal(capsys, "inspect", tmp_path / "none.ckpt", out)
    assert "there is no inspection" in refusal(capsys, "inspect", tmp_path, out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--threshold=silence=1", "expected NAME=NUMBER with one of silent, saturated, coverage"),
        ("--threshold=silent", "--threshold: expected NAME=VALUE, such as coverage=0.02, got 'silent'"),
        ("--threshold=silent=yes", "silent: expected a number, got 'yes'"),
        ("--inputs=0", "inputs: expected at least 1, got 0"),
        ("--sampled-potentials=0", "sampled_potentials: expected at least 1, got 0"),
    ],
)
def test_mistakes(checkpoint: Path, capsys: pytest.CaptureFixture[str], option: str, message: str) -> None:
    assert message in refusal(capsys, "inspect", checkpoint, option, "--device=cpu")


SCRIPT = """
    import sys
    import torch
    from torch import nn
    from spikingjelly.activation_based import functional, layer, neuron, surrogate

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.fc2 = layer.Linear(20, 32), layer.Linear(32, 10)
            self.first, self.second = (neuron.LIFNode(surrogate_function=surrogate.ATan()) for _ in range(2))

        def forward(self, x):
            return self.second(self.fc2(self.first(self.fc1(x))))

    torch.manual_seed(0)
    net, steps = Net(), 5
    functional.set_step_mode(net, sys.argv[1])
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    x = torch.rand(64, 20) * 6
    labels = x[:, :10].argmax(1)

    def rates(x):
        if sys.argv[1] == "m":
            return net(x.expand(steps, *x.shape)).mean(0)
        return sum(net(x) for _ in range(steps)) / steps

    for _ in range(3):
        for part in range(0, 64, 16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(rates(x[part : part + 16]), labels[part : part + 16]).backward()
            optimizer.step()
            functional.reset_net(net)
        with torch.no_grad():
            rates(x)
            functional.reset_net(net)
    print("%.9f" % float(sum(p.detach().abs().sum() for p in net.parameters())))
"""


def watched(folder: Path, mode: str, around: AbstractContextManager | None = None) -> list[Inspection]:
    """What an inspection of the script says, run in this process."""
    file = folder / "script.py"
    file.write_text(textwrap.dedent(SCRIPT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["script.py", mode])
        with around or nullcontext(), inspecting("script.py") as watch:
            runpy.run_path(str(file), run_name="__main__")
    return watch.inspections()


def test_a_script_in_either_step_mode(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, printed = {}, set()
    for mode in "sm":
        training, evaluation = watched(tmp_path, mode)
        printed.add(capsys.readouterr().out)
        assert (training.inputs, training.batches) == (192, 12)
        assert (evaluation.inputs, evaluation.batches) == (192, 3)
        assert list(training.layers) == ["first", "second"]
        assert all(each.gradient and each.steps == 5 for each in training.layers.values())
        assert all(each.gradient is None and each.temporal for each in evaluation.layers.values())
        found[mode] = training.layers
    assert len(printed) == 1  # it is trained the same
    for name in ("first", "second"):
        single, multi = found["s"][name], found["m"][name]
        assert single.rate == pytest.approx(multi.rate, rel=1e-6)
        assert single.rate_by_step == pytest.approx(multi.rate_by_step, rel=1e-6)


def test_a_script_with_fused_and_with_other_neurons(tmp_path: Path) -> None:
    plain, fused, swapped = (
        watched(tmp_path, "m", around)[0].layers for around in (None, fusing(), patched(LIFNode=KLIFNode))
    )
    assert {each.neuron for each in swapped.values()} == {"KLIFNode"}
    assert all("k" in each.parameters for each in swapped.values())
    for name in ("first", "second"):
        assert fused[name].neuron == "LIFNode"
        assert fused[name].rate == pytest.approx(plain[name].rate, rel=1e-2)
        assert fused[name].temporal == pytest.approx(plain[name].temporal, rel=1e-3)
        assert fused[name].gradient == pytest.approx(plain[name].gradient, rel=1e-3)


def test_a_long_script_is_shown_as_it_was_at_its_end() -> None:
    net = nn.Sequential(IFNode(step_mode="m"))
    with inspecting("long") as watch, torch.no_grad():
        for number in range(2 * WINDOW + 5):
            functional.reset_net(net)
            net(torch.full((2, 3, 4), 0.0 if number < WINDOW else 1.0))
    (found,) = watch.inspections()
    assert found.layers["0"].rate == 1.0
    assert found.batches == WINDOW
    assert found.notes == [f"{2 * WINDOW + 5} passes without a gradient; this is of the latest {WINDOW}."]


def test_two_networks_of_a_script() -> None:
    nets = [nn.Sequential(IFNode(step_mode="m")) for _ in range(2)]
    with inspecting("two") as watch, torch.no_grad():
        for net, current in zip(nets, (0.0, 2.0), strict=True):
            net(torch.full((2, 3, 4), current))
    (found,) = watch.inspections()
    assert {name: each.rate for name, each in found.layers.items()} == {"0": 0.0, "0 #2": 1.0}


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": paths}
    command = [sys.executable, "-m", "klif_sj", "run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder, env=environment)


def test_a_script_from_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    done = run(tmp_path, "--fuse", "--inspect=out", "script.py", "m")
    assert "2 neurons fused" in done.stderr
    assert "script.py, training: 192 inputs in 12 batches" in done.stderr
    assert "Page: out/inspection.html" in done.stderr
    assert [each.title for each in load_all(tmp_path / "out")] == ["script.py, training", "script.py, no gradient"]


def test_a_script_without_spiking_layers(tmp_path: Path) -> None:
    (tmp_path / "plain.py").write_text("import torch; print(torch.nn.Linear(2, 2)(torch.rand(1, 2)).shape)")
    done = run(tmp_path, "--inspect=out", "plain.py")
    assert "the script has run no spiking layer, so there is nothing to inspect" in done.stderr
    assert not (tmp_path / "out").exists()


def test_train_and_compare_write_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--epochs=1", "--time-steps=2", "--width=0.03125", "--batch-size=256", "--device=cpu", "--backend=torch"]
    assert cli.main(["train", "--recipe=digits", f"--out={tmp_path / 'train'}", *tiny]) == 0
    assert "What its layers do" in capsys.readouterr().out
    assert Inspection.load(tmp_path / "train").title == "digits, klif"
    assert cli.main(["train", "--recipe=digits", f"--out={tmp_path / 'aside'}", "--validation=100", *tiny]) == 0
    assert Inspection.load(tmp_path / "aside").inputs == 100
    arguments = ["compare", "--neurons=lif,clif", "--seeds=3", f"--out={tmp_path / 'compare'}", *tiny]
    assert cli.main(arguments) == 0
    assert "What the layers do with each neuron, seed 3" in capsys.readouterr().out
    lif, clif = load_all(tmp_path / "compare")
    assert (lif.title, clif.title) == ("lif", "clif")
    assert {each.neuron for each in clif.layers.values()} == {"CLIFNode"}
    assert json.loads((tmp_path / "compare" / "report.json").read_text())["seeds"] == [3]
