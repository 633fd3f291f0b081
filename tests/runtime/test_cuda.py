"""The CUDA kernels without a GPU: their source is executed under emulation, and compiled by NVRTC for every GPU."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cuda_cases import EXECUTED, clif, glif, glif_layer_wise, glif_time_wise, klif, program_of
from cuda_emulation import Emulation, emulate
from tolerance import assert_close, assert_equal
from torch import Tensor

from klif_sj import CLIFNode, FusedNode, KLIFNode
from klif_sj.codegen.kernel import Kernel
from klif_sj.runtime import cuda

pytestmark = pytest.mark.once


def _ran(node: FusedNode, x: Tensor, grad: Tensor, initial: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs and every gradient of a call whose loss reads the spikes and the final states."""
    x = x.detach().requires_grad_()
    states = {name: value.clone().requires_grad_() for name, value in initial.items()}
    node.zero_grad()
    node.reset()
    for name, value in states.items():
        setattr(node, name, value)
    spikes = node(x)
    found = {"spikes": spikes, **{name: getattr(node, name) for name in node.states}}
    loss = (spikes * grad).sum(dtype=torch.float64) + sum((found[n].double() ** 2).sum() for n in node.states)
    loss.backward()
    gradients = {"grad_x": x.grad, **{f"grad_{name}": value.grad for name, value in states.items()}}
    learned = {f"grad_{name}": p.grad for name, p in node.named_parameters() if p.requires_grad}
    return {name: value.detach().clone() for name, value in {**found, **gradients, **learned}.items()}


def _inputs(steps: int, shape: tuple[int, ...], dtype: torch.dtype, channels_last: bool) -> tuple[Tensor, Tensor]:
    x, grad = (torch.randn(steps, *shape).mul(2).to(dtype) for _ in range(2))
    if channels_last:
        x, grad = (
            t.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (steps, shape[0])) for t in (x, grad)
        )
    return x, grad


