"""A swapped network within the tools that people train with."""

from __future__ import annotations

import copy
import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from spikingjelly.activation_based import functional, layer, monitor, neuron, surrogate
from tolerance import assert_close, assert_equal
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint
from versions import needs_compile

from klif_sj import CLIFNode, GLIFNode, KLIFNode, state_contexts, swap_neurons
from klif_sj.swap.neuron_settings import SPIKING_NEURONS

STEPS, BATCH, FEATURES = 3, 4, 6
ON_2 = pytest.mark.skipif("GatedLIFNode" not in SPIKING_NEURONS, reason="0.0.0.0.14 does not have it")
NEURONS = [
    pytest.param(KLIFNode, {"k": 1.3}, id="KLIF"),
    pytest.param(CLIFNode, {}, id="CLIF"),
    pytest.param(GLIFNode, {"T": STEPS, "inplane": None}, id="GLIF"),
]


def swapped(new: type = KLIFNode, step_mode: str = "m", **options: Any) -> nn.Sequential:
    """A network that was built with LIF, always with the same weights."""
    torch.manual_seed(5)
    net = nn.Sequential(
        layer.Linear(FEATURES, 8),
        neuron.LIFNode(surrogate_function=surrogate.ATan()),
        layer.Linear(8, 2),
        neuron.LIFNode(surrogate_function=surrogate.ATan(), v_threshold=0.3),
    )
    functional.set_step_mode(net, step_mode)
    swap_neurons(net, new, **({"backend": "torch"} | options))
    return net


def batch(count: int = BATCH) -> Tensor:
    torch.manual_seed(6)
    return torch.randn(STEPS, count, FEATURES) * 2


def gradients(net: nn.Module, y: Tensor) -> dict[str, Tensor]:
    """Of a mean over the batch, in dimension 1."""
    net.zero_grad()
    (y.mean(1) * torch.arange(1.0, 1 + y[:, 0].numel()).view(y[:, 0].shape)).sum().backward()
    return {name.removeprefix("module."): parameter.grad.clone() for name, parameter in net.named_parameters()}


