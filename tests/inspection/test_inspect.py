"""Every figure of an inspection, held to what is computed by hand or by another way."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from neurons import CPU_BACKENDS
from spikingjelly.activation_based import functional, layer, neuron
from spikingjelly.activation_based.neuron import IFNode, LIFNode, ParametricLIFNode
from spikingjelly.activation_based.surrogate import ATan, Sigmoid
from torch import Tensor, nn

import klif_sj
from klif_sj import CLIFNode, GLIFNode, KLIFNode, LearnableATan, Rect, _compat
from klif_sj.inspection import Inspection, Thresholds
from klif_sj.inspection.watch import Watch, is_spiking_class, spiking_layers_of


class Alone(nn.Module):
    """A network that is one neuron."""

    def __init__(self, neuron: nn.Module) -> None:
        super().__init__()
        self.neuron = neuron

    def forward(self, x: Tensor) -> Tensor:
        return self.neuron(x)


def one(neuron: nn.Module, x: Tensor, **options: Any) -> klif_sj.inspection.LayerInspection:
    (found,) = klif_sj.inspect(Alone(neuron), [x], **options).layers.values()
    return found


def summed(output: Tensor, target: Any) -> Tensor:
    return output.sum()


def test_rates_by_hand() -> None:
    """IF with threshold 1, hard reset: neuron 0 gets 1 a step, neuron 1 gets 0.5, neuron 2 gets nothing."""
    x = torch.tensor([1.0, 0.5, 0.0]).expand(4, 2, 3).clone()
    found = one(IFNode(step_mode="m"), x)
    assert found.rate_by_channel == [1.0, 0.5, 0.0]
    assert found.rate_by_step == pytest.approx([1 / 3, 2 / 3, 1 / 3, 2 / 3])
    assert found.rate == 0.5
    assert (found.never, found.always) == pytest.approx((1 / 3, 1 / 3))
    assert (found.steps, found.shape, found.inputs) == (4, (3,), 2)
    assert found.rate_histogram[0] == found.rate_histogram[10] == found.rate_histogram[19] == 1
    assert sum(found.rate_histogram) == 3


def test_rates_are_of_all_batches_and_channels_are_the_first_dimension() -> None:
    x = torch.zeros(2, 4, 3, 5, 5)
    x[:, :, 1] = 2.0
    silent = torch.zeros(2, 12, 3, 5, 5)
    (found,) = klif_sj.inspect(Alone(IFNode(step_mode="m")), [x, silent]).layers.values()
    assert found.inputs == 16
    assert found.rate_by_channel == [0.0, 0.25, 0.0]
    assert found.rate == pytest.approx(0.25 / 3)
    assert found.never == pytest.approx(2 / 3)


def test_potentials_by_hand() -> None:
    """LIF, tau 2, soft reset: from 1.5 to 0.75 to 1.125, which fires, to 0.8125 from what 0.125 leaves."""
    node = LIFNode(tau=2.0, v_reset=None, surrogate_function=Rect(alpha=2.0), step_mode="m")
    found = one(node, torch.full((3, 1, 1), 1.5)).potential
    assert found is not None
    # u = v - 1: -0.25, 0.125, -0.1875; Rect of alpha 2 has a gradient where abs(u) < 0.25.
    assert (found.values, found.inputs, found.threshold) == (3, 1, 1.0)
    assert found.covered == pytest.approx(2 / 3)
    assert found.near == 1.0
    assert found.distance == pytest.approx(0.1875)
    edges = torch.linspace(found.low, found.high, len(found.counts) + 1)
    expected = torch.histogram(torch.tensor([-0.25, 0.125, -0.1875]), edges).hist
    assert found.counts == expected.int().tolist()
    assert found.below == found.above == 0


def test_potentials_are_measured_in_thresholds() -> None:
    node = IFNode(v_threshold=0.5, step_mode="m")
    found = one(node, torch.tensor([[[10.0, -10.0, 0.25]]])).potential
    assert found is not None
    assert (found.threshold, found.below, found.above) == (0.5, 1, 1)
    assert found.distance == 19.0  # of 19, 21 and 0.5


def hand_temporal(decay: float, slope: Any, u: list[float], reset: str) -> list[float]:
    """Of a LIF neuron with v[t + 1] = decay * after(v[t]) + x: the product of d v[t + 1] / d v[t]."""
    factors = []
    for value in u[:-1]:
        spike = float(value >= 0)
        if reset == "soft":
            factors.append(decay * (1 - slope(value)))
        else:
            factors.append(decay * (1 - spike - (value + 1) * slope(value)))
    products = [1.0]
    for factor in reversed(factors):
        products.append(abs(products[-1] * factor) if len(products) else 0.0)
    return products


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("reset", ["soft", "hard"])
def test_temporal_gradient_by_hand(reset: str, fused: bool) -> None:
    node = LIFNode(
        tau=2.0, decay_input=False, v_reset=None if reset == "soft" else 0.0, surrogate_function=ATan(), step_mode="m"
    )
    x, v, u = [0.7, 0.9, 0.2, 0.6], 0.0, []
    for current in x:
        v = 0.5 * v + current
        u.append(v - 1)
        v = (v - (v >= 1)) if reset == "soft" else v * (v < 1)
    net = Alone(node)
    if fused:
        klif_sj.fuse(net)
    (found,) = klif_sj.inspect(net, [torch.tensor(x).view(4, 1, 1)]).layers.values()
    expected = hand_temporal(0.5, lambda u: 1 / (1 + (math.pi * u) ** 2), u, reset)
    assert found.temporal == pytest.approx(expected, rel=1e-5)
    assert found.fall == pytest.approx(expected[-1] ** (-1 / 3), rel=1e-5)


def test_temporal_gradient_is_of_neurons_that_fire() -> None:
    """A neuron that never fires is a leak of 1 / 2 a step; the other one always fires, which with a detached hard reset
    passes nothing on."""
    node = LIFNode(tau=2.0, decay_input=False, detach_reset=True, step_mode="m")
    x = torch.tensor([0.1, 3.0]).expand(3, 1, 2).clone()
    assert one(node, x).temporal == [1.0, 0.0, 0.0]
    assert one(node, x[..., :1].clone()).temporal == [1.0, 0.5, 0.25]


def test_a_long_sequence_of_a_plain_leak_falls_by_the_leak() -> None:
    """2 ** -299 is 0 in float32."""
    inspection = klif_sj.inspect(Alone(LIFNode(tau=2.0, step_mode="m")), [torch.zeros(300, 2, 3)])
    (found,) = inspection.layers.values()
    assert found.temporal is not None
    assert found.temporal[-1] < 1e-40
    assert found.fall == pytest.approx(2.0, rel=1e-5)
    assert not [each for each in inspection.findings if each.name in ("vanishing-gradient", "detached-time")]


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_the_gradient_of_lif_falls_faster_than_that_of_clif(strength: float) -> None:
    """The CLIF paper's point, with one surrogate, reset and current for both neurons."""
    torch.manual_seed(0)
    x = strength + 0.5 * torch.randn(12, 16, 40)
    make_lif = LIFNode(decay_input=False, v_reset=None, surrogate_function=Rect(alpha=1.0), step_mode="m")
    lif, clif = one(make_lif, x), one(CLIFNode(step_mode="m"), x)
    assert lif.fall > 1.2 * clif.fall
    assert clif.temporal is not None
    assert lif.temporal is not None
    assert clif.temporal[-1] > 10 * lif.temporal[-1]


