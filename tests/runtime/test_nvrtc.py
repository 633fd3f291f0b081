"""The CUDA kernels as NVRTC compiles them, with the options that are used, for every GPU that it knows.

``make nvrtc-matrix`` runs this with other versions of NVRTC and of CuPy.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_cases import Make, clif, glif, klif, program_of
from every_operation import every_operation

from klif_sj.codegen.kernel import Kernel
from klif_sj.codegen.program import Program
from klif_sj.runtime import cuda, nvrtc
from klif_sj.runtime.cache import CompilerError

pytestmark = pytest.mark.once

try:
    KNOWN = nvrtc.binding().getSupportedArchs()
except CompilerError as error:
    pytest.skip(str(error), allow_module_level=True)
ARCHITECTURES = [a for a in (75, 80, 86, 89, 90, 100, 120) if a in KNOWN]


def compiled(kernel: Kernel, target: str, *more: str) -> bytes:
    source = cuda.source(kernel, cuda.vector_width(kernel))
    return nvrtc.compiled(source, (f"--gpu-architecture={target}", *cuda.OPTIONS, *more))


def kernel_of(make: Make, dtype: torch.dtype, backward: bool, steps: int = 2) -> Kernel:
    program = program_of(make(steps, 5), torch.float64 if dtype == torch.float64 else torch.float32)
    channels_innermost = any(p.per_channel for p in program.parameters)
    return Kernel(program, steps, dtype, channels_innermost, False, backward)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("make", [klif, clif, glif], ids=lambda make: make.__name__)
def test_compiles_for_every_architecture(make: Make, architecture: int) -> None:
    """To a file that is whole, with the one pass that is launched, and its second part."""
    for backward, dtype in ((False, torch.float16), (True, torch.bfloat16)):
        machine_code = compiled(kernel_of(make, dtype, backward), f"sm_{architecture}")
        headers, size, count = (
            *struct.unpack_from("<Q", machine_code, 0x28),
            *struct.unpack_from("<HH", machine_code, 0x3A),
        )
        segments, width, number = (
            *struct.unpack_from("<Q", machine_code, 0x20),
            *struct.unpack_from("<HH", machine_code, 0x36),
        )
        assert len(machine_code) == max(headers + size * count, segments + width * number)
        assert (b".text.forward" in machine_code) is not backward
        assert (b".text.backward" in machine_code) is (b".text.finish" in machine_code) is backward


@pytest.mark.parametrize("architecture", [a for a in (75, 90, 120) if a in KNOWN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_operation_and_every_number_compiles(dtype: torch.dtype, architecture: int) -> None:
    compiled(Kernel(every_operation(dtype), 1, dtype, False, False, False), f"sm_{architecture}")


# Subnormal numbers


ROUNDED = re.compile(r"\b(?:add|sub|mul|fma|mad|div|rcp|sqrt|min|max|abs|neg|setp|set|cvt)\.[\w.]*\bftz\b")
"""What flushes subnormal numbers in PTX. An approximation may (``ex2.approx.ftz``): exp gives it none."""


def flushing(kernel: Kernel, *more: str) -> list[str]:
    ptx = compiled(kernel, f"compute_{ARCHITECTURES[0]}", *more).decode()
    assert ".f32" in ptx
    return [found for found in ROUNDED.findall(ptx) if ".approx." not in found]


@pytest.mark.parametrize("make", [klif, clif, glif], ids=lambda make: make.__name__)
def test_no_instruction_flushes_subnormal_numbers(make: Make) -> None:
    for backward in (False, True):
        kernel = kernel_of(make, torch.float32, backward)
        assert flushing(kernel) == []
        assert len(flushing(kernel, "--ftz=true")) > 4


NVDISASM = shutil.which("nvdisasm") or next(
    map(str, Path(torch.__file__).parents[1].glob("nvidia/*/bin/nvdisasm")), None
)


@pytest.mark.skipif(NVDISASM is None, reason="no nvdisasm, as the package nvidia-cuda-nvdisasm brings")
def test_no_machine_code_flushes_subnormal_numbers(tmp_path: Path) -> None:
    """Sums and products. A division has a rare path of its own, whose comparisons flush."""
    program, found = Program("Leak", ("v",), (), "float32", "    output = state[0] = state[0] * 0.7f + x;"), []
    for more in ((), ("--ftz=true",)):
        file = tmp_path / "kernel.cubin"
        file.write_bytes(compiled(Kernel(program, 4, torch.float32, False, False, False), "sm_90", *more))
        sass = subprocess.run([NVDISASM, "-c", file], capture_output=True, text=True, check=True).stdout
        assert "FMUL" in sass
        found.append(len(re.findall(r"\b(?:FADD|FMUL|FFMA)\.FTZ", sass)))
    assert found[0] == 0 < found[1]


def test_no_header_is_needed() -> None:
    """NVRTC finds none here, nor is one looked for."""
    kernel, options = kernel_of(klif, torch.float32, True), ("--gpu-architecture=compute_80", *cuda.OPTIONS)
    source = cuda.source(kernel, 1)
    nvrtc.compiled(source, options)
    with pytest.raises(CompilerError, match=r'open source file "cuda_fp16\.h"'):
        nvrtc.compiled(f"#include <cuda_fp16.h>\n{source}", options)


def test_an_option_is_given_once() -> None:
    """CuPy's own compiler would repeat it."""
    assert len(set(cuda.OPTIONS)) == len(cuda.OPTIONS)
    kernel = kernel_of(klif, torch.float32, False)
    if nvrtc.binding().getVersion() >= (12, 9):
        compiled(kernel, "sm_80", "-default-device")
    else:
        with pytest.raises(CompilerError, match="defined more than once"):
            compiled(kernel, "sm_80", "-default-device")


