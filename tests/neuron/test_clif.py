"""CLIFNode against a plain loop of its equations, and against SpikingJelly 2's own."""

from __future__ import annotations

import itertools

import pytest
import torch
from neurons import CPU_BACKENDS
from tolerance import assert_close, assert_equal
from torch import Tensor

from klif_sj import CLIFNode, Rect
from klif_sj._compat import SPIKINGJELLY_2

upstream_2 = pytest.mark.skipif(not SPIKINGJELLY_2, reason="0.0.0.0.14 has no CLIF")


def fire(u: Tensor) -> Tensor:
    """1[u >= 0], with the slope of a rectangle of height and width 1."""
    ramp = (u + 0.5).clamp(0, 1)
    return (u >= 0).to(u) + (ramp - ramp.detach())


def reference(
    x_seq: Tensor,
    v: Tensor,
    m: Tensor,
    tau: float = 2.0,
    decay_input: bool = False,
    v_threshold: float = 1.0,
    v_reset: float | None = None,
    detach_reset: bool = False,
) -> dict[str, Tensor]:
    spikes, vs, ms = [], [], []
    for x in x_seq:
        u = v + ((v_reset or 0.0) - v) / tau + (x / tau if decay_input else x)
        spike = fire(u - v_threshold)
        spikes.append(spike)
        if detach_reset:
            spike = spike.detach()
        m = m / (1 + torch.exp(-u / tau)) + spike
        extra = spike / (1 + torch.exp(-m))
        v = u - spike * v_threshold - extra if v_reset is None else u - spike * (u - v_reset) - extra
        vs.append(v)
        ms.append(m)
    return {"spike": torch.stack(spikes), "v": torch.stack(vs), "m": torch.stack(ms)}


def loss_of(result: dict[str, Tensor]) -> Tensor:
    """Each output weighs differently, the final states included."""
    spike, v, m = result["spike"], result["v"][-1], result["m"][-1]
    weights = torch.linspace(-1, 1, spike.numel(), dtype=spike.dtype).view(spike.shape).roll(3, -1)
    return (spike * weights).sum() + (0.3 * v).sum() - (0.2 * m).sum()


@pytest.mark.parametrize("backend", CPU_BACKENDS)
@pytest.mark.parametrize(
    ("tau", "decay_input", "v_reset", "detach_reset"),
    list(itertools.product([2.0, 3.3], [False, True], [None, 0.0, -0.2], [False, True])),
)
def test_equations_in_float64(
    tau: float, decay_input: bool, v_reset: float | None, detach_reset: bool, backend: str
) -> None:
    options = {"tau": tau, "decay_input": decay_input, "v_reset": v_reset, "detach_reset": detach_reset}
    options["v_threshold"] = 0.8
    inputs = [2 * torch.randn(6, 2, 7) + 0.3, 0.5 * torch.randn(2, 7), torch.rand(2, 7)]
    expected_inputs = [value.double().requires_grad_() for value in inputs]
    expected = reference(*expected_inputs, **options)
    loss_of(expected).backward()
    assert 0.05 < expected["spike"].mean() < 0.95

    node = CLIFNode(**options, step_mode="m", backend=backend, store_v_seq=True)
    x, node.v, node.m = leaves = [value.double().requires_grad_() for value in inputs]
    spike = node(x)
    result = {"spike": spike, "v": node.v_seq, "m": node.m_seq}
    loss_of(result).backward()

    assert_equal(spike, expected["spike"])
    for name in ("v", "m"):
        assert_close(result[name], expected[name], name)
    for name, leaf, expected_leaf in zip(("x", "v", "m"), leaves, expected_inputs, strict=True):
        assert_close(leaf.grad, expected_leaf.grad, f"gradient of {name}")


def test_two_steps_by_hand() -> None:
    node = CLIFNode()
    assert node(torch.tensor([1.5])).item() == 1
    # U = 1.5 fires; M = 0 + 1; V = 1.5 - (1 + sigmoid(1)).
    assert node.m.item() == 1
    assert node.v.item() == pytest.approx(-0.2310585786, rel=1e-6)
    # U = V / 2 + 0.6; no spike; M decays by sigmoid(U / 2), V stays U.
    assert node(torch.tensor([0.6])).item() == 0
    assert node.v.item() == pytest.approx(0.4844707107, rel=1e-6)
    assert node.m.item() == pytest.approx(0.5602644437, rel=1e-6)


def test_the_defaults_are_the_authors() -> None:
    node, other = CLIFNode(), CLIFNode()
    assert (node.tau, node.decay_input, node.v_threshold, node.v_reset) == (2.0, False, 1.0, None)
    assert isinstance(node.surrogate_function, Rect)
    assert node.surrogate_function.alpha == 1.0
    assert node.surrogate_function is not other.surrogate_function
    assert list(node.parameters()) == []


@upstream_2
@pytest.mark.parametrize("tau", [2.0, 3.3])
@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_equals_upstream(tau: float, backend: str) -> None:
    from spikingjelly.activation_based.neuron import ComplementaryLIFNode

    ours = CLIFNode(tau=tau, step_mode="m", backend=backend, store_v_seq=True)
    theirs = ComplementaryLIFNode(tau=tau, step_mode="m", store_state_seqs=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    for _ in range(2):  # the second sequence starts from the states of the first
        x = torch.randn(5, 3, 6)
        x_ours, x_theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        spike, expected = ours(x_ours), theirs(x_theirs)
        assert_equal(spike, expected)
        assert_close(ours.v_seq, theirs.state_seqs[0])
        assert_close(ours.m_seq, theirs.state_seqs[1])
        weights = torch.randn_like(x)
        (spike * weights).sum().backward()
        (expected * weights).sum().backward()
        assert_close(x_ours.grad, x_theirs.grad)
        ours.detach()
        theirs.detach()


@upstream_2
def test_eval_mode_has_the_gradient_that_upstream_lacks() -> None:
    from spikingjelly.activation_based.neuron import ComplementaryLIFNode

    x = torch.randn(4, 2, 6)
    gradients = {}
    for name, node in {
        "ours": CLIFNode(step_mode="m").eval(),
        "theirs": ComplementaryLIFNode(step_mode="m").eval(),
        "theirs in training": ComplementaryLIFNode(step_mode="m"),
    }.items():
        leaf = x.clone().requires_grad_()
        spike = node(leaf)
        if spike.requires_grad:
            spike.sum().backward()
        gradients[name] = leaf.grad
    assert_close(gradients["ours"], gradients["theirs in training"])
    assert gradients["ours"].abs().sum() > 0
    assert gradients["theirs"] is None or not torch.equal(gradients["theirs"], gradients["ours"])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tau": 1.0}, ValueError, r"tau: expected .* above 1, got 1\.0"),
        ({"tau": -2}, ValueError, "tau: expected .* above 1, got -2"),
        ({"tau": float("nan")}, ValueError, "tau: expected a finite number"),
        ({"tau": "2"}, TypeError, "tau: expected a number, got '2'"),
        ({"decay_input": 0.5}, TypeError, "decay_input: expected True or False"),
        ({"v_threshold": None}, TypeError, "v_threshold: expected a number"),
    ],
)
def test_wrong_options_are_refused(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CLIFNode(**options)
