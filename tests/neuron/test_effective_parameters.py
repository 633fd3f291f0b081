"""Effective parameters: computed in the kernel where they are elementwise, outside of it in every other case."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from neurons import CHANNELS, CPU_BACKENDS, STEPS, current, weights_for
from tolerance import assert_close, assert_equal
from torch import Tensor, nn

from klif_sj import FusedNode
from klif_sj.codegen import PerStep

pytestmark = pytest.mark.skipif("cpp" not in CPU_BACKENDS, reason="no C++ compiler")

Compute = Callable[[Tensor], Tensor]


class Weighted(FusedNode):
    """Weights of channels, or of steps and channels, that are computed from a parameter."""

    def __init__(self, compute: Compute, *shape: int, **options: Any) -> None:
        super().__init__(**{"step_mode": "m"} | options)
        self.compute, self.per_step = compute, len(shape) == 2
        self.raw = nn.Parameter(torch.linspace(0.3, 1.7, torch.Size(shape).numel()).view(shape))

    def effective_parameters(self) -> dict[str, Any]:
        weights = self.compute(self.raw)
        return {"weights": PerStep(weights) if self.per_step else weights}

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = self.v * 0.5 + self.effective.weights * x


def results(node: FusedNode, x: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    spike = node(x)
    return [spike.detach(), *torch.autograd.grad((spike * weights_for(spike)).sum(), [x, node.raw])]


def is_prepared(node: FusedNode) -> bool:
    return any(p.prepared for p in node.program().parameters)


def assert_as_in_torch(compute: Compute, *shape: int) -> FusedNode:
    x = current()
    (spike, *grads), (expected, *expected_grads) = (
        results(Weighted(compute, *shape, backend=backend), x) for backend in ("auto", "torch")
    )
    assert_equal(spike, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad)
    return Weighted(compute, *shape, backend="cpp")


ELEMENTWISE: dict[str, Compute] = {
    "sigmoid": torch.sigmoid,
    "chain": lambda raw: (raw.exp() - 1).clamp(0.5, 2.0) ** 2,
    "where": lambda raw: torch.where(raw > 1, raw, 1 / raw),
    "half detached": lambda raw: raw.detach() * raw,
}

MIXING: dict[str, Compute] = {
    "softmax": lambda raw: CHANNELS * raw.softmax(-1),
    "cumsum": lambda raw: raw.cumsum(-1) / CHANNELS,
    "less the mean": lambda raw: raw.sigmoid() + (raw - raw.mean()),
    "of the largest": lambda raw: raw / raw.max(),
    "normalised": lambda raw: raw / raw.norm(),
    "flip": lambda raw: raw.flip(-1),
    "roll": lambda raw: raw.roll(1, -1),
    "diff": lambda raw: torch.cat([raw[..., :1], raw.diff()], -1),
}

BY_SHAPE: dict[str, Compute] = {
    "numel": lambda raw: raw.sigmoid() * raw.numel() / 10,
    "ndim": lambda raw: raw.sigmoid() * (1 + raw.ndim) / 3,
    "shape": lambda raw: raw.sigmoid() * raw.shape.numel() / 10,
    "branch": lambda raw: raw.tanh() if raw.dim() else raw.sigmoid(),
    "large values": lambda raw: raw.clamp(max=(1 + raw.ndim) / 2),
    "transpose": lambda raw: raw.transpose(0, -1).transpose(0, -1).sigmoid(),
    "matrix transpose": lambda raw: raw.view(-1, CHANNELS).mT.mT.reshape(raw.shape).sigmoid(),
}


@pytest.mark.parametrize("shape", [(CHANNELS,), (STEPS, CHANNELS)], ids=["[C]", "[T, C]"])
@pytest.mark.parametrize("compute", [pytest.param(f, id=name) for name, f in ELEMENTWISE.items()])
def test_an_elementwise_computation_is_part_of_the_kernel(compute: Compute, shape: tuple[int, ...]) -> None:
    assert is_prepared(assert_as_in_torch(compute, *shape))


@pytest.mark.parametrize("shape", [(CHANNELS,), (STEPS, CHANNELS)], ids=["[C]", "[T, C]"])
@pytest.mark.parametrize("compute", [pytest.param(f, id=name) for name, f in {**MIXING, **BY_SHAPE}.items()])
def test_any_other_computation_runs_outside_of_it(compute: Compute, shape: tuple[int, ...]) -> None:
    assert not is_prepared(assert_as_in_torch(compute, *shape))


def test_an_elementwise_operation_without_a_kernel_runs_outside_of_it() -> None:
    assert not is_prepared(assert_as_in_torch(nn.functional.gelu, CHANNELS))


def test_a_transpose_of_as_many_steps_as_channels() -> None:
    x = current(STEPS, 3, STEPS)
    nodes = [Weighted(lambda raw: raw.T, STEPS, STEPS, backend=backend) for backend in ("cpp", "torch")]
    spikes, expected = (results(node, x) for node in nodes)
    assert_equal(spikes[0], expected[0])
    assert_close(spikes[2], expected[2])


def test_weights_that_are_of_steps_if_they_have_two_dimensions() -> None:
    class ByDimensions(Weighted):
        def effective_parameters(self) -> dict[str, Any]:
            weights = self.raw.sigmoid()
            return {"weights": PerStep(weights) if weights.ndim == 2 else weights}

    x = current()
    spikes = [ByDimensions(torch.sigmoid, STEPS, CHANNELS, backend=backend)(x) for backend in ("cpp", "torch")]
    assert_equal(*spikes)


def test_a_gradient_that_depends_on_the_shape() -> None:
    """LSQ scales the gradient of a step size by the number of its values, and leaves the value itself."""

    def scaled(raw: Tensor) -> Tensor:
        scale = raw.numel() ** -0.5
        return raw * scale + (raw - raw * scale).detach()

    assert not is_prepared(assert_as_in_torch(scaled, CHANNELS))


@pytest.mark.parametrize("compute", [lambda raw: raw.detach().sigmoid(), lambda raw: (raw > 1).to(raw) * 1.0])
def test_a_computation_without_a_gradient_has_none(compute: Compute) -> None:
    node = Weighted(compute, CHANNELS, backend="cpp")
    assert not node(current()).requires_grad
    assert not is_prepared(node)


def test_a_computation_runs_once_in_a_call() -> None:
    """One with noise or running means would otherwise draw or move twice, in the first call or one of another form."""

    class Counting(Weighted):
        calls = torch.zeros(())

        def effective_parameters(self) -> dict[str, Any]:
            self.calls.add_(1)
            return {"weights": self.raw + self.calls}

    node, x = Counting(torch.sigmoid, CHANNELS, backend="cpp"), current()
    forms = [x, x, x.clone().requires_grad_(), x.transpose(1, 2).contiguous().transpose(1, 2), x.expand(2, *x.shape)[0]]
    for count, given in enumerate(forms, 1):
        node(given)
        node.reset()
        assert node.calls == count


def test_an_effective_parameter_that_the_step_does_not_read() -> None:
    class Idle(Weighted):
        def neuronal_charge(self, x: Tensor) -> None:
            self.v = self.v * 0.5 + x

    x = current()
    spikes = [Idle(torch.sigmoid, CHANNELS, backend=backend)(x) for backend in ("cpp", "torch")]
    assert_equal(*spikes)


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_a_lone_value_is_none_for_each_step(backend: str) -> None:
    class Lone(Weighted):
        def effective_parameters(self) -> dict[str, Any]:
            return {"weights": PerStep(self.raw.sum())}

    with pytest.raises(
        ValueError, match=r"'weights': expected PerStep values of shape \[T\] or \[T, C\], got a single"
    ):
        Lone(torch.sigmoid, CHANNELS, backend=backend)(current())
