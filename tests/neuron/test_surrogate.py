"""LearnableATan and Rect: closed forms, in SpikingJelly's own neurons and in ours, on both SpikingJelly lines."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable

import pytest
import torch
from neurons import CPU_BACKENDS, current, weights_for
from spikingjelly.activation_based import functional
from spikingjelly.activation_based import neuron as upstream
from spikingjelly.activation_based import surrogate as upstream_surrogate
from tolerance import assert_close, assert_equal
from torch import Tensor, nn

from klif_sj import KLIFNode, LearnableATan, Rect
from klif_sj._compat import SPIKINGJELLY_2

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SURROGATES = {"LearnableATan": lambda **options: LearnableATan(1.5, 1.7, **options), "Rect": lambda **o: Rect(0.8, **o)}


def points(dtype: torch.dtype = torch.float64) -> Tensor:
    """Both sides of the threshold, and the threshold itself; no point on the edge of a rectangle used here."""
    return torch.cat([torch.linspace(-2.0, 2.0, 40, dtype=dtype), torch.zeros(2, dtype=dtype)]).requires_grad_()


def atan_derivative(u: Tensor, alpha: float) -> Tensor:
    return alpha / (2 * (1 + (math.pi / 2 * alpha * u) ** 2))


@pytest.mark.parametrize("make", SURROGATES.values(), ids=SURROGATES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_forward_is_the_step_function(make: Callable, dtype: torch.dtype) -> None:
    x = points(dtype)
    spike = make()(x)
    assert_equal(spike, (x >= 0).to(dtype))
    spike.sum().backward()
    assert x.grad.dtype == dtype
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("k", [0.75, 1.0, 3.0])
def test_learnable_atan_gradients(alpha: float, k: float) -> None:
    function, x = LearnableATan(alpha, k).double(), points()
    weights = weights_for(x)
    function(x).backward(weights)
    u = k * x.detach()
    assert_close(x.grad, weights * k * atan_derivative(u, alpha))
    assert_close(function.k.grad, (weights * x.detach() * atan_derivative(u, alpha)).sum())


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.5])
def test_rect_gradient(alpha: float) -> None:
    edge = 0.5 / alpha
    edges = torch.tensor([edge, -edge, math.nextafter(edge, 0.0)], dtype=torch.float64)
    x = torch.cat([points().detach(), edges])
    x.requires_grad_()
    Rect(alpha)(x).sum().backward()
    inside = x.detach().abs() < edge
    assert inside[-3:].tolist() == [False, False, True]
    assert_equal(x.grad, alpha * inside.double())


@pytest.mark.parametrize("make", SURROGATES.values(), ids=SURROGATES)
def test_gradients_are_those_of_the_primitive(make: Callable) -> None:
    gradients = []
    for spiking in (True, False):
        function, x = make(spiking=spiking).double(), points()
        function(x).backward(weights_for(x))
        gradients.append([x.grad, *(parameter.grad for parameter in function.parameters())])
    for of_spike, of_primitive in zip(*gradients, strict=True):
        assert_close(of_spike, of_primitive)


def test_primitive_values() -> None:
    x = points().detach()
    assert_close(
        LearnableATan(2.0, 1.5, spiking=False).double()(x), torch.atan(math.pi / 2 * 2.0 * 1.5 * x) / math.pi + 0.5
    )
    assert_close(Rect(2.0, spiking=False)(x), (2.0 * x + 0.5).clamp(0, 1))


@pytest.mark.parametrize("make", SURROGATES.values(), ids=SURROGATES)
def test_gradcheck_of_the_primitive(make: Callable) -> None:
    function = make(spiking=False).double()
    names = [name for name, _ in function.named_parameters()]

    def primitive(x: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(function, dict(zip(names, parameters, strict=True)), (x,))

    assert torch.autograd.gradcheck(primitive, (points(), *function.parameters()))


@pytest.mark.parametrize("make", SURROGATES.values(), ids=SURROGATES)
def test_it_is_a_spikingjelly_surrogate(make: Callable) -> None:
    function, x = make(), points().detach().float()
    assert isinstance(function, upstream_surrogate.SurrogateFunctionBase)
    assert function.spiking
    function.set_spiking_mode(False)
    assert ((function(x) > 0) & (function(x) < 1)).any()
    function.set_spiking_mode(True)
    assert_equal(function(x), (x >= 0).float())
    assert f"alpha={function.alpha}" in repr(function)


@pytest.mark.parametrize("make", SURROGATES.values(), ids=SURROGATES)
def test_spiking_mode_of_a_network(make: Callable) -> None:
    net = nn.Sequential(upstream.IFNode(surrogate_function=make()), KLIFNode(surrogate_function=make()))
    for module in net.modules():
        if isinstance(module, upstream_surrogate.SurrogateFunctionBase):
            module.set_spiking_mode(False)
    out = net(current(4, 6))
    assert ((out > 0) & (out < 1)).any()


# In a neuron


@pytest.mark.parametrize("make", SURROGATES.values(), ids=SURROGATES)
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_in_spikingjellys_own_neuron(make: Callable, step_mode: str) -> None:
    """The gradient of x and of k through time, against a plain loop of LIF's equations."""
    node = upstream.LIFNode(tau=2.0, surrogate_function=make(), step_mode=step_mode).double()
    x = current(dtype=torch.float64, requires_grad=True)
    spike = node(x) if step_mode == "m" else torch.stack([node(step) for step in x])
    spike.backward(weights_for(spike))

    function, plain = make().double(), x.detach().clone().requires_grad_()
    v, spikes = torch.zeros_like(plain[0]), []
    for step in plain:
        v = v + (step - v) / 2.0
        spikes.append(function(v - 1.0))
        v = (1 - spikes[-1]) * v
    expected = torch.stack(spikes)
    expected.backward(weights_for(expected))
    assert_equal(spike, expected)
    assert_close(x.grad, plain.grad)
    learned = dict(node.named_parameters())
    assert learned.keys() == {f"surrogate_function.{name}" for name, _ in function.named_parameters()}
    for name, parameter in function.named_parameters():
        assert parameter.grad.abs() > 1e-3
        assert_close(learned[f"surrogate_function.{name}"].grad, parameter.grad)


