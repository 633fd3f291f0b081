"""What the CUDA kernels' code must be: each fault that was mended is found again where its mending is taken out.

A fault that the kernels had, and the test that finds it again without its mending (here, or in the file that is named):

- an option twice, which NVRTC before 12.9 refuses: test_an_option_is_given_once (test_nvrtc)
- subnormal numbers flushed: test_no_instruction_flushes_subnormal_numbers (test_nvrtc)
- headers asked for: test_no_header_is_needed (test_nvrtc)
- fake kernels with the host's checkpoints: test_a_caller_that_counts_checkpoints_otherwise_is_refused (test_fake)
- no INFINITY and NAN: test_numbers_that_are_none_are_defined
- a thread without a context: test_a_context_is_made_where_there_is_none... (test_cuda_launch)
- modules unloaded under their functions: test_functions_keep_their_modules (test_cuda_launch)
- a kernel loaded in a capture: test_nothing_is_loaded_while_a_graph_is_captured (test_cuda_launch)
- a serial second pass, and too many blocks that leave sums: test_few_partial_sums_and_a_block_for_each_sum
- stores narrowed: test_a_step_is_stored_at_once
- loads delayed: test_all_loads_are_asked_for_at_once
- two barriers a sum: test_one_barrier_for_all_sums
- idle threads with channels innermost: test_channels_innermost_leave_few_threads_idle
- a width that falls to 1 at once: test_the_width_is_halved_until_it_fits
- final states that nobody reads: test_keep_state (tests/neuron)
- a forward kernel in the module of a backward one: test_compiles_for_every_architecture (test_nvrtc)
- registers spilled: test_a_wider_thread_would_spill
- divisions that branch: test_no_division_branches_where_its_range_is_known
- products and sums of the gradient apart: test_a_gradients_product_is_rounded_with_its_sum
- a bfloat16 rounded by hand: test_a_16_bit_number_is_rounded_by_one_instruction
"""

from __future__ import annotations

import inspect
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cuda_emulation
import pytest
import torch
from cuda_cases import Make, clif, glif, klif, program_of, ran
from cuda_emulation import emulate
from tolerance import assert_close, assert_equal
from torch import Tensor

from klif_sj import CLIFNode, GLIFNode, KLIFNode
from klif_sj.codegen import kernel as templates
from klif_sj.codegen.kernel import Kernel, template
from klif_sj.codegen.program import Program
from klif_sj.runtime import cpu, cuda, nvrtc
from klif_sj.runtime.cache import CompilerError
from klif_sj.runtime.layout import Geometry

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import sass
from bench import machine_code

pytestmark = pytest.mark.once

try:
    KNOWN = nvrtc.binding().getSupportedArchs()
except CompilerError as error:
    pytest.skip(str(error), allow_module_level=True)

Undo = Callable[[str, str, str], None]


@pytest.fixture
def undo(monkeypatch: pytest.MonkeyPatch) -> Undo:
    """Takes a mending out of a template: undo(file, text, what it was)."""

    def patched(file: str, text: str, before: str) -> None:
        original = template(file)
        assert text in original
        changed = original.replace(text, before)
        known = templates.template
        monkeypatch.setattr(templates, "template", lambda name: changed if name == file else known(name))

    return patched


def kernel_of(make: Make, steps: int, dtype: torch.dtype, backward: bool, channels_innermost: bool = False) -> Kernel:
    return Kernel(program_of(make(steps, 64)), steps, dtype, channels_innermost, False, backward)


def ptx(kernel: Kernel) -> str:
    options = ("--gpu-architecture=compute_80", *cuda.OPTIONS)
    text = nvrtc.compiled(cuda.source(kernel, cuda.vector_width(kernel)), options).decode()
    return text[text.index(f".entry {'backward' if kernel.backward else 'forward'}") :].partition(".entry finish")[0]


def widths(text: str, operation: str) -> set[str]:
    """Of the accesses of 16-bit sequences: those of 32-bit numbers are of parameters, sums and states."""
    return set(re.findall(rf"\b{operation}\.global[\w.:]*?((?:v\d\.)?[bu](?:16|32|64))\b", text))


@pytest.mark.parametrize(("make", "steps", "backward"), [(klif, 8, False), (clif, 4, False), (klif, 4, True)])
def test_a_step_is_stored_at_once(make: Make, steps: int, backward: bool, undo: Undo) -> None:
    kernel = kernel_of(make, steps, torch.float16, backward)
    assert widths(ptx(kernel), "st") == {"v4.u32"}
    undo(
        "cuda.cu",
        "store_bytes<WIDTH>(&pack.lane[offset], to + offset);",
        "for (int i = 0; i < WIDTH / sizeof(E); i++) to[offset + i] = pack.lane[offset + i];",
    )
    assert "u16" in widths(ptx(kernel), "st")


