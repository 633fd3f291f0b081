"""KLIFNode: against SpikingJelly's own, its equations in float64, its bounds and what it refuses.

The sweeps over options run on the torch backend, which the other backends are compared with elsewhere.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from neurons import BATCH, CHANNELS, CPU_BACKENDS, assert_memories, current, snapshot, weights_for
from spikingjelly.activation_based import functional, surrogate
from spikingjelly.activation_based import neuron as upstream
from tolerance import RELATIVE, assert_close, assert_equal
from torch import Tensor, nn

from klif_sj import KLIFNode
from klif_sj._compat import SPIKINGJELLY_2
from klif_sj.neuron.parameters import bounded

# SpikingJelly 0.0.0.0.14's KLIFNode raises with v_reset=None.
V_RESETS = [0.0, -0.2, None] if SPIKINGJELLY_2 else [0.0, -0.2]


def forward_and_backward(node: nn.Module, x: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    spike = node(x)
    ((spike * weights_for(spike)).sum() + node.v.sum()).backward()
    return {"spike": spike, "v": node.v, "gradient of x": x.grad, "gradient of k": node.k.grad}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert_equal(actual["spike"], expected["spike"], "spike")
    for name in ("v", "gradient of x", "gradient of k"):
        assert_close(actual[name], expected[name], name)


# Against SpikingJelly's


@pytest.mark.parametrize("v_reset", V_RESETS)
@pytest.mark.parametrize(
    ("scale_reset", "decay_input", "detach_reset"), list(itertools.product([False, True], repeat=3)), ids=str
)
def test_upstream(scale_reset: bool, decay_input: bool, detach_reset: bool, v_reset: float | None) -> None:
    options = {
        "scale_reset": scale_reset,
        "tau": 1.6,
        "decay_input": decay_input,
        "v_threshold": 0.8,
        "v_reset": v_reset,
        "surrogate_function": surrogate.Sigmoid(alpha=3.0),
        "detach_reset": detach_reset,
        "step_mode": "m",
        "store_v_seq": True,
    }
    ours, theirs = KLIFNode(**options, backend="torch"), upstream.KLIFNode(**options)
    for node in (ours, theirs):
        node.k.data.fill_(1.3)
    for _ in range(2):  # the second sequence starts from the first one's states
        x = current()
        functional.detach_net(ours)
        functional.detach_net(theirs)
        ours.zero_grad()
        theirs.zero_grad()
        assert_same(forward_and_backward(ours, x), forward_and_backward(theirs, x))
        assert_close(ours.v_seq, theirs.v_seq, "v_seq")


def test_state_dicts_load_both_ways() -> None:
    ours, theirs = KLIFNode(init_k=2.5), upstream.KLIFNode()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert theirs.k.item() == 2.5
    theirs.k.data.fill_(0.75)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert ours.k.item() == 0.75


def test_constructor_has_upstreams_order_and_defaults() -> None:
    ours = inspect.signature(KLIFNode).parameters
    theirs = inspect.signature(upstream.KLIFNode).parameters
    positional = [name for name, p in ours.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [name for name in positional if name in theirs] == list(theirs)
    assert set(positional) - set(theirs) <= {"backend"}
    assert all(p.kind is p.KEYWORD_ONLY for name, p in ours.items() if name not in positional)
    different = {name for name, p in theirs.items() if ours[name].default != p.default}
    assert different <= {"surrogate_function", "backend"}


def test_default_surrogate_is_a_fresh_atan() -> None:
    first, second = KLIFNode(), KLIFNode()
    assert type(first.surrogate_function) is surrogate.ATan
    assert first.surrogate_function.alpha == 2.0
    assert first.surrogate_function is not second.surrogate_function


SCRIPT = """
from spikingjelly.activation_based.neuron import LIFNode
from spikingjelly.activation_based import functional, layer, surrogate
import torch

torch.manual_seed(0)
net = torch.nn.Sequential(
    layer.Linear(8, 32), LIFNode(tau=2.0, surrogate_function=surrogate.ATan(), detach_reset=True, step_mode="s"),
    layer.Linear(32, 2), LIFNode(tau=2.0, decay_input=False, v_threshold=1.0, v_reset=0.0),
)
functional.set_step_mode(net, step_mode)
optimizer = torch.optim.Adam(net.parameters(), lr=2e-2)
x = torch.randn(64, 8)
y = (x.sum(1) > 0).long()
losses = []
for _ in range(40):
    rate = net(x.expand(4, -1, -1)).mean(0) if step_mode == "m" else sum(net(x) for _ in range(4)) / 4
    loss = torch.nn.functional.mse_loss(rate, torch.nn.functional.one_hot(y, 2).float())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    functional.reset_net(net)
    losses.append(loss.item())
