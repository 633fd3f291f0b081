"""Published neurons, written as users write them, on kernels: held to their own equations in eager float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import published
import pytest
import torch
from published import DERIVED, FUNCTIONAL, NEURONS
from spikingjelly.activation_based import functional, neuron
from tolerance import assert_close, assert_equal
from torch import Tensor, nn

from klif_sj import _compat, check_fused, fuse

pytestmark = pytest.mark.usefixtures("one_thread")

WRITTEN = (*NEURONS, *DERIVED, *(FUNCTIONAL if _compat.SPIKINGJELLY_2 else ()))
STEPS = 6


def shape_for(node: nn.Module) -> tuple[int, ...]:
    channels = any(word in type(node).__name__ for word in ("Channel", "Neuronwise"))
    return (2, 4, 3, 3) if channels else (7, 5)


def eager(node: nn.Module, x: Tensor) -> Tensor:
    """The equations, step by step on the neuron itself; the charge of a LIFNode on 2.x is written out."""
    start = getattr(node, "initial", None)
    for name in _compat.steps.state_names(node):
        value = start if start is not None else node._memories_rv[name]
        node._memories[name] = torch.as_tensor(value, dtype=x.dtype).expand_as(x[0])
    spikes = []
    for step in x:
        if isinstance(node, FUNCTIONAL):
            names = _compat.steps.state_names(node)
            (spike,), states = node.single_step_functional_forward((step,), tuple(getattr(node, n) for n in names))
            node._memories.update(zip(names, states, strict=True))
        elif isinstance(node, DERIVED):
            node.v = node.v + (step - node.v) / node.tau + getattr(node, "drive", 0.0)
            own = type(node) if "neuronal_fire" in vars(type(node)) else published.Node
            spike = own.neuronal_fire(node)
            published.Node.neuronal_reset(node, spike)
        else:
            node.neuronal_charge(step)
            spike = node.neuronal_fire()
            node.neuronal_reset(spike)
        spikes.append(spike)
    return torch.stack(spikes)


def gradients(node: nn.Module, x: Tensor, spikes: Tensor) -> list[Tensor]:
    weights = torch.linspace(-1.0, 1.0, spikes.numel(), dtype=spikes.dtype).view_as(spikes)
    return list(torch.autograd.grad((spikes * weights).sum(), [x, *node.parameters()], allow_unused=True))


@pytest.mark.parametrize("make", WRITTEN, ids=lambda make: make.__name__)
def test_float64_spikes_states_and_gradients_are_those_of_the_equations(make: type[nn.Module]) -> None:
    node, plain = make().double(), make().double()
    fuse(node)
    node.step_mode = "m"
    x = (torch.randn(STEPS, *shape_for(node), dtype=torch.float64) * 1.5 + 0.5).requires_grad_()
    spikes, expected = node(x), eager(plain, x)
    assert expected.unique().numel() > 1
    assert_close(spikes, expected, "spikes")
    for name in _compat.steps.state_names(node):
        assert_close(getattr(node, name), getattr(plain, name), name)
    names = ["x", *(name for name, _ in node.named_parameters())]
    pairs = zip(names, gradients(node, x, spikes), gradients(plain, x, expected), strict=True)
    for name, found, wanted in pairs:
        assert_close(found, wanted, f"gradient of {name}")


@pytest.mark.parametrize("make", WRITTEN, ids=lambda make: make.__name__)
def test_float32_is_the_neurons_own_eager_code(make: type[nn.Module]) -> None:
    check_fused(make(), shape_for(make()))


@pytest.mark.parametrize("make", DERIVED)
def test_the_report_says_where_upstream_ignores_what_a_user_wrote(make: type[nn.Module]) -> None:
    (row,) = fuse(make()).rows
    assert "instead of this class's methods" in row.note
    assert _compat.LINE in row.note


@pytest.mark.skipif(not _compat.SPIKINGJELLY_2, reason="0.0.0.0.14 runs such a neuron itself")
def test_a_neuron_of_the_old_line_runs_on_the_new_one() -> None:
    node = published.RefractoryLIF()
    x = torch.rand(3, 5)
    with pytest.raises(NotImplementedError):
        node(x)
    (row,) = fuse(node).rows
    assert "cannot run a BaseNode with charge, fire and reset" in row.note
    assert node(x).shape == x.shape


def test_a_learned_initial_state_gets_its_gradient_and_starts_again_after_a_reset() -> None:
    node = published.IMP()
    fuse(node)
    node.step_mode = "m"
    x = torch.zeros(1, 2, 5)
    node(x)
    first = node.v
    node(x)
    assert not torch.equal(node.v, first)
    functional.reset_net(node)
    node(x)
    assert_equal(node.v, first)
    node.v.sum().backward()
    assert bool(node.initial.grad.any())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("make", [published.ChannelLIF, published.NeuronwiseLIF])
def test_parameters_meet_their_channels_in_every_layout(make: type[nn.Module], layout: str) -> None:
    node, plain = make().double(), make().double()
    fuse(node)
    node.step_mode = "m"
    x = torch.randn(STEPS, 2, 4, 3, 3, dtype=torch.float64)
    if layout == "channels_last":
        x = x.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)
    elif layout == "sliced":
        x = torch.randn(STEPS, 2, 8, 3, 3, dtype=torch.float64)[:, :, ::2]
    assert_close(node(x), eager(plain, x))


SHAPES = [
    ((), (2, 4)),
    ((1, 1, 1), (2, 4, 3, 3)),
    ((4,), (2, 4)),
    ((4, 1, 1), (2, 4, 3, 3)),
    ((1, 4, 1, 1), (2, 4, 3, 3)),
    ((3,), (2, 4, 3, 3)),
    ((4, 3, 3), (2, 4, 3, 3)),
    ((4, 1, 3), (2, 4, 3, 3)),
    ((2, 1, 1, 1), (2, 4, 3, 3)),
    ((2, 4, 3), (2, 4, 3)),
]
"""Of a parameter, and of a step that it broadcasts against."""


@pytest.mark.parametrize(("shape", "step"), SHAPES)
def test_parameters_of_every_shape(shape: tuple[int, ...], step: tuple[int, ...]) -> None:
    class Shaped(published.Node):
        def __init__(self) -> None:
            super().__init__(v_reset=None)
            count = math.prod(shape)
            self.leak = nn.Parameter(torch.linspace(0.3, 0.9, count).view(shape))
            self.register_buffer("drive", torch.linspace(-0.2, 0.4, count).view(shape))

        def neuronal_charge(self, x: Tensor) -> None:
            self.v = self.v * self.leak + x + self.drive

    differences = check_fused(Shaped(), step)
    assert differences["spikes (m)"] == differences["spikes (s)"] == 0
    assert "gradient of leak (m)" in differences


class LearnedSlope(torch.autograd.Function):
    """A spike whose surrogate's slope has a gradient, and no part in the spike itself."""

    @staticmethod
    def forward(ctx: Any, v: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(v, slope)
        return (v >= 0).to(v)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        v, slope = ctx.saved_tensors
        s = torch.sigmoid(slope * v)
        return grad * s * (1 - s) * slope, (grad * s * (1 - s) * v).sum_to_size(slope.shape)


@pytest.mark.parametrize("shape", [(), (1,), (5,)])
def test_a_parameter_that_the_gradient_alone_uses_learns(shape: tuple[int, ...]) -> None:
    class Sloped(published.Node):
        def __init__(self) -> None:
            super().__init__()
            self.slope = nn.Parameter(torch.full(shape, 3.0))
            self.unused = nn.Parameter(torch.ones(()))

        def neuronal_charge(self, x: Tensor) -> None:
            self.v = 0.5 * self.v + x

        def neuronal_fire(self) -> Tensor:
            # An autograd function is given a number, or what has the shape of its input.
            slope = self.slope + torch.zeros_like(self.v) if shape == (5,) else self.slope
            return LearnedSlope.apply(self.v - 1.0, slope)

    assert check_fused(Sloped(), (7, 5))["spikes (m)"] == 0
    node = Sloped()
    assert fuse(node).rows[0].parameters[0].startswith("slope")
    node.step_mode = "m"
    node(torch.randn(4, 7, 5)).sum().backward()
    assert bool(node.slope.grad.all())
    assert node.unused.grad is None


class Rounded(torch.autograd.Function):
    """Straight through."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return torch.round(4 * value) / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Featurewise(published.Node):
    """A neuron whose input has a gain for each feature; ``gain`` says how it comes from ``weight``."""

    def __init__(self, gain: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.3, 0.9, 5))
        self.gain = gain

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = 0.5 * self.v + x * self.gain(self.weight, x)


def partly_without_gradient(weight: Tensor, x: Tensor) -> Tensor:
    with torch.no_grad():
        scale = weight.sigmoid()
    return scale * weight


@pytest.mark.parametrize(
    "gain",
    [
        partly_without_gradient,
        lambda weight, x: weight + (weight.round() - weight).detach(),
        lambda weight, x: Rounded.apply(weight + torch.zeros_like(x)),
    ],
)
def test_gradients_of_parameters_stop_and_pass_as_written(gain: Callable[[Tensor, Tensor], Tensor]) -> None:
    differences = check_fused(Featurewise(gain), (7, 5))
    assert differences["spikes (m)"] == 0
    assert "gradient of weight (m)" in differences


def test_an_autograd_function_of_a_parameter_alone_is_refused() -> None:
    """What runs before the kernel would have the gradient of its operations in place of the function's own."""
    with pytest.raises(ValueError, match=r"'weight' alone to an autograd function.* at test_published.py:\d+ in"):
        fuse(Featurewise(lambda weight, x: Rounded.apply(weight)))


class Sigmoid(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value.sigmoid()


def test_a_parametrized_neuron() -> None:
    node = published.NeuronwiseLIF()
    torch.nn.utils.parametrize.register_parametrization(node, "leak", Sigmoid())
    differences = check_fused(node, (2, 4, 3, 3))
    assert differences["spikes (m)"] == 0
    assert "gradient of parametrizations.leak.original (m)" in differences


def test_a_parameter_that_does_not_fit_the_input_is_named() -> None:
    node = published.ChannelLIF(4)
    fuse(node)
    with pytest.raises(ValueError, match=r"ChannelLIF: parameter 'tau' has shape \(4, 1, 1\)"):
        node(torch.randn(2, 3, 5, 5))


def test_a_changed_parameter_counts_from_the_next_call() -> None:
    node = published.ALIF()
    fuse(node)
    node.step_mode = "m"
    x = torch.rand(STEPS, 2, 5) + 0.5
    node(x)
    functional.reset_net(node)
    with torch.no_grad():
        node.beta.fill_(1e6)
    assert node(x).sum(0).max() <= 1.0


def test_parameters_computed_in_the_step_work_under_torch_compile() -> None:
    node = published.ALIF()
    fuse(node)
    node.step_mode = "m"
    x = torch.rand(STEPS, 2, 5) + 0.5
    expected = node(x)
    functional.reset_net(node)
    assert_equal(torch.compile(node, backend="aot_eager")(x), expected)


class Frozen(published.Node):
    """Reads the value of a parameter in Python."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.ones(5))

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v * float(self.w.mean()) + x


class Clamping(Frozen):
    def neuronal_charge(self, x: Tensor) -> None:
        self.w.data.clamp_(0.0, 1.0)
        self.v = self.v * self.w + x


class Dropping(Frozen):
    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v * nn.functional.dropout(self.w) + x


@pytest.mark.parametrize(
    ("make", "words"),
    [(Frozen, "reads the value of 'w' in Python"), (Clamping, "changes 'w' in place"), (Dropping, "random numbers")],
)
def test_what_a_step_must_not_do_with_parameters_is_refused(make: type[nn.Module], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        fuse(make())


@pytest.mark.skipif(not _compat.SPIKINGJELLY_2, reason="2.x alone has this neuron")
@pytest.mark.parametrize(("channel_dim", "shape"), [(-1, (2, 5)), (-3, (2, 5, 2, 2))])
def test_thresholds_for_each_channel_of_activation_aware_if(channel_dim: int, shape: tuple[int, ...]) -> None:
    threshold = torch.linspace(0.5, 1.5, 5)
    check_fused(neuron.ActivationAwareIFNode(threshold, 0.1 * threshold, channel_dim), shape)