# What is compiled for, and what is kept


def knowing(monkeypatch: pytest.MonkeyPatch, *known: int) -> None:
    binding = SimpleNamespace(getSupportedArchs=lambda: known, getVersion=lambda: (12, 4))
    monkeypatch.setattr(nvrtc, "binding", lambda: binding)


@pytest.mark.parametrize(("gpu", "expected"), [(75, "sm_75"), (90, "sm_90"), (103, "compute_90"), (88, "compute_86")])
def test_a_gpu_that_nvrtc_does_not_know_gets_ptx(gpu: int, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    knowing(monkeypatch, 75, 80, 86, 90)
    assert nvrtc.target(gpu) == expected


def test_a_gpu_that_is_too_old_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    knowing(monkeypatch, 75, 80, 86, 90)
    with pytest.raises(
        CompilerError, match=r"capability 7\.5 or newer for NVRTC 12\.4, got one of 7\.0; .* older CUDA"
    ):
        nvrtc.target(70)


SOURCE = 'extern "C" __global__ void f(float *x) { x[threadIdx.x] *= 0.5f; }'


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KLIF_SJ_CACHE", str(tmp_path / "kernels"))
    return tmp_path / "kernels"


def test_ptx_is_text_that_ends_where_it_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "target", lambda architecture: f"compute_{ARCHITECTURES[-1]}")
    ptx = nvrtc.image(SOURCE, 999, cuda.OPTIONS).decode()
    assert ptx.lstrip().startswith("//")
    assert ptx.rstrip("\n\0").endswith("}")


def test_compiled_once_and_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder's privacy and the files' wholeness are the cache's, and tested with the host's libraries."""
    first = nvrtc.image(SOURCE, 75, cuda.OPTIONS)
    (file,) = folder.iterdir()
    assert file.suffix == ".cubin"
    assert file.read_bytes().startswith(first)
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "compiled", None)
        assert nvrtc.image(SOURCE, 75, cuda.OPTIONS) == first
    file.write_bytes(first[:-1])
    assert nvrtc.image(SOURCE, 75, cuda.OPTIONS) == first
    assert file.stat().st_size > len(first)


def test_everything_that_decides_is_in_the_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "compiled", lambda source, options: b"")
    asked = [(SOURCE, 75, ()), (f"{SOURCE} ", 75, ()), (SOURCE, 80, ()), (SOURCE, 75, ("--fmad=false",))]
    for arguments in (*asked, *asked):
        nvrtc.image(*arguments)
    assert len(list(folder.iterdir())) == 4
    monkeypatch.setattr(nvrtc, "version", lambda: "99.9")
    nvrtc.image(*asked[0])
    assert len(list(folder.iterdir())) == 5


def test_a_refused_source_is_shown_with_the_log(folder: Path) -> None:
    program = Program("Broken", ("v",), (), "float32", "    output = undefined_name;")
    with pytest.raises(CompilerError) as caught:
        nvrtc.image(cuda.source(Kernel(program, 4, torch.float32, False, False, False), 1), 75, cuda.OPTIONS)
    text = str(caught.value)
    assert re.search(r"NVRTC [\d.]+ refused .*--gpu-architecture=sm_75 --std=c\+\+17", text)
    assert 'identifier "undefined_name" is undefined' in text
    assert re.search(r"^ *\d+     output = undefined_name;$", text, re.MULTILINE)
    assert list(folder.iterdir()) == []