def test_gradient_of_the_loss_by_hand() -> None:
    """The last step's spike alone is in the loss: dL/du is the surrogate's slope times the temporal gradient."""
    node = LIFNode(tau=2.0, decay_input=False, v_reset=None, surrogate_function=ATan(), step_mode="m")
    x = torch.tensor([0.7, 0.9, 0.2, 0.6]).view(4, 1, 1)
    found = one(node, x, loss=lambda output, target: 3 * output[-1].sum())
    assert found.temporal is not None
    potentials, v = [], 0.0
    for current in x.flatten().tolist():
        v = 0.5 * v + current
        potentials.append(v - 1)
        v -= v >= 1
    slope = 1 / (1 + (math.pi * potentials[-1]) ** 2)
    assert found.gradient == pytest.approx([3 * slope * value for value in reversed(found.temporal)], rel=1e-5)
    assert found.reached


def test_gradient_equals_that_of_the_whole_network() -> None:
    """In a network that sees every potential by itself: with retain_grad, over the whole batch."""
    torch.manual_seed(3)
    net = nn.Sequential(
        layer.Linear(6, 5, step_mode="m"), KLIFNode(step_mode="m", backend="torch"), layer.Linear(5, 3, step_mode="m"),
        KLIFNode(step_mode="m", backend="torch"),
    )  # fmt: skip
    x, labels = 3 * torch.rand(4, 7, 6), torch.tensor([0, 1, 2, 0, 1, 2, 0])
    found = klif_sj.inspect(net, [(x, labels)])
    for position in (1, 3):
        node, potentials = net[position], []
        fire = node.neuronal_fire

        def note(node: Any = node, fire: Any = fire, potentials: list[Tensor] = potentials) -> Tensor:
            node.v.retain_grad()
            potentials.append(node.v)
            return fire()

        node.neuronal_fire = note
        functional.reset_net(net)
        nn.functional.cross_entropy(net(x).mean(0), labels).backward()
        expected = [float(potential.grad.abs().mean()) for potential in potentials]
        assert min(expected) > 0
        assert found.layers[str(position)].gradient == pytest.approx(expected, rel=1e-5)
        del node.neuronal_fire


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("make", [KLIFNode, CLIFNode, lambda **o: GLIFNode(5, 8, **o)], ids=["klif", "clif", "glif"])
def test_backends_and_step_modes_agree(make: Any, backend: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(layer.Linear(4, 8), make(backend="torch", step_mode="s"), layer.Linear(8, 3))
    x, labels = 4 * torch.rand(5, 6, 4), torch.arange(6) % 3
    single = klif_sj.inspect(net, [(x, labels)], forward=lambda net, x: torch.stack([net(step) for step in x])).layers[
        "1"
    ]
    functional.set_step_mode(net, "m")
    net[1].backend = backend
    (multi,) = klif_sj.inspect(net, [(x, labels)]).layers.values()
    for name in ("rate", "rate_by_step", "rate_by_channel", "never", "always", "temporal", "gradient"):
        assert getattr(single, name) == pytest.approx(getattr(multi, name), rel=1e-4), name
    assert (single.steps, single.inputs, single.input_changes) == (multi.steps, multi.inputs, multi.input_changes)
    assert single.potential.covered == multi.potential.covered
    assert not single.notes
    assert not multi.notes


ARGUMENTS: dict[str, dict[str, Any]] = {
    "GatedLIFNode": {"T": 4},
    "LIAFNode": {"act": torch.relu, "threshold_related": False},
    "MPBNLIFNode": {"out_features": 8, "mpbn": True, "learnable_vth": False},
    "MaskedPSN": {"k": 2, "T": 4},
    "PSN": {"T": 4},
    "SimpleLIFNode": {"tau": 2.0, "decay_input": True},
    "SlidingPSN": {"k": 2},
}
ALL_STEPS_AT_ONCE = {"PSN", "MaskedPSN", "SlidingPSN"}
OTHERS = (
    "DSR", "FewSpike", "FlexSN", "HGNode", "ILC", "LIFWrapper", "Noisy", "OTTT", "Outlier", "STBIF",
)  # fmt: skip
"""SpikingJelly's neurons that are made for networks of their own."""


UNRUNNABLE = () if _compat.SPIKINGJELLY_2 else ("LIAF",)
"""0.0.0.0.14's LIAFNode raises in every call."""


def published() -> list[str]:
    """SpikingJelly's other neurons."""
    classes = {name: cls for name, cls in vars(neuron).items() if isinstance(cls, type) and issubclass(cls, nn.Module)}
    return sorted(
        name
        for name, cls in classes.items()
        if "Base" not in name and not name.startswith((*OTHERS, *UNRUNNABLE)) and is_spiking_class(cls)
    )


@pytest.mark.parametrize("name", published())
def test_every_neuron_of_spikingjelly(name: str) -> None:
    node = getattr(neuron, name)(**ARGUMENTS.get(name, {}))
    functional.set_step_mode(node, "m")
    x = 2 * torch.rand(4, 3, 8, 1, 1) if name == "GatedLIFNode" else 2 * torch.rand(4, 3, 8)
    found = one(node, x, loss=summed)
    assert found.neuron == name
    assert not found.notes
    assert found.potential is not None
    assert found.gradient is not None
    assert any(found.gradient)
    if name in ALL_STEPS_AT_ONCE:
        assert found.temporal is None
    else:
        assert found.temporal is not None
        assert found.temporal[0] == 1.0


def test_learned_parameters_and_their_bounds() -> None:
    found = one(KLIFNode(init_k=1.4, step_mode="m", surrogate_function=LearnableATan(k=0.5)), torch.rand(2, 3, 4))
    k, slope = found.parameters["k"], found.parameters["surrogate_function.k"]
    assert (k.mean, k.bounds, k.at_bound) == (pytest.approx(1.4), (0.5, 5.0), 0.0)
    assert k.to_bound == pytest.approx(0.9 / 4.5)
    assert (slope.mean, slope.at_bound) == (0.5, 1.0)
    tau = one(ParametricLIFNode(init_tau=4.0, step_mode="m"), torch.rand(2, 3, 4)).parameters["tau"]
    assert tau.mean == pytest.approx(4.0)
    assert tau.bounds == (1.0, math.inf)
    gates = one(GLIFNode(2, 4, gates="hard"), torch.rand(2, 3, 4)).parameters
    assert gates["alpha"].at_bound == 0.0
    assert 0.4 < gates["alpha"].mean < 0.6
    assert gates["tau"].mean == pytest.approx(0.25)


def test_a_wide_surrogate_covers_all_and_a_step_function_nothing() -> None:
    x = torch.randn(4, 8, 16)
    assert one(IFNode(surrogate_function=Sigmoid(alpha=0.1), step_mode="m"), x).potential.covered == 1.0
    blind = KLIFNode(surrogate_function=lambda u: (u >= 0).to(u), step_mode="m", backend="torch")
    assert one(blind, x).potential.covered == 0.0


def test_the_network_is_left_as_it_was() -> None:
    net = nn.Sequential(layer.BatchNorm2d(4, step_mode="m"), layer.Dropout(0.5), KLIFNode(step_mode="m")).train()
    x = 2 * torch.rand(3, 5, 4, 2, 2)
    net(x).sum().backward()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    gradients = [parameter.grad.clone() for parameter in net.parameters()]
    state, generator = net[2].v, torch.get_rng_state()
    klif_sj.inspect(net, [(x, x), (x, x)])
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), gradients, strict=True))
    assert net[2].v is state
    assert torch.equal(torch.get_rng_state(), generator)
    assert net.training
    assert not net[2]._forward_hooks
    assert not net[2]._forward_pre_hooks


