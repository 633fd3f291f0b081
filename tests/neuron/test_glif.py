"""GLIFNode against a plain loop of its equations and SpikingJelly 2's own; its parameters and its refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from neurons import CPU_BACKENDS
from tolerance import assert_close, assert_equal
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from klif_sj import GLIFNode, Rect
from klif_sj._compat import SPIKINGJELLY_2
from klif_sj.neuron.glif import GATES, MEMBRANE

T, N, C, F = 5, 2, 3, 4
NAMES = (*GATES, *MEMBRANE)

upstream_2 = pytest.mark.skipif(not SPIKINGJELLY_2, reason="0.0.0.0.14 has no GLIF")


def randomised(node: GLIFNode) -> GLIFNode:
    with torch.no_grad():
        for parameter in node.parameters():
            parameter.uniform_(-1.5, 1.0)
    return node


def fire(u: Tensor) -> Tensor:
    """1[u >= 0], with the slope of a rectangle of height and width 1."""
    ramp = (u + 0.5).clamp(0, 1)
    return (u >= 0).to(u) + (ramp - ramp.detach())


def reference(x_seq: Tensor, u: Tensor, s: Tensor, raw: dict[str, Tensor], gates: str) -> tuple[Tensor, Tensor]:
    """Spikes and potentials, from raw parameters that all have the shape of a step's, time first: [T or 1, C or 1]."""
    spikes, potentials = [], []
    for t, x in enumerate(x_seq):
        p = {name: torch.sigmoid(value[t if len(value) > 1 else 0]).view(1, -1, 1) for name, value in raw.items()}
        if gates == "none":
            u = p["tau"] * u - p["tau"] * u * s - p["linear_decay"] + x * p["conduct"] - p["v_subreset"] * s
        else:
            a, b, g = (p[name] + (p[name].round() - p[name]).detach() * (gates == "hard") for name in GATES)
            u = (
                (1 - a + a * p["tau"]) * (u - g * s * u)
                - (1 - a) * p["linear_decay"]
                + x * (1 - b + b * p["conduct"])
                - (1 - g) * p["v_subreset"] * s
            )
        s = fire(u - p["v_threshold"])
        spikes.append(s)
        potentials.append(u)
    return torch.stack(spikes), torch.stack(potentials)


def loss_of(spike: Tensor, potential: Tensor) -> Tensor:
    weights = torch.linspace(-1, 1, spike.numel(), dtype=spike.dtype).view(spike.shape).roll(3, -1)
    return (spike * weights).sum() + (0.3 * potential[-1]).sum()


# The equations


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("step_mode", ["s", "m"])
@pytest.mark.parametrize(
    ("gates", "inplane", "time_wise"),
    [  # every pair of options
        ("soft", C, False),
        ("soft", None, True),
        ("hard", C, True),
        ("hard", None, False),
        ("none", C, True),
        ("none", None, False),
    ],
)
def test_equations_in_float64(gates: str, inplane: int | None, time_wise: bool, step_mode: str, backend: str) -> None:
    node = randomised(GLIFNode(T, inplane, gates=gates, time_wise=time_wise, store_v_seq=True, backend=backend))
    node = node.double()
    node.step_mode = step_mode
    raw = {name: value.detach().clone().requires_grad_() for name, value in node.named_parameters()}
    inputs = [torch.randn(T, N, C, F) * 2, torch.randn(N, C, F), torch.randint(2, (N, C, F))]
    expected_inputs = [value.double().requires_grad_() for value in inputs]
    x, node.v, node.spike = leaves = [value.double().requires_grad_() for value in inputs]

    per_step = {name for name in NAMES if name == "conduct" or (time_wise and name in MEMBRANE)}
    as_steps = {name: value.view(T if name in per_step else 1, -1) for name, value in raw.items()}
    expected_spike, expected_v = reference(*expected_inputs, as_steps, gates)
    loss_of(expected_spike, expected_v).backward()
    assert 0.05 < expected_spike.mean() < 0.95

    spike = node(x) if step_mode == "m" else torch.stack([node(step) for step in x])
    loss_of(spike, node.v_seq).backward()
    assert_equal(spike, expected_spike)
    assert_close(node.v_seq, expected_v, "v_seq")
    assert_equal(node.spike_seq, expected_spike, "spike_seq")
    for name, leaf, expected in zip(("x", "v", "spike"), leaves, expected_inputs, strict=True):
        assert_close(leaf.grad, expected.grad, f"gradient of {name}")
    for name, value in node.named_parameters():
        assert_close(value.grad, raw[name].grad, f"gradient of {name}")


