"""A loss that is no number: the training stops before a weight is touched, and says where it began."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn
from trainings import UPDATES, finished_epochs, tiny, training

from klif_sj import cli
from klif_sj.training.data.batches import DataModule
from klif_sj.training.divergence import DivergenceError, StopOnDivergence, broken_in_forward
from klif_sj.training.run import TrainingRun

pytestmark = pytest.mark.usefixtures("one_thread")


def break_layer(running: TrainingRun, name: str, at_update: int) -> None:
    """From its forward in this update on, the layer gives one NaN."""
    layer = running.module.net.get_submodule(name)
    forward, calls = layer.forward, 0

    def broken(x: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += layer.training
        y = forward(x).clone()
        if calls >= at_update:
            y[(0,) * y.ndim] = torch.nan
        return y

    layer.forward = broken  # type: ignore[method-assign]


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize(
    ("layer", "kind"), [("conv1.norm", "BatchNorm2d"), ("fc1.neuron", "KLIFNode"), ("decoder.linear", "Linear")]
)
def test_step_and_first_layer_are_named(tmp_path: Path, layer: str, kind: str, backend: str) -> None:
    running = training(tmp_path, tiny(backend=backend))
    break_layer(running, layer, at_update=UPDATES + 3)
    with pytest.raises(DivergenceError) as caught:
        running.run()
    text = str(caught.value)
    assert text.startswith("step 9 (epoch 2, batch 3): the loss is ")
    assert f". It began in the layer {layer} ({kind}): its input is finite, its output is not. What may help: " in text
    assert all(parameter.isfinite().all() for parameter in running.module.parameters())
    assert finished_epochs(tmp_path) == 1, "the last good checkpoint stays"


def test_a_learning_rate_far_too_high_is_seen_at_the_next_step(tmp_path: Path) -> None:
    running = training(tmp_path, tiny(optimizer="sgd", learning_rate=1e38, loss="cross-entropy"))
    with pytest.raises(DivergenceError, match=r"^step 2 \(epoch 1, batch 2\): .*It began in the layer conv1\.norm"):
        running.run()


def test_weights_that_were_broken_before_are_named(tmp_path: Path) -> None:
    running = training(tmp_path)
    with torch.no_grad():
        running.module.net.fc1.neuron.k.fill_(torch.nan)
        running.module.net.decoder.linear.weight[3, 4] = torch.inf
    with pytest.raises(DivergenceError, match=r"It began before this step: the parameter fc1\.neuron\.k is not finite"):
        running.run()


def test_data_that_are_no_numbers_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = training(tmp_path)
    running.data.train.inputs[5, 0, 3, 3] = torch.nan
    with pytest.raises(DivergenceError, match=r"\(epoch 1, batch \d\): .*It began in the data"):
        running.run()


@pytest.mark.parametrize(("factor", "norm"), [(1.0, "1"), (torch.inf, "inf")])
def test_a_loss_that_breaks_finite_outputs_is_named(tmp_path: Path, factor: float, norm: str) -> None:
    running = training(tmp_path)
    running.module.loss = lambda outputs, labels: torch.inf + factor * running.module.net.fc1.neuron.k
    with pytest.raises(
        DivergenceError, match=rf"step 1 .*: the loss is inf, .* gradient {norm}\. It began in the loss\."
    ):
        running.run()


def test_gradients_that_are_finite_one_by_one_are_told_from_broken_ones(tmp_path: Path) -> None:
    running = training(tmp_path)
    first, second = running.module.net.encoder.neuron, running.module.net.fc1.neuron
    running.module.loss = lambda outputs, labels: 3e38 * (first.k - second.k)
    with pytest.raises(DivergenceError, match=r"gradient inf\. Every gradient is finite, but not their norm\."):
        running.run()


def test_a_gradient_that_breaks_after_a_finite_loss_is_named(tmp_path: Path) -> None:
    running = training(tmp_path)
    running.module.net.fc1.neuron.register_full_backward_hook(lambda *of: (of[1][0] * torch.nan,))
    with pytest.raises(DivergenceError) as caught:
        running.run()
    assert "step 1 (epoch 1, batch 1): the loss is 0.1" in str(caught.value)
    assert "It began in the backward pass, at or after the parameter fc1.linear.weight." in str(caught.value)


def test_a_loss_that_stays_a_number_hides_nothing(tmp_path: Path) -> None:
    """NaN currents make no spikes, so that the loss stays a number while the gradients are none."""
    running = training(tmp_path)
    running.data.train.inputs[:] = torch.nan
    with pytest.raises(DivergenceError, match=r"the loss is 0\.1, the norm of its gradient nan"):
        running.run()


def test_the_batch_is_run_again_with_the_same_dropout(tmp_path: Path) -> None:
    """A layer that breaks at one draw of the dropout only is found, as the second run draws the same."""
    running = training(tmp_path)
    linear, seen = running.module.net.fc1.linear, []

    def broken(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(inputs[0].detach().clone())
        same = len(seen) == UPDATES or torch.equal(seen[-1], seen[UPDATES - 1]) if len(seen) >= UPDATES else False
        return output * torch.nan if same else output

    linear.register_forward_hook(broken)
    with pytest.raises(DivergenceError, match=rf"step {UPDATES} .*It began in the layer fc1\.linear \(Linear\)"):
        running.run()
    assert len(seen) == UPDATES + 1


@pytest.mark.filterwarnings("ignore:CUDA is not available:UserWarning")
def test_overflow_while_the_scaler_looks_for_its_scale_is_its_affair(tmp_path: Path) -> None:
    module, stop = training(tmp_path).module, StopOnDivergence()
    for parameter in module.parameters():
        parameter.grad = torch.full_like(parameter, torch.inf)

    def step(scale: float, loss: float) -> None:
        plugin = MixedPrecision("16-mixed", "cuda", torch.amp.GradScaler("cpu", init_scale=scale))
        strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
        trainer: Any = SimpleNamespace(
            precision_plugin=plugin, strategy=strategy, global_step=7, current_epoch=0, world_size=1
        )
        stop.on_train_batch_start(trainer, module, (torch.rand(2, 1, 8, 8), torch.tensor([1, 2])), 7)
        stop.on_before_backward(trainer, module, torch.tensor(loss * scale))
        stop.on_before_optimizer_step(trainer, module, torch.optim.Adam(module.parameters()))

    step(65536.0, 0.1)
    step(1.0, 0.1)
    with pytest.raises(DivergenceError, match="step 8 .*: the loss is 0.1, the norm of its gradient inf"):
        step(0.5, 0.1)
    with pytest.raises(DivergenceError, match="the loss is nan"):
        step(65536.0, float("nan"))


def test_what_a_block_adds_up_is_its_own(tmp_path: Path) -> None:
    """Every layer within the block gives finite values; their sum overflows."""

    class Doubling(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) + torch.finfo(x.dtype).max + torch.finfo(x.dtype).max

    module = training(tmp_path).module
    module.net.conv1.norm = Doubling(module.net.conv1.norm)
    found = broken_in_forward(module, torch.rand(3, 1, 8, 8))
    assert found == "It began in the layer conv1.norm (Doubling): its input is finite, its output is not"


def test_the_search_leaves_no_hook_and_no_state(tmp_path: Path) -> None:
    module = training(tmp_path).module
    assert broken_in_forward(module, torch.rand(3, 1, 8, 8)) is None
    assert not any(layer._forward_hooks for layer in module.modules())
    assert module.net.encoder.neuron.v == 0.0


def test_command_says_it_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    read = DataModule.__init__

    def broken(self: DataModule, *arguments: Any, **options: Any) -> None:
        read(self, *arguments, **options)
        self.train.inputs[:] = torch.inf

    monkeypatch.setattr(DataModule, "__init__", broken)
    command = ["train", "--recipe=digits", "--accelerator=cpu", "--width=0.03125", "--set=time_steps=2"]
    assert cli.main([*command, f"--out={tmp_path / 'out'}"]) == 2
    said = capsys.readouterr().err
    assert "step 1 (epoch 1, batch 1): the loss is 0.1, the norm of its gradient nan. It began in the data" in said