def test_what_is_kept_grows_neither_with_time_nor_with_batches() -> None:
    """But for two numbers a time step: the rate by time step and how much it is of."""

    def held(T: int, batches: int, layers: int) -> int:
        net = nn.Sequential(*(LIFNode(step_mode="m") for _ in range(layers)))
        watch = Watch(1000)
        with watch.attached(spiking_layers_of(net)), torch.no_grad():
            for _ in range(batches):
                watch.sampling = True
                functional.reset_net(net)
                net(torch.rand(T, 4, 50))
                watch.end_of_pass()
        assert all(not entry.calls for entry in watch.layers.values())
        return watch.bytes_held() - 16 * T * layers

    assert held(4, 1, 2) == held(64, 1, 2) == held(4, 9, 2) == 2 * held(4, 1, 1)
    assert held(4, 1, 1) == 8 * 50


def test_a_pass_holds_little_more_than_without_an_inspection() -> None:
    """At its peak: the samples, at most ``sampled_potentials`` a layer, and one layer's replay of them."""
    pytest.importorskip("lightning")
    from klif_sj.training.step_cost import peak_on_cpu

    def extra(T: int) -> int:
        net = nn.Sequential(layer.Linear(64, 256, step_mode="m"), *(KLIFNode(step_mode="m") for _ in range(3)))
        x, labels = torch.rand(T, 32, 64, requires_grad=True), torch.arange(32)

        def plain() -> None:
            functional.reset_net(net)
            torch.autograd.grad(nn.functional.cross_entropy(net(x).mean(0), labels), [x, *net.parameters()])

        def inspected() -> None:
            klif_sj.inspect(net, [(x, labels)], counted_inputs=0, sampled_potentials=4096)

        plain(), inspected()
        return peak_on_cpu(inspected) - peak_on_cpu(plain)

    one_potential = 4
    # A replay holds some thirty numbers a potential in its graph.
    assert extra(32) < extra(8) + 8 * 4096 * one_potential
    assert extra(32) < 100 * 4096 * one_potential


