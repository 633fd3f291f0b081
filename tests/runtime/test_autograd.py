"""x as the neuron read it: what happens to it afterwards does not change the gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from neurons import CHANNELS, CONTRACTS, CPU_BACKENDS, STEPS, Case, current
from tolerance import assert_close, assert_equal
from torch import Tensor, nn

from klif_sj import KLIFNode
from klif_sj.runtime.launch import address


def residual(h: Tensor, spikes: Tensor) -> Tensor:
    h += spikes
    return h


def zeroed(h: Tensor, spikes: Tensor) -> Tensor:
    with torch.no_grad():
        h.zero_()
    return spikes


@pytest.mark.parametrize("change", [residual, zeroed])
@pytest.mark.parametrize(("case", "backend"), CONTRACTS, ids=[f"{case.name}-{backend}" for case, backend in CONTRACTS])
def test_x_may_change_in_place_after_the_neuron(
    change: Callable[[Tensor, Tensor], Tensor], case: Case, backend: str
) -> None:
    if change is zeroed and backend == "torch":
        pytest.skip("torch's own operations refuse it where they have saved x")
    x, found = current(), []
    for changed in (False, True):
        torch.manual_seed(1)
        body, node = nn.Linear(CHANNELS, CHANNELS), case.make(backend=backend)
        h = body(x)
        spikes = node(h)
        out = change(h, spikes) if changed else h + spikes if change is residual else spikes
        (out * torch.arange(CHANNELS)).sum().backward()
        found.append([out.detach(), *(p.grad for p in (*body.parameters(), *node.parameters()))])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)


@pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler on this machine")
def test_x_is_shared_and_not_copied_until_then() -> None:
    node, x = KLIFNode(step_mode="m"), current()
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        spikes = node(x)
    (kept,) = (t for t in saved if t.shape == x.shape)
    assert address(kept) == address(x)
    before = x.clone()
    x.zero_()
    assert address(kept) != address(x)
    assert_equal(kept, before)
    assert spikes.grad_fn is not None


@pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler on this machine")
def test_memory_that_cannot_be_shared_names_the_neuron() -> None:
    memory = bytearray(4 * 4 * 3 * CHANNELS)
    x = torch.frombuffer(memory, dtype=torch.float32).view(4, 3, CHANNELS)
    spikes = KLIFNode(step_mode="m", tau=3.0)(x)
    x.add_(1.0)
    with pytest.raises(RuntimeError, match=r"KLIFNode.*tau=3.0.*: its input, a state .* changed in place afterwards"):
        spikes.sum().backward()


@pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler on this machine")
def test_negative_views_of_a_single_neuron() -> None:
    """Those of several have steps that are not dense, which are copied."""
    x, slope = (torch.view_as_complex(torch.randn(STEPS, 1, 1, 2)).conj().imag for _ in range(2))
    found = []
    for backend, negative in (("auto", True), ("torch", False)):
        node = KLIFNode(step_mode="m", backend=backend)
        if negative:
            node.k.data = torch.tensor(-1.5 - 1.5j).conj().imag
            assert node.k.is_neg()
            assert x.is_neg()
        else:
            node.k.data.fill_(1.5)
        x, slope = (t if negative else t.resolve_neg().clone() for t in (x.detach(), slope))
        spikes = node(x.requires_grad_())
        found.append([spikes, *torch.autograd.grad(spikes, [x, node.k], slope)])
    for actual, expected in zip(*found, strict=True):
        assert_close(actual, expected)


def test_tensors_that_stand_for_zeros() -> None:
    """They have no memory."""
    node, x = KLIFNode(step_mode="m"), current(requires_grad=True)
    (gradient,) = torch.autograd.grad(node(x), x, torch._efficientzerotensor(x.shape))
    assert not gradient.any()
    node.reset()
    assert not node(torch._efficientzerotensor(x.shape)).any()


def test_batches_of_gradients_are_refused() -> None:
    def spikes(x: Tensor) -> Tensor:
        return KLIFNode(step_mode="m", backend=backend)(x)

    x = current()
    backend = "auto"
    with pytest.raises(RuntimeError, match="batched gradients; .*backend='torch'"):
        torch.autograd.functional.jacobian(spikes, x, vectorize=True)
    one_by_one = torch.autograd.functional.jacobian(spikes, x)
    backend = "torch"
    assert_close(one_by_one, torch.autograd.functional.jacobian(spikes, x, vectorize=True))
