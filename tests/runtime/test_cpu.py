"""What only the host's kernels do: keep costly results for the step back, and store large outputs around the caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from fused_cases import make_glif
from neurons import current
from tolerance import assert_close
from torch import Tensor, nn

from klif_sj import CLIFNode, FusedNode, KLIFNode, runtime
from klif_sj.codegen.program import Program
from klif_sj.runtime import cpu

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif("cpp" not in runtime.supported_backends(), reason="no C++ compiler"),
]


class Saturating(FusedNode):
    """A step that needs a tanh, of which the gradient needs the result, and an exp of a parameter by which v decays."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)
        self.rate = nn.Parameter(torch.tensor(0.6))

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = torch.tanh(self.v * torch.exp(-self.rate) + x)


def program_of(node: FusedNode) -> Program:
    return node.program()


@pytest.mark.parametrize(("node", "kept"), [(KLIFNode(), 0), (CLIFNode(), 2), (Saturating(), 2)], ids=["0", "2", "own"])
def test_backward_keeps_the_costly_results_of_the_step(node: FusedNode, kept: int) -> None:
    program = program_of(node)
    assert program.kept == kept
    if kept:
        assert program.forward_keeping.count("kept[") == kept
        calls = [f"{name}_(" for name in ("sigmoid", "tanh", "exp")]
        assert not any(call in program.backward_of_kept for call in calls)
        assert any(call in program.backward for call in calls)


def train(make: Callable[[], FusedNode], x: Tensor) -> list[Tensor]:
    """Spikes, and the gradients of x and of the parameters."""
    torch.manual_seed(0)  # GLIF's gates start at random
    node = make()
    x = x.detach().requires_grad_()
    spikes = node(x)
    (spikes * torch.linspace(-1, 1, spikes.numel()).view_as(spikes)).sum().backward()
    return [spikes.detach(), x.grad, *(p.grad for p in node.parameters() if p.grad is not None)]


def test_a_kept_result_gives_eager_gradients() -> None:
    x = current(5, 3, 41, dtype=torch.float32)
    eager, kernel = (train(partial(Saturating, step_mode="m", backend=backend), x) for backend in ("torch", "cpp"))
    assert torch.equal(eager[0], kernel[0])
    for expected, actual in zip(eager[1:], kernel[1:], strict=True):
        assert_close(actual, expected)


class InDouble(FusedNode):
    """Part of its step is computed in a wider type than the rest."""

    def neuronal_charge(self, x: Tensor) -> None:
        self.v = 0.5 * self.v + x.double().exp().float()


def test_a_result_of_another_type_is_computed_again() -> None:
    """What is kept has the type of the arithmetic, in which it would be rounded."""
    program = program_of(InDouble())
    assert program.kept == 0
    assert "exp_(" in program.backward


@pytest.fixture
def every_output_is_large(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cpu, "LARGE", 0)
    cpu.load.cache_clear()
    cpu.prepared.cache_clear()
    yield
    cpu.load.cache_clear()
    cpu.prepared.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1, 131, 1024])
def test_stores_around_the_caches_change_nothing(dtype: torch.dtype, size: int, request: pytest.FixtureRequest) -> None:
    """With sizes whose rows start at every alignment, and on two threads."""
    x = current(6, 2, 3, size, dtype=dtype)
    neurons = [partial(KLIFNode, step_mode="m"), partial(make_glif, 6, 3, step_mode="m")]
    ordinary = [train(build, x) for build in neurons]
    request.getfixturevalue("every_output_is_large")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        streamed = [train(build, x) for build in neurons]
    finally:
        torch.set_num_threads(threads)
    for expected, actual in zip(ordinary, streamed, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(expected, actual, strict=True))


def test_a_sequence_may_be_longer_than_a_stack_holds_sums() -> None:
    """Five parameters with a value for each of 4000 steps: their sums for a block would be 20 MB."""
    x = current(4000, 1, 2, 3, dtype=torch.float64)
    eager, kernel = (
        train(partial(make_glif, 4000, 2, time_wise=True, step_mode="m", backend=backend), x)
        for backend in ("torch", "cpp")
    )
    assert torch.equal(eager[0], kernel[0])
    for expected, actual in zip(eager[1:], kernel[1:], strict=True):
        assert_close(actual, expected)