@pytest.mark.parametrize("make", SURROGATES.values(), ids=SURROGATES)
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_in_our_neuron(make: Callable, backend: str) -> None:
    """KLIF with k fixed at 1, no ReLU and a hard reset is LIF."""
    ours = KLIFNode(surrogate_function=make(), step_mode="m", backend=backend, activation="identity", learn_k=False)
    theirs = upstream.LIFNode(surrogate_function=make(), step_mode="m")
    results = []
    for node in (ours, theirs):
        x = current(requires_grad=True) if not results else results[0][0].detach().clone().requires_grad_()
        spike = node(x)
        spike.backward(weights_for(spike))
        results.append((x, spike, [p.grad for p in node.surrogate_function.parameters()]))
    (x, spike, gradients), (their_x, their_spike, their_gradients) = results
    assert_equal(spike, their_spike)
    assert_close(x.grad, their_x.grad)
    for gradient, expected in zip(gradients, their_gradients, strict=True):
        assert_close(gradient, expected)


def test_k_learns_in_a_network_of_spikingjellys_neurons() -> None:
    node = upstream.LIFNode(surrogate_function=LearnableATan(), step_mode="m")
    optimizer = torch.optim.SGD(node.parameters(), lr=0.1)
    for _ in range(3):
        functional.reset_net(node)
        optimizer.zero_grad()
        node(current()).mean().backward()
        optimizer.step()
    assert abs(node.surrogate_function.k.item() - 1.0) > 1e-4


# The bounds of k, copies, refusals


@pytest.mark.parametrize(("raw", "effective"), [(-1.0, 0.5), (0.5, 0.5), (2.0, 2.0), (8.0, 5.0)])
def test_k_stays_within_its_bounds(raw: float, effective: float) -> None:
    function, reference, x = LearnableATan(), LearnableATan(k=effective), points(torch.float32).detach()
    function.k.data.fill_(raw)
    for module in (function, reference):
        module.set_spiking_mode(False)
    assert_equal(function(x), reference(x))


