"""What the CUDA kernels' code must be: each fault that was mended is found again where its mending is taken out."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import torch
from cuda_cases import Make, clif, glif, klif, program_of
from cuda_emulation import emulate

from klif_sj import GLIFNode
from klif_sj.codegen import kernel as templates
from klif_sj.codegen.kernel import Kernel, template
from klif_sj.runtime import cpu, cuda, nvrtc
from klif_sj.runtime.cache import CompilerError

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


def kernel_of(make: Make, steps: int, dtype: torch.dtype, backward: bool, columns: bool = False) -> Kernel:
    return Kernel(program_of(make(steps, 64)), steps, dtype, columns, False, backward)


def ptx(kernel: Kernel) -> str:
    options = ("--gpu-architecture=compute_80", *cuda.OPTIONS)
    text = nvrtc.compiled(cuda.source(kernel, cuda.vector_width(kernel)), options).decode()
    return text.partition(".entry finish")[0]


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


@pytest.mark.parametrize(("make", "backward"), [(klif, True), (clif, False), (clif, True)])
def test_no_division_branches_where_its_range_is_known(make: Make, backward: bool, undo: Undo) -> None:
    kernel, exact = kernel_of(make, 4, torch.float16, backward), r"\b(?:div|rcp)\.rn\.f32"
    if make is klif:  # whose tau is 3: a division by it keeps its range
        kernel = Kernel(program_of(templates_klif()), 4, torch.float16, False, False, backward)
    assert re.findall(exact, ptx(kernel)) == []
    undo("prelude.h", "    return fmaf(r, -fmaf(within, r, -1.0f), r);", "    return 1.0f / a;")
    assert len(re.findall(exact, ptx(kernel))) >= 32


def templates_klif():  # noqa: ANN201
    from klif_sj import KLIFNode

    return KLIFNode()