def test_no_target_and_no_loss() -> None:
    found = klif_sj.inspect(Alone(LIFNode(step_mode="m")), [torch.rand(3, 4, 5)])
    (only,) = found.layers.values()
    assert only.gradient is None
    assert only.temporal is not None
    assert any("no gradient of a loss" in note for note in found.notes)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((3, []), TypeError, "net: expected a network, got 3"),
        ((nn.Sequential(nn.Linear(2, 2)), [torch.rand(2, 2)]), ValueError, "expected spiking layers, got a Sequential"),
        ((nn.Sequential(LIFNode(step_mode="m")), []), ValueError, "batches: expected at least one, got none"),
    ],
)
def test_mistakes(arguments: tuple[Any, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        klif_sj.inspect(*arguments)


def test_a_layer_that_does_not_run_and_a_network_of_which_none_does() -> None:
    class Half(nn.Module):
        def __init__(self, used: bool) -> None:
            super().__init__()
            self.used, self.unused = LIFNode(step_mode="m") if used else None, LIFNode(step_mode="m")

        def forward(self, x: Tensor) -> Tensor:
            return x if self.used is None else self.used(x)

    found = klif_sj.inspect(Half(True), [torch.rand(2, 3, 4)])
    assert list(found.layers) == ["used"]
    assert "The layer unused did not run." in found.notes
    with pytest.raises(ValueError, match="none of its 1 spiking layers ran"):
        klif_sj.inspect(Half(False), [torch.rand(2, 3, 4)])


@pytest.mark.parametrize("loss", [lambda output, target: output, lambda output, target: 3])
def test_a_loss_that_is_no_scalar(loss: Any) -> None:
    with pytest.raises(ValueError, match="loss: expected a scalar tensor, got"):
        klif_sj.inspect(Alone(LIFNode(step_mode="m")), [torch.rand(2, 3, 4)], loss)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"sampled_potentials": 0}, ValueError),
        ({"counted_inputs": -1}, ValueError),
        ({"counted_inputs": 1.5}, TypeError),
    ],
)
def test_options_out_of_range(options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"{next(iter(options))}: expected"):
        klif_sj.inspect(Alone(LIFNode(step_mode="m")), [torch.rand(2, 3, 4)], **options)