@pytest.mark.parametrize("raw", [0.1, 0.5, 2.0, 5.0, 8.0])
@pytest.mark.parametrize("direction", [-1.0, 1.0])
def test_the_gradient_of_k_passes_straight_through_its_clamp(raw: float, direction: float) -> None:
    """At the clamped k, beyond the bounds too: so what several steps add up to does not depend on how they are cut."""
    function, x = LearnableATan().double(), points().detach() + 0.3
    function.k.data.fill_(raw)
    for part in x.split(10):
        function(part).backward(torch.full_like(part, direction))
    expected = direction * (x * atan_derivative(x * min(max(raw, 0.5), 5.0), 2.0)).sum()
    assert_close(function.k.grad, expected)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))], ids=["deepcopy", "pickle"]
)
def test_copies_and_state_dict(clone: Callable) -> None:
    node = upstream.LIFNode(surrogate_function=LearnableATan(k=1.7))
    twin = clone(node)
    assert twin.surrogate_function.k.item() == pytest.approx(1.7)
    assert twin.surrogate_function.k is not node.surrogate_function.k
    assert list(node.state_dict()) == ["surrogate_function.k"]
    file = io.BytesIO()
    torch.save(node.state_dict(), file)
    file.seek(0)
    fresh = upstream.LIFNode(surrogate_function=LearnableATan())
    fresh.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert fresh.surrogate_function.k.item() == pytest.approx(1.7)


@pytest.mark.skipif(not hasattr(upstream_surrogate, "Rect"), reason="SpikingJelly 0.0.0.0.14 has no Rect")
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("spiking", [True, False])
def test_rect_equals_upstreams(alpha: float, spiking: bool) -> None:
    results = []
    for function in (Rect(alpha, spiking), upstream_surrogate.Rect(alpha, spiking)):
        x = torch.linspace(-2.0, 2.0, 65, requires_grad=True)  # the edges of all three windows are among the points
        y = function(x)
        y.backward(weights_for(x))
        results.append((y, x.grad))
    if not spiking:
        # clip's own derivative at its corners is a convention
        corner = (torch.linspace(-2.0, 2.0, 65).abs() - 0.5 / alpha).abs() < 1e-6
        results = [(y, grad.masked_fill(corner, 0.0)) for y, grad in results]
    assert_equal(results[0][0], results[1][0])
    assert_equal(results[0][1], results[1][1])


@pytest.mark.skipif(SPIKINGJELLY_2, reason="SpikingJelly 2 has no CuPy neurons")
def test_spikingjellys_cupy_neurons_are_refused() -> None:
    function = LearnableATan()
    for ask in (lambda: function.cuda_code("x", "y"), lambda: function.cuda_codes("y", "x", "float")):
        with pytest.raises(NotImplementedError, match="gradient of k.*backend='torch'"):
            ask()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: LearnableATan(alpha=0.0), ValueError, "alpha: expected a positive number, got 0.0"),
        (lambda: LearnableATan(alpha=-1.0), ValueError, "alpha: expected a positive number, got -1.0"),
        (lambda: LearnableATan(alpha="2"), TypeError, "alpha: expected a number, got '2'"),
        (lambda: LearnableATan(k=9.0), ValueError, r"k: expected a value within k_bounds .*, got 9.0"),
        (lambda: LearnableATan(k="1"), TypeError, "k: expected a number, got '1'"),
        (lambda: LearnableATan(k_bounds=(2.0, 1.0)), ValueError, "k_bounds: expected 0 < low < high"),
        (lambda: LearnableATan(k_bounds=None), ValueError, "k_bounds: expected two numbers"),
        (lambda: Rect(alpha=0.0), ValueError, "alpha: expected a positive number, got 0.0"),
        (lambda: Rect(alpha=float("inf")), ValueError, "alpha: expected a finite number, got inf"),
        (lambda: Rect(alpha=None), TypeError, "alpha: expected a number, got None"),
    ],
)
def test_wrong_options_are_refused(make: Callable, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()