@pytest.mark.parametrize("make", [klif, clif, glif], ids=lambda make: make.__name__)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_sixteen_bytes_at_a_time(make: Make, backward: bool) -> None:
    """Of x, the gradients and the spikes, wherever the registers allow: forward up to 8 steps, backward up to 4."""
    for dtype in (torch.float16, torch.float32):
        text = ptx(kernel_of(make, 4 if backward else 8, dtype, backward))
        accesses = re.findall(r"(?:ld\.global\.L1::no_allocate|st\.global)\.(v4\.u32|v2\.u32|u32|u16)\b", text)
        assert set(accesses) == {"v4.u32"}
        assert len(accesses) >= 12 if backward else 16


def test_one_barrier_for_all_sums(undo: Undo) -> None:
    kernel = kernel_of(glif, 4, torch.float16, True)
    assert len(re.findall(r"\bbar(?:rier)?\.sync", ptx(kernel))) == 1
    undo("cuda.cu", "constexpr int AT_A_TIME = 32;", "constexpr int AT_A_TIME = 1;")
    assert len(re.findall(r"\bbar(?:rier)?\.sync", ptx(kernel))) == 2 * kernel.grads - 1


@pytest.mark.parametrize(("node", "backward"), [(KLIFNode, True), (CLIFNode, False), (CLIFNode, True)])
def test_no_division_branches_where_its_range_is_known(node: Any, backward: bool, undo: Undo) -> None:
    kernel = Kernel(program_of(node()), 4, torch.float16, False, False, backward)
    exact = r"\b(?:div|rcp)\.rn\.f32"
    assert re.findall(exact, ptx(kernel)) == []
    undo("prelude.h", "    return fmaf(r, -fmaf(a, r, -1.0f), r);", "    return 1.0f / a;")
    assert len(re.findall(exact, ptx(kernel))) >= 32


def test_a_16_bit_number_is_rounded_by_one_instruction(undo: Undo) -> None:
    kernel = kernel_of(klif, 4, torch.bfloat16, True)
    assert ptx(kernel).count("cvt.rn.bf16.f32") == 4 * 8
    undo(
        "prelude.h",
        '#if defined(__CUDACC__) && __CUDA_ARCH__ >= 800\n    asm("cvt.rn.bf16',
        '#if 0\n    asm("cvt.rn.bf16',
    )
    assert "cvt.rn.bf16.f32" not in ptx(kernel)


FMA = "fma_(float a, float b, float c) { return fmaf(a, b, c); }"


@pytest.mark.parametrize("channels_innermost", [False, True], ids=["contiguous", "channels_innermost"])
def test_a_gradients_product_is_rounded_with_its_sum(channels_innermost: bool, undo: Undo) -> None:
    """A fifth of the instructions of GLIF's gradient. The step itself has none: its spikes are torch's."""
    assert "fma.rn.f32" not in ptx(kernel_of(glif, 4, torch.float16, False, channels_innermost))
    kernel = kernel_of(glif, 4, torch.float16, True, channels_innermost)
    steps = 4 * cuda.vector_width(kernel)
    arithmetic = r"\b(?:add|sub|mul|fma)\.(?:rn\.)?f32\b"
    fused = ptx(kernel)
    assert fused.count("fma.rn.f32") >= 10 * steps
    undo("prelude.h", FMA, "fma_(float a, float b, float c) { return a * b + c; }")
    apart = ptx(kernel)
    assert "fma.rn.f32" not in apart
    assert len(re.findall(arithmetic, apart)) >= len(re.findall(arithmetic, fused)) + 9 * steps


