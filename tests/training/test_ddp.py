"""Two processes on the CPU train one network together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import functional
from tolerance import assert_close
from torch.utils.data import DistributedSampler
from trainings import TINY, tiny, weights

from klif_sj.training.classifier import SpikingClassifier, dropout_seed
from klif_sj.training.data.batches import Batches, DataModule, load
from klif_sj.training.run import Placement, load_checkpoint, network_of

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.once]

RECIPE: dict[str, Any] = {**TINY, "epochs": 2, "optimizer": "sgd", "learning_rate": 0.5, "batch_size": 480}


def command(out: Path) -> list[str]:
    settings = [f"--set={name}={value}" for name, value in RECIPE.items()]
    return ["train", "--recipe=digits", "--accelerator=cpu", f"--out={out}", *settings]


def run(*arguments: str, **variables: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=300, env={**os.environ, **variables}
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def together(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes that Lightning starts have trained."""
    out = tmp_path_factory.mktemp("together")
    run("klif_sj", *command(out), "--devices=2")
    return out


def test_result_is_of_all_test_images_once(together: Path) -> None:
    result = json.loads((together / "result.json").read_text())
    assert (result["processes"], len(result["history"])) == (2, 2)
    _, net = load_checkpoint(together / "checkpoints" / "last.ckpt")
    images, labels = load("digits", Path(), "test")
    with torch.no_grad():
        right = (net.eval()(images).argmax(1) == labels).sum().item()
    assert result["test_accuracy"] == pytest.approx(right / 360, rel=1e-6)
    assert (together / "logs" / "csv" / "version_0" / "metrics.csv").exists()
    assert len(list((together / "logs" / "csv").iterdir())) == 1, "the first process alone writes"


def test_an_update_takes_the_mean_of_both_gradients(together: Path) -> None:
    """The same training, both processes' parts computed one after the other in this one."""
    recipe = tiny(**RECIPE)
    data = DataModule("digits", Path(), 240, recipe.seed)
    modules = [SpikingClassifier(network_of(recipe), recipe) for _ in range(2)]
    (optimizer,), (schedule,) = modules[0].configure_optimizers()
    for epoch in range(2):
        generators, parts = [], []
        for rank in range(2):
            order: DistributedSampler = DistributedSampler(range(1437), 2, rank, seed=recipe.seed)  # type: ignore[arg-type]
            order.set_epoch(epoch)
            parts.append(Batches(data.train, 240, data.augmentation, torch.device("cpu"), sampler=order))
            torch.manual_seed(dropout_seed(recipe.seed, epoch, rank))
            generators.append(torch.get_rng_state())
        for batches in zip(*parts, strict=True):
            gradients = []
            modules[1].net.load_state_dict(modules[0].net.state_dict())
            for rank, (module, (x, labels)) in enumerate(zip(modules, batches, strict=True)):
                torch.set_rng_state(generators[rank])
                module.zero_grad()
                module.loss(module(x), labels).backward()
                functional.reset_net(module.net)
                generators[rank] = torch.get_rng_state()
                gradients.append([parameter.grad for parameter in module.parameters()])
            for parameter, first, second in zip(modules[0].parameters(), *gradients, strict=True):
                parameter.grad = (first + second) / 2
            optimizer.step()
        schedule.step()
    found = weights(together)
    for name, value in modules[0].state_dict().items():
        if value.is_floating_point():
            assert_close(found[name], value, name)


def test_torchrun_starts_the_same_training(together: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    run("torch.distributed.run", "--nproc-per-node=2", f"--master-port={port}", "-m", "klif_sj", *command(tmp_path))
    found, expected = weights(tmp_path), weights(together)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_every_epoch_and_process_draws_its_own_dropout() -> None:
    drawn = set()
    for seed in (0, 1, 2**32 - 1):
        for epoch in range(3):
            for rank in range(8):
                torch.manual_seed(dropout_seed(seed, epoch, rank))
                drawn.add(torch.rand(()).item())
    assert len(drawn) == 3 * 3 * 8


BROKEN_IN_THE_SECOND = """
import sys

from klif_sj import cli
from klif_sj.training.data.batches import DataModule
from klif_sj.training.run import is_first_process

read = DataModule.__init__


def broken(self, *arguments, **options):
    read(self, *arguments, **options)
    if not is_first_process():
        self.train.inputs[:] = float("nan")


DataModule.__init__ = broken
sys.exit(cli.main())
"""


def test_every_process_says_in_which_one_it_began(tmp_path: Path) -> None:
    """The gradients are not finite in either: they are the mean over both."""
    program = tmp_path / "program.py"
    program.write_text(BROKEN_IN_THE_SECOND)
    arguments = [sys.executable, str(program), *command(tmp_path / "out"), "--devices=2"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("step 1 (epoch 1, batch 1): the loss is ") == 2
    assert done.stderr.count(". In process 1: It began in the data: the batch holds values that are not finite.") == 2


def test_placement_is_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Placement.find("cpu", None) == Placement("cpu", 1)
    assert Placement.find("cpu", 3).processes == 3
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert Placement.find("cpu", None) == Placement("cpu", 4, nodes=2)
    assert Placement.find("cpu", 4).processes == 8
    with pytest.raises(ValueError, match="devices: torchrun has started 4 processes on this node, got 2"):
        Placement.find("cpu", 2)