accuracy = (rate.argmax(1) == y).float().mean().item()
"""


@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_a_script_trains_unchanged_with_the_import_replaced(step_mode: str) -> None:
    results = []
    original = "from spikingjelly.activation_based.neuron import LIFNode"
    for replacement in (original, "from klif_sj import KLIFNode as LIFNode"):
        namespace: dict[str, Any] = {"step_mode": step_mode}
        exec(SCRIPT.replace(original, replacement), namespace)
        assert namespace["losses"][-1] < 0.4 * namespace["losses"][0]
        assert namespace["accuracy"] > 0.9
        results.append(namespace)
    scales = [module.k.item() for module in results[1]["net"].modules() if isinstance(module, KLIFNode)]
    assert len(scales) == 2
    assert all(abs(k - 1.0) > 0.01 for k in scales)


# The equations


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda u: u.clamp_min(0.0),
    "celu": lambda u: torch.where(u > 0, u, torch.expm1(u)),
    "leaky_relu": lambda u: torch.where(u > 0, u, 0.01 * u),
    "identity": lambda u: u,
}


@pytest.mark.parametrize("star", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_follow_the_plain_formula(activation: str, star: bool) -> None:
    x, tau, v_reset = current(dtype=torch.float64), 1.7, -0.1
    node = KLIFNode(
        star, tau, v_reset=v_reset, step_mode="m", backend="torch", activation=activation, init_k=1.5
    ).double()
    result = forward_and_backward(node, x)

    x, k = x.requires_grad_(), torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    fire, v, spikes = surrogate.ATan(alpha=2.0), torch.full_like(x[0], v_reset), []
    for current_t in x:
        f = ACTIVATIONS[activation](k * (v + (current_t - (v - v_reset)) / tau))
        spikes.append(fire(f - 1.0))
        v = (f / k if star else f) * (1 - spikes[-1]) + v_reset * spikes[-1]
    spike = torch.stack(spikes)
    ((spike * weights_for(spike)).sum() + v.sum()).backward()
    assert_same(result, {"spike": spike, "v": v, "gradient of x": x.grad, "gradient of k": k.grad})


@pytest.mark.parametrize("decay_input", [False, True])
@pytest.mark.parametrize("scale_reset", [False, True])
@pytest.mark.parametrize("v_reset", [0.0, -0.2, None])
def test_gradcheck(v_reset: float | None, scale_reset: bool, decay_input: bool) -> None:
    """Against finite differences, with the smooth primitive in the spike's place, for x, the initial v and k."""
    smooth = surrogate.ATan(alpha=2.0, spiking=False)

    def function(x: Tensor, v: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        node = KLIFNode(scale_reset, 1.8, decay_input, 0.7, v_reset, smooth, step_mode="m", backend="torch").double()
        node.v = v
        return torch.func.functional_call(node, {"k": k}, (x,)), node.v

    x = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    v = torch.rand(2, 3, dtype=torch.float64, requires_grad=True)
    k = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(function, (x, v, k))


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_fixed_k(backend: str) -> None:
    fixed = KLIFNode(step_mode="m", backend=backend, learn_k=False)
    learned = KLIFNode(step_mode="m", backend=backend)
    x = current()
    assert list(fixed.state_dict()) == ["k"]
    assert not fixed.k.requires_grad
    result, expected = forward_and_backward(fixed, x), forward_and_backward(learned, x)
    assert result.pop("gradient of k") is None
    assert_equal(result["spike"], expected["spike"])
    assert_close(result["gradient of x"], expected["gradient of x"])


# The bounds of k


@pytest.mark.parametrize(
    ("raw", "effective"), [(-3.0, 0.5), (0.2, 0.5), (0.5, 0.5), (2.0, 2.0), (5.0, 5.0), (9.0, 5.0)]
)
def test_k_is_inside_its_bounds_in_the_forward_pass(raw: float, effective: float) -> None:
    x = current()
    bounded = KLIFNode(step_mode="m", backend="torch", k_bounds=(0.5, 5.0))
    bounded.k.data.fill_(raw)
    reference = KLIFNode(step_mode="m", backend="torch", k_bounds=None, init_k=effective)
    assert_equal(bounded(x), reference(x))
    assert_equal(bounded.v, reference.v)
    assert bounded.k.item() == pytest.approx(raw)


@pytest.mark.parametrize("direction", [-1.0, 1.0], ids=["raising", "lowering"])
@pytest.mark.parametrize(("raw", "effective"), [(0.2, 0.5), (0.5, 0.5), (2.0, 2.0), (5.0, 5.0), (9.0, 5.0)])
def test_only_a_gradient_that_pushes_k_further_out_is_zero(raw: float, effective: float, direction: float) -> None:
    def gradient(k_bounds: tuple[float, float] | None, k: float) -> float:
        node = KLIFNode(step_mode="m", backend="torch", k_bounds=k_bounds)
        node.k.data.fill_(k)
        # All potentials stay below the threshold, so v grows with k.
        node(torch.full((2, 3), 0.1))
        (direction * node.v.sum()).backward()
        return node.k.grad.item()

    unbounded = gradient(None, effective)
    assert unbounded * direction > 0
    outward = (raw >= 5.0 and direction < 0) or (raw <= 0.5 and direction > 0)
    assert gradient((0.5, 5.0), raw) == (0.0 if outward else pytest.approx(unbounded))


@pytest.mark.parametrize("raw", [0.2, 2.0, 9.0])
def test_a_gradient_that_is_no_number_is_not_hidden(raw: float) -> None:
    k = torch.tensor(raw, requires_grad=True)
    bounded(k, 0.5, 5.0).backward(torch.tensor(torch.nan))
    assert k.grad.isnan()


@pytest.mark.parametrize("raw", [0.4, 0.5, 5.0, 5.3])
def test_the_gradient_at_a_bound_does_not_depend_on_the_step_mode(raw: float) -> None:
    x, gradients = current(), []
    for step_mode in ("m", "s"):
        node = KLIFNode(step_mode=step_mode, backend="torch")
        node.k.data.fill_(raw)
        spike = node(x) if step_mode == "m" else torch.stack([node(step) for step in x])
        (spike * weights_for(spike)).sum().backward()
        gradients.append(node.k.grad)
    assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize("step_mode", ["s", "m"])
def test_k_that_changes_within_a_sequence_stays_inside_its_bounds(step_mode: str, backend: str) -> None:
    x, results = current(), []
    for k_bounds, changed in (((0.5, 5.0), 9.0), (None, 5.0)):
        node = KLIFNode(step_mode=step_mode, init_k=2.0, k_bounds=k_bounds, backend=backend)
        spikes = [node(part[0] if step_mode == "s" else part) for part in x[:2].split(1)]
        with torch.no_grad():
            node.k.fill_(changed)
        spikes += [node(part[0] if step_mode == "s" else part) for part in x[2:].split(1)]
        results.append(torch.stack(spikes))
    assert_equal(*results)


def test_k_comes_back_from_beyond_its_bounds() -> None:
    node = KLIFNode(step_mode="m")
    node.k.data.fill_(5.3)
    optimizer = torch.optim.SGD([node.k], lr=2.0)
    for _ in range(5):
        node.reset()
        optimizer.zero_grad()
        node(torch.full((1, 2), 0.1))
        node.v.sum().backward()
        optimizer.step()
    assert 0.5 < node.k.item() < 5.0


def test_k_without_bounds_goes_where_it_is_sent() -> None:
    node = KLIFNode(step_mode="m", k_bounds=None, init_k=12.0)
    node(torch.full((1, 1), 0.1))
    assert node.v.item() == pytest.approx(12.0 * 0.05, rel=RELATIVE[torch.float32])


# Bad input


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": 1.0}, ValueError, "tau: expected a membrane time constant above 1, got 1.0"),
        ({"tau": -2.0}, ValueError, "tau: expected .* above 1, got -2.0"),
        ({"tau": float("nan")}, ValueError, "tau: expected a finite number, got nan"),
        ({"tau": float("inf")}, ValueError, "tau: expected a finite number, got inf"),
        ({"tau": "2"}, TypeError, "tau: expected a number, got '2'"),
        ({"tau": None}, TypeError, "tau: expected a number, got None"),
        ({"v_threshold": "1"}, TypeError, "v_threshold: expected a number, got '1'"),
        ({"v_threshold": None}, TypeError, "v_threshold: expected a number, got None"),
        ({"v_reset": "0"}, TypeError, "v_reset: expected a number, got '0'"),
        ({"v_reset": float("nan")}, ValueError, "v_reset: expected a finite number, got nan"),
        ({"scale_reset": 1}, TypeError, "scale_reset: expected True or False, got 1"),
        ({"decay_input": None}, TypeError, "decay_input: expected True or False, got None"),
        ({"detach_reset": "no"}, TypeError, "detach_reset: expected True or False, got 'no'"),
        ({"learn_k": 0}, TypeError, "learn_k: expected True or False, got 0"),
        ({"activation": "gelu"}, ValueError, "activation: expected one of 'relu', .*'identity', got 'gelu'"),
        ({"k_bounds": (5.0, 0.5)}, ValueError, r"k_bounds: expected 0 < low < high, got \(5.0, 0.5\)"),
        ({"k_bounds": (0.0, 5.0)}, ValueError, r"k_bounds: expected 0 < low < high, got \(0.0, 5.0\)"),
        ({"k_bounds": (-1.0, 5.0)}, ValueError, "k_bounds: expected 0 < low < high"),
        ({"k_bounds": (0.5, float("nan"))}, ValueError, "k_bounds: expected 0 < low < high"),
        ({"k_bounds": (0.5,)}, ValueError, r"k_bounds: expected two numbers \(low, high\), got \(0.5,\)"),
        ({"k_bounds": 5.0}, ValueError, r"k_bounds: expected two numbers \(low, high\), got 5.0"),
        ({"k_bounds": ("a", "b")}, ValueError, r"k_bounds: expected two numbers \(low, high\), got"),
        ({"init_k": 9.0}, ValueError, r"init_k: expected a value within k_bounds \(0.5, 5.0\), got 9.0"),
        ({"init_k": "1"}, TypeError, "init_k: expected a number, got '1'"),
        ({"step_mode": "x"}, ValueError, "step_mode"),
        ({"backend": "triton"}, ValueError, "backend.*'triton'"),
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        KLIFNode(**options)


@pytest.mark.parametrize("tau", [2, 1.5, torch.tensor(2.0).item()])
def test_numbers_of_any_kind_are_taken(tau: float) -> None:
    assert KLIFNode(tau=tau, v_threshold=1, v_reset=0).tau == float(tau)


def test_positional_options_of_the_wrong_line_are_refused() -> None:
    """In SpikingJelly 2 the ninth positional argument is store_v_seq, here as in 0.0.0.0.14 it is backend."""
    with pytest.raises((TypeError, ValueError), match="backend.*True"):
        KLIFNode(False, 2.0, True, 1.0, 0.0, None, False, "m", True)


@pytest.mark.skipif(not SPIKINGJELLY_2, reason="SpikingJelly 2's functional interface")
@pytest.mark.parametrize(
    ("state", "match"),
    [
        (torch.zeros(1, 2), "expected a shape that broadcasts to a step of shape .*, got .1, 2.; reset"),
        (torch.zeros(BATCH, CHANNELS, device="meta"), "expected it on the input's device cpu, got meta; move it"),
    ],
    ids=["shape", "device"],
)
def test_a_state_that_does_not_fit_is_refused(state: Tensor, match: str) -> None:
    node = KLIFNode(step_mode="m")
    node(current())
    before = snapshot(node)
    with pytest.raises(ValueError, match=f"state 'v': {match}"):
        node.functional_forward((current(),), (state,))
    assert_memories(node, before)


@pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler")
def test_a_named_backend_refuses_a_device_that_it_does_not_serve() -> None:
    node = KLIFNode(step_mode="m", backend="cpp")
    node(current())
    before = snapshot(node)
    with pytest.raises(ValueError, match="backend 'cpp': expected a tensor on 'cpu', got one on 'meta'"):
        node(current().to("meta"))
    assert_memories(node, before)


def test_representation_names_the_options() -> None:
    text = repr(KLIFNode(tau=3.0, activation="celu", learn_k=False, k_bounds=None, backend="torch"))
    for expected in ("tau=3.0", "activation=celu", "learn_k=False", "k_bounds=None", "backend=torch", "v_reset=0.0"):
        assert expected in text