class Dividing(nn.Module):
    """Makes NaN of zeros."""

    def forward(self, x: Tensor) -> Tensor:
        return x / x.sum(-1, keepdim=True)


def nan_batches() -> Iterator[Tensor]:
    yield torch.rand(3, 2, 4)
    yield torch.rand(3, 2, 4)
    bad = torch.rand(3, 2, 4)
    bad[1, 0] = 0
    yield bad
    yield bad


def test_nan_is_found_in_its_module_and_batch() -> None:
    net = nn.Sequential(nn.Sequential(nn.Identity(), Dividing()), IFNode(step_mode="m"), IFNode(step_mode="m"))
    found = [each for each in klif_sj.inspect(net, nan_batches()).findings if each.name == "not-finite"]
    assert len(found) == 1
    assert found[0].layer == "0.1"
    assert "first in batch 3: the input of this Dividing is finite, its output is not" in found[0].text
    assert "the first spiking layer that it reaches is 1" in found[0].text


def test_nan_in_the_data() -> None:
    x = torch.rand(3, 2, 4)
    x[0, 0, 0] = math.nan
    inspection = klif_sj.inspect(Alone(IFNode(step_mode="m")), [x])
    (found,) = [each for each in inspection.findings if each.name == "not-finite"]
    assert "first in batch 1: the batch itself holds values that are not finite" in found.text
    assert json.dumps(inspection.to_dict(), allow_nan=False)


