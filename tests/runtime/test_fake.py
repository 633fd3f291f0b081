"""The operators' fake kernels against their real ones: what torch.compile believes of outputs is what comes."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from cuda_cases import Make, channel_leak, clif, glif, glif_layer_wise, glif_time_wise, klif
from cuda_emulation import emulate
from fused_cases import Adaptive
from tolerance import assert_close
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from versions import needs_compile

from klif_sj import FusedNode, runtime
from klif_sj.runtime import cpu, cuda

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif("cpp" not in runtime.supported_backends(), reason="no C++ compiler on this machine"),
]

NEURONS: tuple[Make, ...] = (klif, clif, glif, glif_time_wise, glif_layer_wise, channel_leak, Adaptive)
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
STEPS = (1, 4, 16, 17, 40)
LAYOUTS = ("contiguous", "channels last", "time last", "expanded over time", "empty")


def looks(tensors: list[Tensor]) -> list[tuple[Any, ...]]:
    return [(tuple(t.shape), t.stride(), t.dtype, t.requires_grad) for t in tensors]


class FakesBesideReal(TorchDispatchMode):
    """Runs the fake kernel of every operator of this package that is called, beside the real one."""

    def __init__(self) -> None:
        super().__init__()
        self.pairs: list[tuple[str, list[tuple[Any, ...]], list[tuple[Any, ...]]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if func.namespace == "klif_sj":
            with FakeTensorMode() as mode:
                fake = func(*tree_map_only(Tensor, mode.from_tensor, args))
            self.pairs.append((func._schema.name, looks(fake), looks(found)))
        return found


def sequence(steps: int, layout: str, dtype: torch.dtype) -> Tensor:
    if layout == "empty":
        return torch.zeros(steps, 0, 5, 3, 2, dtype=dtype)
    x = torch.randn(steps, 2, 5, 3, 2).to(dtype)
    if layout == "channels last":
        return x.movedim(2, -1).contiguous().movedim(-1, 2)
    if layout == "time last":
        return x.movedim(0, -1).contiguous().movedim(-1, 0)
    return x[:1].expand_as(x) if layout == "expanded over time" else x


@pytest.mark.parametrize("make", NEURONS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("target", [cpu, cuda], ids=["cpu", "cuda"])
def test_fakes_look_like_what_comes(target: Any, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output, forward and backward, by shape, strides and dtype. Nothing is launched: outputs are made before."""
    if target is cuda:
        emulate(monkeypatch)
    monkeypatch.setattr(target, "launch", lambda kernel, call: None)
    layouts, counts = itertools.cycle(LAYOUTS), {"klif_sj::forward": 0, "klif_sj::backward": 0}
    for steps, dtype, record, carried, learns in itertools.product(STEPS, DTYPES, *[(False, True)] * 3):
        node: FusedNode = make(steps, 5)
        node.step_mode, node.backend, node.store_v_seq = "m", "cpp", record
        for p in node.parameters():
            p.data = p.data.t().contiguous().t()  # a gradient is contiguous whatever its parameter is
        x = sequence(steps, layout := next(layouts), dtype).requires_grad_(learns)
        if carried:
            state = torch.float64 if dtype == torch.float64 else torch.float32
            for name in node.states:
                setattr(node, name, torch.zeros(x.shape[1:], dtype=state, requires_grad=learns))
        with FakesBesideReal() as watched, torch.set_grad_enabled(learns):
            spikes = node(x)
            if learns:
                sequences = [getattr(node, f"{name}_seq").sum() for name in node.states if record]
                (spikes.sum() + sum(sequences)).backward()
        for name, fake, found in watched.pairs:
            counts[name] += 1
            assert fake == found, f"{name}, T={steps}, {dtype}, {layout}, record={record}, carried={carried}"
    assert counts == {"klif_sj::forward": 160, "klif_sj::backward": 80}


@needs_compile
def test_compiled_with_checkpoints_that_only_the_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A time-wise GLIF is walked 4 steps at a time on a GPU, 16 on the host."""
    emulate(monkeypatch)
    node, x = glif_time_wise(17, 5), torch.randn(17, 2, 5, 4, requires_grad=True)
    node.step_mode, node.backend = "m", "cpp"
    leaves = [x, *(p for p in node.parameters() if p.requires_grad)]
    found = []
    for run in (node, torch.compile(node, fullgraph=True, backend="aot_eager")):
        node.reset()
        found.append(torch.autograd.grad(run(x).square().sum(), leaves))
    for actual, expected in zip(found[1], found[0], strict=True):
        assert_close(actual, expected)


def test_a_caller_that_counts_checkpoints_otherwise_is_refused() -> None:
    """As a graph that was compiled by another version and kept: its buffer would be too small."""
    node, x = klif(17, 5), torch.randn(17, 3, 5)
    node.step_mode, node.backend = "m", "cpp"
    seen: list[tuple[Any, ...]] = []

    class Keep(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace == "klif_sj":
                seen.append(args)
            return func(*args, **(kwargs or {}))

    with Keep():
        node(x)
    *inputs, checkpoints, record, final = seen[0]
    assert checkpoints == 1
    with pytest.raises(RuntimeError, match="expected 0 or 1 checkpoints for 17 steps, got 4; .* compile it again"):
        torch.ops.klif_sj.forward(*inputs, 4, record, final)