def assert_same_gradients(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        assert_close(actual[name], gradient, name)


def train_one_of_two(rank: int, folder: str, new: type, options: dict[str, Any]) -> None:
    """What each of two processes does with its half of the batch."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    net = DistributedDataParallel(swapped(new, **options))
    half = BATCH // 2
    torch.save(gradients(net, net(batch()[:, rank * half : (rank + 1) * half])), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_distributed_data_parallel(tmp_path: Path) -> None:
    net = swapped(KLIFNode, k=1.3)
    expected = gradients(net, net(batch()))
    assert expected["1.k"].abs() > 0
    torch.multiprocessing.spawn(train_one_of_two, (str(tmp_path), KLIFNode, {"k": 1.3}), nprocs=2)
    for rank in range(2):
        assert_same_gradients(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected)


@needs_compile
@pytest.mark.parametrize(("new", "options"), NEURONS)
def test_compile(new: type, options: dict[str, Any]) -> None:
    net = swapped(new, **options)
    expected = net(batch())
    expected_gradients = gradients(net, expected)
    functional.reset_net(net)
    torch.compiler.reset()
    actual = torch.compile(net, backend="aot_eager", fullgraph=True)(batch())
    assert_equal(actual, expected)
    assert_same_gradients(gradients(net, actual), expected_gradients)


@needs_compile
def test_a_network_that_was_compiled_before_the_swap_runs_the_new_neurons() -> None:
    net = nn.Sequential(layer.Linear(FEATURES, 8), neuron.LIFNode())
    functional.set_step_mode(net, "m")
    compiled = torch.compile(net, backend="aot_eager")
    compiled(batch())
    functional.reset_net(net)
    swap_neurons(net, KLIFNode, backend="torch", k=3.0)
    actual = compiled(batch())
    functional.reset_net(net)
    assert_equal(actual, net(batch()))


@pytest.mark.parametrize(("new", "options"), NEURONS)
def test_step_modes(new: type, options: dict[str, Any]) -> None:
    net = swapped(new, **options)
    expected = net(batch())
    assert 0 < expected.mean() < 1
    functional.reset_net(net)
    functional.set_step_mode(net, "s")
    assert_equal(torch.stack([net(x) for x in batch()]), expected)
    functional.reset_net(net)
    functional.set_step_mode(net, "m")
    assert_equal(net(batch()), expected)


def test_monitors_by_class_and_by_name() -> None:
    net = swapped(KLIFNode, store_v_seq=True)
    outputs = monitor.OutputMonitor(net, KLIFNode)
    potentials = monitor.AttributeMonitor("v_seq", pre_forward=False, net=net, instance=KLIFNode)
    y = net(batch())
    assert outputs.monitored_layers == potentials.monitored_layers == ["1", "3"]
    assert_equal(outputs["3"][0], y)
    assert_equal(potentials["1"][0], net[1].v_seq)
    assert potentials["1"][0].shape == (STEPS, BATCH, 8)


def test_a_monitor_from_before_the_swap_goes_on() -> None:
    net = nn.Sequential(layer.Linear(FEATURES, 8), neuron.LIFNode())
    functional.set_step_mode(net, "m")
    outputs = monitor.OutputMonitor(net, neuron.LIFNode)
    swap_neurons(net, KLIFNode, backend="torch")
    y = net(batch())
    assert_equal(outputs["1"][0], y)
    outputs.remove_hooks()
    outputs.clear_recorded_data()
    net(batch())
    assert outputs.records == []


@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize(("new", "options"), NEURONS)
def test_activation_checkpointing(new: type, options: dict[str, Any], step_mode: str) -> None:
    net = swapped(new, step_mode, **options, store_v_seq=True)

    def run(checkpointed: bool) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]], list[Tensor]]:
        def call(x: Tensor) -> Tensor:
            if not checkpointed:
                return net(x)
            return checkpoint(net, x, use_reentrant=False, context_fn=state_contexts(net))

        functional.reset_net(net)
        x = batch()
        y = call(x) if step_mode == "m" else torch.stack([call(step) for step in x])
        states = [dict(net[i].named_memories()) for i in (1, 3)]
        grads = gradients(net, y)
        after = [dict(net[i].named_memories()) for i in (1, 3)]
        assert all(a[name] is b[name] for a, b in zip(states, after, strict=True) for name in a)
        return y, grads, states, [net[i].v_seq for i in (1, 3)]

    y, expected, states, v_seq = run(checkpointed=False)
    again, actual, states_again, v_seq_again = run(checkpointed=True)
    assert_equal(again, y)
    assert_same_gradients(actual, expected)
    for before, after in zip(states, states_again, strict=True):
        assert all(torch.as_tensor(before[name]).equal(torch.as_tensor(after[name])) for name in before)
    for before, after in zip(v_seq, v_seq_again, strict=True):
        assert_equal(after, before)


def test_a_kernel_that_is_first_built_within_a_checkpointed_region() -> None:
    net = swapped(KLIFNode, tau=2.625, backend="auto")
    checkpointed = checkpoint(net, batch(), use_reentrant=False, context_fn=state_contexts(net))
    actual = gradients(net, checkpointed)
    plain = swapped(KLIFNode, tau=2.625, backend="torch")
    assert_equal(checkpointed, plain(batch()))
    functional.reset_net(plain)
    assert_same_gradients(actual, gradients(plain, plain(batch())))


def test_a_checkpointed_region_can_be_recomputed_twice() -> None:
    net = swapped(KLIFNode)
    y = checkpoint(net, batch(), use_reentrant=False, context_fn=state_contexts(net))
    first, second = (torch.autograd.grad(y.sum(), net[0].weight, retain_graph=True)[0] for _ in range(2))
    assert_equal(second, first)


@ON_2
def test_memopt() -> None:
    memopt = importlib.import_module("spikingjelly.activation_based.memopt")
    net = swapped(KLIFNode, k=1.3)
    y = net(batch())
    expected = gradients(net, y)
    functional.reset_net(net)
    wrapped = nn.Sequential(*(memopt.checkpoint_module(net[i : i + 2]) for i in (0, 2)))
    again = wrapped(batch())
    assert_equal(again, y)
    wrapped.zero_grad()
    assert_same_gradients(dict(zip(expected, gradients(wrapped, again).values(), strict=True)), expected)
    optimized = memopt.optimize_memory(
        swapped(KLIFNode, k=1.3), KLIFNode, example_forward=lambda m: m(batch()), level=1
    )
    optimized = optimized[0] if isinstance(optimized, tuple) else optimized
    assert_equal(optimized(batch()), y)


@ON_2
def test_precision_conversion() -> None:
    """Autocast modes serve our neurons; storage types of SpikingJelly's own kernels are refused by it."""
    precision = importlib.import_module("spikingjelly.activation_based.precision")
    net = swapped(KLIFNode)
    prepared = precision.prepare_model_for_precision(net, "cpu", "bf16")
    with prepared.autocast_context():
        y = prepared.model(batch())
    assert y.dtype == torch.bfloat16
    assert net[1].v.dtype == torch.float32
    with pytest.raises(RuntimeError, match="no multi-step IF/LIF/PLIF nodes"):
        precision.prepare_model_for_precision(net, "cpu", {"neuron_storage": "fp16"})


@pytest.mark.parametrize(("new", "options"), NEURONS)
def test_averaged_copies(new: type, options: dict[str, Any]) -> None:
    net = swapped(new, **options)
    y = net(batch())
    y.sum().backward()
    average = AveragedModel(net, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.75))
    average.update_parameters(net)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(1.0)
    average.update_parameters(net)
    for name, parameter in average.module.named_parameters():
        assert_close(parameter.detach(), before[name] + 0.25, name)
    functional.reset_net(average)
    assert net[1].v is not average.module[1].v
    assert average(batch()).shape == y.shape


@pytest.mark.parametrize(("new", "options"), NEURONS)
def test_whole_modules_are_saved_and_copied(new: type, options: dict[str, Any], tmp_path: Path) -> None:
    net = swapped(new, **options)
    expected = net(batch())
    torch.save(net, tmp_path / "net.pt")
    for other in (torch.load(tmp_path / "net.pt", weights_only=False), copy.deepcopy(net)):
        assert type(other[1]) is new
        assert_equal(other[1].v, net[1].v)
        functional.reset_net(other)
        assert_equal(other(batch()), expected)


def test_lightning(tmp_path: Path) -> None:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = swapped(KLIFNode)

        def training_step(self, x: Tensor, index: int) -> Tensor:
            functional.reset_net(self.net)
            return ((self.net(x.transpose(0, 1)) - 0.5) ** 2 * torch.tensor([1.0, 2.0])).mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    swap = swap_neurons(module, KLIFNode, k=1.5)
    assert [row.paths for row in swap.rows] == [("net.1",), ("net.3",)]
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    x = batch(8).transpose(0, 1)
    trainer.fit(module, torch.utils.data.DataLoader(x, batch_size=4))
    assert trainer.global_step == 2
    assert all(module.net[i].k.item() != 1.5 for i in (1, 3))