def test_constant_input_is_one_that_follows_spikes() -> None:
    class Averaging(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.mean(0, keepdim=True).expand_as(x)

    image = torch.rand(1, 8, 6).expand(4, 8, 6)
    net = nn.Sequential(
        layer.Linear(6, 6, step_mode="m"), IFNode(step_mode="m"), Averaging(), layer.Linear(6, 4, step_mode="m"),
        IFNode(step_mode="m"),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight.abs_(), net[3].weight.abs_().mul_(3)
    found = klif_sj.inspect(net, [(image, torch.arange(8) % 4)])
    assert [(each.name, each.layer) for each in found.findings] == [("constant-input", "4")]
    assert not found.layers["1"].input_changes
    assert not found.layers["1"].after_spikes
    assert found.layers["4"].after_spikes


def test_findings_of_a_saturated_layer_and_of_a_vanishing_gradient() -> None:
    x = torch.full((4, 6, 8), 5.0)
    assert [each.name for each in klif_sj.inspect(Alone(IFNode(step_mode="m")), [x]).findings][0] == "saturated"
    forgetful = Alone(LIFNode(tau=50.0, decay_input=False, step_mode="m"))
    with torch.no_grad():
        x = torch.rand(6, 8, 16)
    assert not [f for f in klif_sj.inspect(forgetful, [x]).findings if f.name == "vanishing-gradient"]
    strict = klif_sj.inspect(forgetful, [x], thresholds=Thresholds(fall=1.01))
    (found,) = [f for f in strict.findings if f.name == "vanishing-gradient"]
    assert found.figure == strict.layers["neuron"].fall if "neuron" in strict.layers else found.figure > 1.01
    assert found.threshold == 1.01


def test_a_readout_that_never_fires_by_intent_is_no_finding() -> None:
    node = KLIFNode(v_threshold=math.inf, step_mode="m")
    assert klif_sj.inspect(Alone(node), [torch.rand(3, 4, 5)]).findings == []


def test_no_gradient_reaches_a_layer() -> None:
    class Cut(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.detach()

    net = nn.Sequential(KLIFNode(step_mode="m"), Cut(), layer.Linear(5, 3, step_mode="m"), KLIFNode(step_mode="m"))
    found = klif_sj.inspect(net, [(3 * torch.rand(3, 6, 5), torch.arange(6) % 3)])
    assert found.layers["3"].reached
    assert found.layers["0"].gradient is None
    assert [each.layer for each in found.findings if each.name == "no-gradient"] == ["0"]
    unheard = klif_sj.inspect(net, [torch.rand(3, 6, 5)], lambda output, target: net[2].weight.sum())
    assert [each.layer for each in unheard.findings if each.name == "no-gradient"] == ["0", "3"]


@pytest.mark.parametrize("value", ["0.5", math.nan, True])
def test_thresholds_are_numbers(value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="coverage: expected a"):
        Thresholds(coverage=value)


@pytest.mark.skipif(_compat.operation_counters() is None, reason="SpikingJelly 0.0.0.0.14 has none")
def test_operations_are_those_of_evaluate() -> None:
    from klif_sj.inspection.operations import count_operations

    net = nn.Sequential(
        layer.Linear(4, 8, step_mode="m"), IFNode(step_mode="m"), layer.Linear(8, 3, step_mode="m"),
        IFNode(step_mode="m"),
    )  # fmt: skip
    x = 4 * torch.rand(3, 5, 4)
    found = klif_sj.inspect(net, [(x, torch.arange(5) % 3)], counted_inputs=2).operations
    assert found == count_operations(net.eval(), [x[:, :2]], 2)
    assert found.synaptic_operations > 0
    assert klif_sj.inspect(net, [x], counted_inputs=0).operations is None


def test_json_and_back(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    net = nn.Sequential(layer.Linear(4, 8, step_mode="m"), GLIFNode(3, 8), ParametricLIFNode(step_mode="m"))
    found = klif_sj.inspect(net, [(torch.rand(3, 5, 4), torch.arange(5))], title="a net")
    found.save(tmp_path)
    again = Inspection.load(tmp_path)
    assert again.to_dict() == found.to_dict()
    assert str(again) == str(found)
    assert again.layers["2"].parameters["tau"].bounds == (1.0, math.inf)
    both = found.compare(again)
    both.save(tmp_path / "both")
    with pytest.raises(ValueError, match="expected one inspection in .*, got 2"):
        Inspection.load(tmp_path / "both")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other.json is no inspection that klif-sj inspect wrote"):
        Inspection.load(tmp_path / "other.json")
    with pytest.raises(FileNotFoundError, match="there is no inspection"):
        Inspection.load(tmp_path / "nowhere")