@pytest.mark.parametrize("case", EXECUTED, ids=lambda c: f"{c[0].__name__}-T{c[1]}-{'x'.join(map(str, c[2]))}-{c[3]}")
@pytest.mark.parametrize("carried", [False, True], ids=["fresh", "carried"])
def test_executed(case: tuple[Any, ...], carried: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA source, run thread by thread, gives what the host's kernel gives: all but the sums bit for bit."""
    make, steps, shape, dtype, channels_last, processors = case
    node = make(steps, shape[1] if len(shape) > 1 else 1)
    node.step_mode, node.backend = "m", "cpp"
    x, grad = _inputs(steps, shape, dtype, channels_last)
    state_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    initial = {name: torch.rand_like(x[0], dtype=state_dtype) for name in node.states} if carried else {}
    expected = _ran(node, x, grad, initial)
    emulation = emulate(monkeypatch, processors)
    actual = _ran(node, x, grad, initial)
    learned = {f"grad_{name}" for name, _ in node.named_parameters()}
    for name, value in expected.items():
        (assert_close if name in learned else assert_equal)(actual[name], value, name)
    launched = [name for name, _, _ in emulation.launches if name != "prepare"]
    assert launched[:2] == ["forward", "backward"]


@pytest.mark.parametrize(
    ("dtype", "steps", "forward", "backward"),
    [(torch.float16, 2, 8, 8), (torch.float16, 4, 8, 8), (torch.float32, 2, 4, 4), (torch.float64, 2, 2, 2)],
)
def test_neighbours_move_together_where_memory_allows(
    dtype: torch.dtype, steps: int, forward: int, backward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16 bytes at a time, in 16 bits for short sequences and in wider storage; one at a time off the boundary."""
    emulation = emulate(monkeypatch)
    node = KLIFNode(step_mode="m", backend="cpp")
    x, grad = _inputs(steps, (4, 64), dtype, False)
    aligned = _ran(node, x, grad, {})
    assert [vector for _, vector, _ in emulation.launches] == [forward, backward, backward]
    emulation.launches.clear()
    padded = x.new_empty(steps * 256 + 1)
    shifted = padded[1:].view(steps, 4, 64).copy_(x)
    unaligned = _ran(node, shifted, grad, {})
    assert [vector for _, vector, _ in emulation.launches] == [1, 1, 1]
    for name, value in aligned.items():
        (assert_close if name == "grad_k" else assert_equal)(unaligned[name], value, name)


def test_recorded_states_and_their_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    node = CLIFNode(step_mode="m", backend="cpp", store_v_seq=True)
    x = torch.randn(5, 3, 50).mul(2)
    results = []
    for emulated in (False, True):
        if emulated:
            emulate(monkeypatch)
        node.reset()
        leaf = x.clone().requires_grad_()
        node(leaf)
        (grad,) = torch.autograd.grad((node.v_seq**2).sum() + node.m_seq.sum(), leaf)
        results.append((node.v_seq.detach(), node.m_seq.detach(), grad))
    for name, actual, expected in zip(("v_seq", "m_seq", "grad_x"), results[1], results[0], strict=True):
        assert_equal(actual, expected, name)


def test_the_same_sums_every_run_and_a_grid_that_covers_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles a block and several blocks a channel: the order of summation is fixed."""
    emulation: Emulation = emulate(monkeypatch, processors=1)
    node = KLIFNode(step_mode="m", backend="cpp")
    x, grad = _inputs(1, (300, 301), torch.float32, False)
    runs = [_ran(node, x, grad, {})["grad_k"] for _ in range(3)]
    assert runs[0] == runs[1] == runs[2]
    _, vector, blocks = next(launch for launch in emulation.launches if launch[0] == "backward")
    tiles = -(-300 * 301 // (cuda.BLOCK * vector))
    assert 1 < blocks < tiles


def _kernels() -> list[tuple[str, Kernel]]:
    """Every neuron forward and backward, in every schedule, over the lengths where the code differs."""
    kernels = []
    for make in (klif, clif, glif, glif_time_wise, glif_layer_wise):
        for steps in (1, 4, 8, 16):
            program = program_of(make(steps, 5))
            for dtype in (torch.float32, torch.float16):
                for innermost in {False, any(p.per_channel for p in program.parameters)}:
                    for backward in (False, True):
                        name = f"{make.__name__}-T{steps}-{dtype}-{'innermost' if innermost else 'rows'}-{backward}"
                        kernels.append((name, Kernel(program, steps, dtype, innermost, False, backward)))
    long = program_of(glif(40, 5))
    kernels += [(f"glif-T40-innermost-{b}", Kernel(long, 40, torch.float32, True, False, b)) for b in (False, True)]
    program = program_of(glif(16, 5), torch.float64)
    kernels += [
        (f"glif-T16-float64-{innermost}", Kernel(program, 16, torch.float64, innermost, False, True))
        for innermost in (False, True)
    ]
    for dtype in (torch.bfloat16, torch.float64):
        program = program_of(klif(4, 5), torch.float64 if dtype == torch.float64 else torch.float32)
        kernels += [(f"klif-T4-{dtype}-{b}", Kernel(program, 4, dtype, False, True, b)) for b in (False, True)]
    return kernels


KERNELS = _kernels()


def _compile(kernel: Kernel, architecture: int) -> str:
    """NVRTC's log of a kernel compiled to machine code."""
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy's NVRTC bindings are not installed")
    program = nvrtc.createProgram(cuda.source(kernel, cuda.vector_width(kernel)), "kernel.cu", (), ())
    options = (f"--gpu-architecture=sm_{architecture}", *cuda.OPTIONS, "--ptxas-options=-v")
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError as error:
        pytest.fail(f"NVRTC: {error}\n{nvrtc.getProgramLog(program)}")
    return nvrtc.getProgramLog(program)


def _spilled(log: str) -> int:
    found = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    assert found, f"no spill report in NVRTC's log:\n{log}"
    return sum(int(stores) + int(loads) for stores, loads in found)


@pytest.mark.parametrize("kernel", [k for _, k in KERNELS], ids=[name for name, _ in KERNELS])
def test_compiles_without_spilling(kernel: Kernel) -> None:
    """Up to 16 steps nothing is spilled; longer sequences are walked 16 steps at a time, by the same code."""
    spilled = _spilled(_compile(kernel, 90))
    assert spilled == 0 or kernel.steps > 16
