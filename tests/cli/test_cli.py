"""klif-sj: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import klif_sj
from klif_sj import cli, runtime
from klif_sj._environment import environment
from klif_sj.cli import errors
from klif_sj.training.classifier import SpikingClassifier
from klif_sj.training.reports import comparison
from klif_sj.training.step_cost import measure_step

TINY = ["--epochs=1", "--time-steps=2", "--width=0.03125", "--batch-size=256", "--device=cpu", "--backend=torch"]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """What a refused command says on stderr; it exits with status 2 and prints nothing else."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("klif-sj: error: ")
    return captured.err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (
            "--dataset=digit",
            "dataset: expected one of digits, mnist, fashion-mnist, got 'digit'; did you mean 'digits'?",
        ),
        ("--neurons=lif,kliff", "got 'kliff'; did you mean 'klif'?"),
        ("--neurons=", "neurons: expected at least one name"),
        ("--threads=0", "threads: expected an integer of at least 1, got 0"),
        ("--time-steps=-1", "time_steps: expected an integer of at least 1, got -1"),
        ("--learning-rate=0", "learning_rate: expected a positive number, got 0.0"),
        ("--width=inf", "width: expected a finite number, got inf"),
        ("--seed=-1", "seed: expected an integer of at least 0, got -1"),
        ("--seeds=1,2,1", "seeds: expected each of them once, got 1, 2, 1"),
        ("--set=precision=bf16-mixed", "precision: a comparison is in 32-true, got 'bf16-mixed'"),
        ("--device=gpu", "device: expected auto, cpu, cuda or cuda:N, got 'gpu'"),
        ("--device=cuda:99", "device: 'cuda:99' is not here"),
        ("--backend=cppp", "backend: expected one of 'auto', 'torch', 'cpp', 'cupy', got 'cppp'"),
        ("--epochs=0", "epochs: expected an integer of at least 1, got 0"),
        ("--batch-size=5000", "batch_size: expected at most the 1437 training images of digits, got 5000"),
    ],
)
def test_compare_refuses(capsys: pytest.CaptureFixture[str], tmp_path: Path, option: str, message: str) -> None:
    out = tmp_path / "out"
    assert message in refusal(capsys, "compare", f"--out={out}", option)
    assert not out.exists()


def test_compare_refuses_a_missing_data_set(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(self: object) -> None:
        raise RuntimeError("no route to host")

    monkeypatch.setattr("torchvision.datasets.MNIST.download", unreachable)
    told = refusal(capsys, "compare", "--dataset=mnist", f"--data-root={tmp_path}", f"--out={tmp_path / 'out'}")
    assert f"MNIST is not in {tmp_path / 'MNIST' / 'raw'}" in told
    assert "download=True" in told


def test_compare_refuses_a_backend_for_another_device(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Either it cannot serve here at all, or it does not serve the CPU."""
    told = refusal(capsys, "compare", "--backend=cupy", "--device=cpu", f"--out={tmp_path / 'out'}")
    assert "backend 'cupy'" in told
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments", [[], ["bogus"], ["compare", "--width=huge"], ["compare", "--epochs=many"], ["compare", "--seeds=1,x"]]
)
def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(arguments)
    assert raised.value.code == 2
    assert "usage: klif-sj" in capsys.readouterr().err


def test_compare_runs_and_says_where_the_report_is(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "measure_step", partial(measure_step, min_seconds=0))
    out = tmp_path / "a b"
    arguments = ["compare", "--neurons=klif,klif*,KLIF,klif-star", "--seed=5", f"--out={out}", *TINY]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert list(report["neurons"]) == ["klif", "klif-star"]
    assert report["seeds"] == [5]
    assert report["recipe"]["width"] == 1 / 32
    assert shlex.split(report["command"]) == ["klif-sj", *arguments]
    assert report["conclusion"].split()[0] in printed
    for result in report["neurons"].values():
        assert f"{result['test_accuracy']:.2f}" in printed
        assert f"{result['k']['decoder']:.4f}" in printed
    assert "report.md" in printed


def test_a_reader_that_has_enough_is_no_error() -> None:
    """``klif-sj source klif | head -1`` closes the pipe before all is written."""
    command = [sys.executable, "-m", "klif_sj", "source", "klif"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == cli.PIPE_CLOSED
    assert "BrokenPipe" not in said


@pytest.mark.parametrize(("neuron", "name"), [("lif", "LIFNode("), ("klif*", "KLIFNode("), ("glif", "GLIFNode(")])
def test_source_prints_a_neurons_kernels(neuron: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["source", neuron, "--T=3", "--dtype=float16", "--channels=2"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"// {name}")
    assert "T = 3, " in printed
    assert "arithmetic in float32" in printed
    assert cli.main(["source", neuron, "--T=0"]) == 2


def test_interrupt_says_how_to_go_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: SpikingClassifier, batch: object, index: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(SpikingClassifier, "training_step", interrupted)
    assert cli.main(["compare", f"--out={tmp_path}", *TINY]) == 130
    assert "with --resume goes on" in capsys.readouterr().err


def test_a_defect_is_not_taken_for_a_users_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def defective(self: SpikingClassifier, batch: object, index: int) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(SpikingClassifier, "training_step", defective)
    with pytest.raises(ValueError, match="a defect"):
        cli.main(["compare", f"--out={tmp_path}", *TINY])


@pytest.mark.parametrize("command", [["compare"], ["train", "--recipe=digits"]])
def test_missing_train_extra_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    def import_module(name: str) -> None:
        if name in ("lightning", "sklearn"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(errors.importlib, "import_module", import_module)
    told = refusal(capsys, *command)
    assert told == "klif-sj: error: training needs lightning, scikit-learn; type: pip install 'klif_sj[train]'\n"


def test_info_needs_no_train_extra() -> None:
    blocked = "import sys; sys.modules.update(dict.fromkeys(['lightning', 'sklearn', 'rich']));"
    code = f"{blocked} from klif_sj.cli import main; sys.exit(main(['info']))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stderr
    assert "backend torch" in told.stdout


def test_info_prints_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    lines = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    found = {label.strip(): text.strip() for label, text in lines.items()}
    assert found == environment()
    assert found["klif_sj"] == klif_sj.__version__
    assert found["torch"] == torch.__version__.split("+")[0] or found["torch"] == torch.__version__
    line = "2.x" if klif_sj._compat.SPIKINGJELLY_2 else "0.0.0.0.14"
    assert found["spikingjelly"].endswith(f"(handled as the {line} line)")


def test_info_says_which_backends_serve_and_why_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    causes = {"cpp": RuntimeError("no compiler\nlooked everywhere"), "cupy": ImportError("No module named 'cupy'")}
    monkeypatch.setattr(runtime, "unavailable", causes.get)
    found = environment()
    assert found["backend torch"] == "can serve"
    assert found["backend cpp"] == "cannot serve: no compiler"
    assert found["backend cupy"] == "cannot serve: No module named 'cupy'"


def test_module_is_the_command() -> None:
    command = [sys.executable, "-m", "klif_sj", "compare", "--dataset=cifar"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.endswith("error: dataset: expected one of digits, mnist, fashion-mnist, got 'cifar'\n")
    assert "Traceback" not in refused.stderr


def test_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        cli.main(["--version"])
    assert raised.value.code == 0
    assert capsys.readouterr().out == f"klif_sj {klif_sj.__version__}\n"