def test_two_steps_by_hand() -> None:
    node = GLIFNode(T=2, inplane=None, gates="hard", step_mode="s")
    values = {"alpha": 1.0, "beta": 1.0, "gamma": -1.0, "v_subreset": -1.0}
    with torch.no_grad():
        for name, value in values.items():
            getattr(node, name).fill_(value)
        node.conduct.copy_(torch.tensor([0.0, 1.0]))
    # Gates 1, 1, 0: exponential decay by tau = 1/4, conductance sigmoid(0) then sigmoid(1), soft reset by sigmoid(-1).
    assert node(torch.tensor([[2.0]])).item() == 1
    assert node.v.item() == pytest.approx(1.0)
    assert node(torch.tensor([[0.5]])).item() == 0
    assert node.v.item() == pytest.approx(0.25 + 0.5 * 0.7310585786 - 0.2689414214, rel=1e-6)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_channels_in_another_dimension(backend: str) -> None:
    node = randomised(GLIFNode(T, C, backend=backend))
    other = GLIFNode(T, C, backend=backend, channel_dim=2)
    other.load_state_dict(node.state_dict())
    x = torch.randn(T, N, C, F) * 2
    assert_equal(other(x.transpose(2, 3)).transpose(2, 3), node(x))


class SigmoidSizes(TorchDispatchMode):
    """Notes of how many elements each sigmoid is taken."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.sigmoid.default:
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def test_sigmoids_are_computed_once_per_forward() -> None:
    """Not once a step: seven of the parameters by channel, and one of the conductances."""
    node = GLIFNode(T, C, backend="torch")
    with SigmoidSizes() as sigmoids:
        node(torch.randn(T, N, C, F))
    assert sorted(sigmoids.sizes) == sorted([C] * 7 + [T * C])


@pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler on this machine")
def test_the_kernel_computes_the_sigmoids() -> None:
    node = GLIFNode(T, C, backend="cpp")
    with SigmoidSizes() as sigmoids:
        node(torch.randn(T, N, C, F)).sum().backward()
    assert sigmoids.sizes == []
    assert [p.prepared for p in node.program().parameters] == [True] * 8


def test_parameters_of_one_shape_learn_or_not_each_by_itself() -> None:
    node = GLIFNode(T, C, learn_gates=False)
    node(torch.randn(T, N, C, F)).sum().backward()
    assert {name for name, p in node.named_parameters() if p.grad is not None} == {
        name for name, p in node.named_parameters() if name not in GATES
    }


def test_another_batch_size_in_single_step_mode_starts_at_the_first_step_again() -> None:
    node = randomised(GLIFNode(T, C, step_mode="s"))
    x = torch.randn(T, N + 1, C) * 2
    node(torch.randn(N, C))
    carried = torch.stack([node(step) for step in x])
    assert node.time_step == T
    node.reset()
    assert node.time_step == 0
    assert_equal(carried, torch.stack([node(step) for step in x]))


# Parameters


@pytest.mark.parametrize("inplane", [C, None])
@pytest.mark.parametrize("time_wise", [False, True])
def test_names_shapes_and_initial_values(inplane: int | None, time_wise: bool) -> None:
    node = GLIFNode(T, inplane, time_wise=time_wise, init_tau=0.3, init_v_threshold=0.4, init_conduct=0.6)
    channels = () if inplane is None else (C,)
    membrane = (T, *channels) if time_wise else channels
    shapes = dict.fromkeys(GATES, channels) | dict.fromkeys(MEMBRANE, membrane) | {"conduct": (T, *channels)}
    assert {name: tuple(value.shape) for name, value in node.named_parameters()} == shapes
    expected = {"tau": 0.3, "v_threshold": 0.4, "linear_decay": 0.4 / (2 * T), "v_subreset": 0.4, "conduct": 0.6}
    for name, value in expected.items():
        assert_close(torch.sigmoid(getattr(node, name)), torch.full(shapes[name], value), name)
    gates = torch.stack([getattr(GLIFNode(T, 1000), name) for name in GATES])
    assert -0.1 <= gates.min() < -0.095
    assert 0.095 < gates.max() <= 0.1


def test_the_defaults_are_the_authors() -> None:
    node, other = GLIFNode(4, C), GLIFNode(4, C)
    values = {name: torch.sigmoid(getattr(node, name)).mean().item() for name in MEMBRANE}
    expected = {"tau": 0.25, "v_threshold": 0.5, "linear_decay": 0.0625, "v_subreset": 0.5, "conduct": 0.5}
    assert values == pytest.approx(expected, rel=1e-6)
    assert isinstance(node.surrogate_function, Rect)
    assert node.surrogate_function.alpha == 1.0
    assert node.surrogate_function is not other.surrogate_function
    assert node.step_mode == "m"
    assert sum(is_lazy(parameter) for parameter in GLIFNode().parameters()) == 8


def test_hard_gates_are_exactly_0_or_1_and_have_the_soft_gradient() -> None:
    for value in torch.linspace(-6, 6, 101):
        node = GLIFNode(T, inplane=None, gates="hard")
        with torch.no_grad():
            node.alpha.fill_(value)
        gate = node.effective_parameters()["alpha"]
        assert gate.item() == float(torch.sigmoid(value) > 0.5)
        (gradient,) = torch.autograd.grad(gate, node.alpha)
        sigmoid = torch.sigmoid(value)
        assert_close(gradient, sigmoid * (1 - sigmoid))


@pytest.mark.parametrize("learn_gates", [False, True])
@pytest.mark.parametrize("learn_membrane", [False, True])
def test_frozen_parameters_have_no_gradient(learn_gates: bool, learn_membrane: bool) -> None:
    node = GLIFNode(learn_gates=learn_gates, learn_membrane=learn_membrane)
    node(torch.randn(T, N, C, requires_grad=True)).sum().backward()
    for name, parameter in node.named_parameters():
        assert (parameter.grad is not None) == (learn_gates if name in GATES else learn_membrane), name


def test_a_node_without_gates_has_no_gates() -> None:
    node = GLIFNode(T, C, gates="none")
    assert list(node.state_dict()) == list(MEMBRANE)
    node(torch.randn(T, N, C)).sum().backward()
    assert all(parameter.grad is not None for parameter in node.parameters())


# SpikingJelly 2's own


@upstream_2
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_equals_upstream_with_state_dicts_both_ways(backend: str) -> None:
    from spikingjelly.activation_based.neuron import GatedLIFNode

    surrogate_function = Rect(alpha=1.0)
    theirs = GatedLIFNode(T, C, surrogate_function=surrogate_function)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.uniform_(-1.5, 1.0)
    for ours in (GLIFNode(T, C, backend=backend), GLIFNode(backend=backend)):
        ours.load_state_dict(theirs.state_dict(), strict=True)
        x = torch.randn(T, N, C, 3, 3) * 2
        x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        spike, expected = ours(x_ours), theirs(x_theirs)
        assert_equal(spike, expected)
        assert_close(ours.v, theirs.v)
        weights = torch.randn_like(x)
        theirs.zero_grad()
        (spike * weights).sum().backward()
        (expected * weights).sum().backward()
        assert_close(x_ours.grad, x_theirs.grad)
        for name, parameter in theirs.named_parameters():
            assert_close(getattr(ours, name).grad, parameter.grad, name)
        theirs.reset()

    back = GatedLIFNode(T, C, surrogate_function=surrogate_function)
    back.load_state_dict(ours.state_dict(), strict=True)
    assert_equal(back(x), expected)


# Errors


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((T + 1, N, C), rf"at most T = {T} time steps, its length, got {T + 1}"),
        ((T, N, C + 1), rf"dimension 1 of a step's input is expected to have {C} channels, got .*\({N}, {C + 1}\)"),
        ((T, N), rf"expected to have {C} channels, got an input of shape \({N},\)"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(shape: tuple[int, ...], message: str) -> None:
    node = GLIFNode(T, C)
    node(torch.randn(T, N, C))
    before = list(node._memories.items())
    with pytest.raises(ValueError, match=message):
        node(torch.randn(shape))
    assert all(old is node._memories[name] for name, old in before)


def test_a_step_too_many_is_refused() -> None:
    node, x = GLIFNode(T, C, step_mode="s"), torch.randn(N, C)
    for _ in range(T):
        node(x)
    v = node.v
    with pytest.raises(ValueError, match=rf"at most T = {T} time steps.*got {T + 1}; reset the neuron"):
        node(x)
    assert node.v is v
    assert node.time_step == T


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"gates": "firm"}, ValueError, "gates: expected one of 'soft', 'hard', 'none', got 'firm'"),
        ({"init_tau": 1.0}, ValueError, r"init_tau: expected a value strictly between 0 and 1, got 1\.0"),
        ({"init_tau": 2.0}, ValueError, "init_tau"),
        ({"init_conduct": 0}, ValueError, "init_conduct"),
        ({"init_v_threshold": 1.0}, ValueError, "init_v_threshold"),
        ({"init_linear_decay": -0.1}, ValueError, "init_linear_decay"),
        ({"init_v_subreset": "1"}, TypeError, "init_v_subreset: expected a number"),
        ({"T": 0}, ValueError, "T: expected an integer from 1, got 0"),
        ({"T": 4.0}, TypeError, r"T: expected an integer, got 4\.0"),
        ({"inplane": "lasy"}, TypeError, "inplane: expected an integer, None or 'lazy', got 'lasy'"),
        ({"inplane": 0}, ValueError, "inplane: expected an integer from 1, got 0"),
        ({"channel_dim": -1}, ValueError, "channel_dim: expected an integer from 1, got -1"),
        ({"time_wise": 1}, TypeError, "time_wise: expected True or False"),
        ({"learn_gates": "no"}, TypeError, "learn_gates"),
        ({"learn_membrane": None}, TypeError, "learn_membrane"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        GLIFNode(**options)