@pytest.mark.parametrize(
    "node", [KLIFNode(), CLIFNode(), GLIFNode(T=4, inplane=3)], ids=lambda node: type(node).__name__
)
def test_a_gradient_that_is_rounded_less_is_torchs_within_the_tolerance(
    node: Any, undo: Undo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The emulation with fused multiply-adds, as on a GPU: spikes and states stay as they were bit for bit."""
    node.step_mode = "m"
    x, grad = torch.randn(4, 7, 3, 16) * 2, torch.randn(4, 7, 3, 16)
    node.backend = "torch"
    expected = ran(node, x, grad)
    node.backend = "cpp"
    host = ran(node, x, grad)
    emulate(monkeypatch)
    cuda_emulation._compiled.cache_clear()
    once = "INLINE float fma_(float a, float b, float c) { return __builtin_fmaf(a, b, c); }"
    undo("prelude.h", "template <class R> INLINE R fma_(R a, R b, R c) { return a * b + c; }", once)
    actual = ran(node, x, grad)
    cuda_emulation._compiled.cache_clear()
    for name, value in expected.items():
        assert_close(actual[name], value, name)
        if not name.startswith("grad"):
            assert_equal(actual[name], host[name], name)
    assert not torch.equal(actual["grad_x"], host["grad_x"])


def test_numbers_that_are_none_are_defined(undo: Undo) -> None:
    """In a step that clamps to infinity, say."""
    program = Program("Leak", ("v",), (), "float32", "    output = state[0] = x < INFINITY ? x : real(NAN);")
    kernel = Kernel(program, 4, torch.float32, False, False, False)
    ptx(kernel)
    undo("prelude.h", "#define INFINITY __uint_as_float(0x7f800000u)", "")
    with pytest.raises(CompilerError, match='identifier "INFINITY" is undefined'):
        ptx(kernel)


def test_a_wider_thread_would_spill() -> None:
    """Widths end where the registers do: the assembler's report for the next one."""
    program = program_of(glif(16, 5), torch.float64)
    kernel = Kernel(program, 16, torch.float64, False, False, True)
    spilled = []
    for width in (cuda.vector_width(kernel), 2 * cuda.vector_width(kernel)):
        _, log = machine_code.compile_cubin(cuda.source(kernel, width), 90, cuda.OPTIONS)
        said = log[log.index("entry function 'backward'") :]
        spilled.append(int(machine_code.matched(r"(\d+) bytes spill stores", said)[1]))
    assert spilled[0] == 0 < spilled[1]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_all_loads_are_asked_for_at_once(backward: bool, undo: Undo) -> None:
    """By the machine code: a warp waits for memory a few times, not once a step."""
    try:
        machine_code.disassembler()
    except FileNotFoundError as error:
        pytest.skip(str(error))
    pass_ = "backward" if backward else "forward"
    few = sass.read("clif", pass_, "float16", 16, "contiguous", 90).memory_waits
    undo("cuda.cu", "something & bits32(call.channel_repeat >> 32)", "0")
    many = sass.read("clif", pass_, "float16", 16, "contiguous", 90).memory_waits
    assert few <= 4 < 10 < many


# How a launch lies over the neurons


@pytest.mark.parametrize(("inner", "expected"), [(32, 8), (14 * 14, 4), (7 * 10, 2), (7 * 7, 1)])
def test_the_width_is_halved_until_it_fits(inner: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    emulation = emulate(monkeypatch)
    node = GLIFNode(T=2, inplane=3, backend="cpp")
    with torch.no_grad():
        node(torch.randn(2, 2, 3, inner).half())
    assert [launch[:2] for launch in emulation.launches] == [("prepare", expected), ("forward", expected)]
    if expected < 8:  # as it was: one at a time
        source = inspect.getsource(cuda.fitting_vector)
        assert source.count("vector //= 2") == 2
        exec(source.replace("vector //= 2", "vector = 1"), names := {**vars(cuda)})
        monkeypatch.setattr(cuda, "fitting_vector", names["fitting_vector"])
        emulation.launches.clear()
        with torch.no_grad():
            node.reset()
            node(torch.randn(2, 2, 3, inner).half())
        assert {launch[1] for launch in emulation.launches} == {1}


def busy(channels: int, vector: int, wide: int) -> float:
    """The share of threads with channels of their own, where so many lie side by side."""
    return channels / (-(-channels // (wide * vector)) * wide * vector)


@pytest.mark.parametrize("channels", [3, 16, 40, 64, 96, 512])
def test_channels_innermost_leave_few_threads_idle(channels: int) -> None:
    """A block is as wide as the channels ask for; a warp takes several rows where they are few."""
    for vector in (1, 2, 4):
        if channels % vector == 0:
            wide = cuda.block_width(channels, vector)
            assert busy(channels, vector, wide) > 0.5
            assert cuda.BLOCK % wide == 0
    assert busy(64, 8, 32) == 0.25  # as it was: a warp side by side
    # As it was, 256 threads a block: only one fits with the registers that these kernels take.
    assert [sass.scoreboard.resident_blocks(168, threads, 0) * threads for threads in (256, cuda.BLOCK)] == [256, 384]


def test_few_partial_sums_and_a_block_for_each_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    """So the second pass is a few loads for each thread, also with channels innermost."""
    kernel = kernel_of(glif, 4, torch.float16, True, channels_innermost=True)
    layer = kernel, Geometry(1 << 18, 64, 1), cuda.vector_width(kernel), 132
    _, rows, shares = cuda.grid(*layer)
    assert rows * shares >= 1 << 18
    assert shares / cuda.BLOCK <= 8  # loads of a thread, one after the other
    monkeypatch.setitem(cuda.GRADIENT_BLOCKS, True, 1 << 20)  # as it was: a turn a block
    assert cuda.grid.__wrapped__(*layer)[2] / cuda.BLOCK > 100
    emulation = emulate(monkeypatch)
    node, x = GLIFNode(T=2, inplane=6, backend="cpp"), torch.randn(2, 9, 6, 3, 3)
    x = x.flatten(0, 1).to(memory_format=torch.channels_last).unflatten(0, (2, 9))
    node(x).sum().backward()
    assert emulation.launches[-1][0] == "finish"
    assert emulation.launches[-1][2] == 6 * (7 + 2)


def test_the_emulation_refuses_a_vector_off_its_boundary(tmp_path: Path) -> None:
    text = (Path(__file__).parents[1] / "support" / "cuda_on_cpu.h").read_text()
    program = tmp_path / "program.cpp"
    program.write_text(text + "alignas(16) char bytes[32]; int main() { char to[16]; load_bytes<16>(bytes + 8, to); }")
    subprocess.run([*cpu.compiler(), "-std=c++17", str(program), "-o", str(tmp_path / "program")], check=True)
    done = subprocess.run([str(tmp_path / "program")], capture_output=True, text=True)
    assert done.returncode < 0
    assert "a load of 16 bytes is off its boundary" in done.stderr


# The GPU's own arithmetic, with what its special function unit gives replaced by numbers that are off by as much as
# NVIDIA states: a reciprocal by one unit in the last place, exp2 by two


def on_the_host(statement: str, off: int) -> Callable[[Tensor], Tensor]:
    """A statement with the GPU's functions of the prelude over a tensor; ``off``: how far approximations are off."""
    text = template("prelude.h")
    own = text[text.index("// 1 / a for a of at least 1") : text.index("#else\nINLINE float reciprocal_")]
    shims = f"""
#include <cmath>
#include <cstring>
#define INLINE static inline
static float moved(float a) {{ int bits; memcpy(&bits, &a, 4); bits += {off}; memcpy(&a, &bits, 4); return a; }}
static float approximate_reciprocal(float a) {{ return moved(1.0f / a); }}
static float approximate_exp2(float a) {{ return moved(moved(exp2f(a))); }}
static float at_most(float a, float limit) {{ return a > limit ? limit : a; }}
static float at_least(float a, float limit) {{ return a < limit ? limit : a; }}
"""
    loop = f"""
extern "C" void apply(const void *const *arguments) {{
    const float *from = (const float *)arguments[0];
    float *to = (float *)arguments[1];
    for (long i = 0; i < (long)arguments[2]; i++) to[i] = {statement};
}}
"""
    apply = cpu.function_of(shims + own + loop, "apply")

    def function(values: Tensor) -> Tensor:
        out = torch.empty_like(values)
        apply(struct.pack("@3q", values.data_ptr(), out.data_ptr(), values.numel()))
        return out

    return function


def units(actual: Tensor, expected: Tensor) -> Tensor:
    """How many float32 numbers lie between; all are positive."""
    return (actual.view(torch.int32) - expected.view(torch.int32)).abs()


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_the_reciprocal_is_rounded_to_nearest(off: int) -> None:
    """Of every number from 1 to 2, whatever the special function unit gives: but for a few, which a GPU's own choice
    of the last bit decides (it takes the same steps where it divides), and then a neighbour of the right number.
    """
    values = torch.arange(0x3F800000, 0x40000000, dtype=torch.int32).view(torch.float32)
    reciprocal = on_the_host("reciprocal_(from[i])", off)
    distance = units(reciprocal(values), values.double().reciprocal().float())
    assert distance.max() <= 1
    assert distance.count_nonzero() <= 40
    # Nothing is subnormal, and nothing becomes NaN, where the result would leave the range.
    large = torch.tensor([2.0**125, 2.0**126, 3e38, float("inf"), float("nan")])
    found = reciprocal(large)
    assert (found[:4] > 1e-38).all()
    assert (found[1:4] < 1.2e-38).all()
    assert found[4].isnan()


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_the_sigmoid_is_within_seven_units(off: int) -> None:
    values = torch.cat((torch.linspace(-87, 30, 1 << 20), torch.linspace(-4, 4, 1 << 20)))
    sigmoid = on_the_host("sigmoid_(from[i])", off)
    assert units(sigmoid(values), values.double().sigmoid().float()).max() <= 7
    ends = sigmoid(torch.tensor([-1e30, -float("inf"), float("inf"), float("nan")]))
    assert (ends[:2] < 2e-38).all()
    assert ends[2] == 1
    assert ends[3].isnan()
