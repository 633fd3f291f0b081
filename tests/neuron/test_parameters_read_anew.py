"""New parameters count from the next call on, also within a sequence; a sequence's gradient is that of the whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from neurons import CHANNELS, CPU_BACKENDS, STEPS, current
from tolerance import assert_close, assert_equal
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from klif_sj import FusedNode, GLIFNode, KLIFNode, LearnableATan

backends = pytest.mark.parametrize("backend", CPU_BACKENDS)


def glif(**options: object) -> FusedNode:
    torch.manual_seed(1)
    return GLIFNode(T=STEPS, inplane=CHANNELS, **options)


def glif_hard(**options: object) -> FusedNode:
    torch.manual_seed(1)
    return GLIFNode(T=STEPS, inplane=None, gates="hard", **options)


def klif(**options: object) -> FusedNode:
    return KLIFNode(step_mode="m", surrogate_function=LearnableATan(), **options)


def klif_at_its_bound(**options: object) -> FusedNode:
    return KLIFNode(step_mode="m", init_k=5.0, **options)


class Halved(nn.Module):
    def forward(self, value: Tensor) -> Tensor:
        return value / 2

    def right_inverse(self, value: Tensor) -> Tensor:
        return value * 2


def load(node: FusedNode, new: dict[str, Tensor], x: Tensor) -> Tensor:
    node.load_state_dict(new)
    return node(x)


def assign(node: FusedNode, new: dict[str, Tensor], x: Tensor) -> Tensor:
    node.load_state_dict({name: value.clone() for name, value in new.items()}, assign=True)
    return node(x)


def call(node: FusedNode, new: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(node, new, (x,))


def step(node: FusedNode, new: dict[str, Tensor], x: Tensor) -> Tensor:
    """An optimizer's step from the present values to the new ones."""
    for name, parameter in node.named_parameters():
        parameter.grad = parameter.detach() - new[name]
    torch.optim.SGD(node.parameters(), lr=1.0).step()
    return node(x)


def data(node: FusedNode, new: dict[str, Tensor], x: Tensor) -> Tensor:
    for name, parameter in node.named_parameters():
        parameter.data = new[name].clone()
    return node(x)


@backends
@pytest.mark.parametrize("change", [load, assign, call, step, data])
@pytest.mark.parametrize("make", [glif, glif_hard, klif, klif_at_its_bound])
def test_new_values_within_a_sequence(make: Callable[..., FusedNode], change: Callable, backend: str) -> None:
    x, node = current(), make(backend=backend)
    node(x)
    states = {name: getattr(node, name).detach().clone() for name in node.states}
    new = {name: parameter.detach() - 0.5 for name, parameter in node.named_parameters()}
    reference = make(backend="torch")
    reference.load_state_dict(new)
    for name, state in states.items():
        setattr(reference, name, state)
    assert_equal(change(node, new, x), reference(x))
    assert_close(node.v, reference.v)


@backends
@pytest.mark.parametrize("make", [glif, klif])
def test_a_parametrization(make: Callable[..., FusedNode], backend: str) -> None:
    x, node, reference = current(), make(backend=backend), make(backend="torch")
    node(x)
    for each in (node, reference):
        each.reset()
        owner, name = (each, "tau") if isinstance(each, GLIFNode) else (each.surrogate_function, "k")
        parametrize.register_parametrization(owner, name, Halved())
        with torch.no_grad():
            owner.parametrizations[name].original.mul_(1.3)
    results = []
    for each in (node, reference):
        spikes = each(x)
        (spikes * torch.arange(CHANNELS)).sum().backward()
        results.append([spikes, *(p.grad for _, p in sorted(each.named_parameters()))])
    for actual, expected in zip(*results, strict=True):
        assert_close(actual, expected)


@backends
@pytest.mark.parametrize("make", [glif, klif_at_its_bound])
def test_detaching_states_in_place_ends_the_graph(make: Callable[..., FusedNode], backend: str) -> None:
    """As truncated backpropagation through time does it by hand."""
    node, x = make(backend=backend), current()
    for _ in range(3):
        node.zero_grad()
        node(x).sum().backward()
        for name in node.states:
            getattr(node, name).detach_()
    assert all(p.grad is not None for p in node.parameters())


@backends
def test_the_gradient_at_a_bound_is_that_of_all_calls(backend: str) -> None:
    """The rule for a k at its bound judges the gradient of the sequence, however it is cut."""
    x, weight, found = current(), torch.linspace(-1.0, 2.0, CHANNELS), []
    for pieces in ([x], [x[:1], x[1:]], list(x.split(1))):
        node = klif_at_its_bound(backend=backend)
        (torch.cat([node(piece) for piece in pieces]) * weight).sum().backward()
        found.append(node.k.grad)
    for gradient in found[1:]:
        assert_close(gradient, found[0])
