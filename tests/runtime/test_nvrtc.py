"""The CUDA kernels as NVRTC compiles them."""

from __future__ import annotations

import pytest
import torch
from every_operation import every_operation

from klif_sj.codegen.kernel import Kernel
from klif_sj.runtime import cuda

pytestmark = pytest.mark.once

nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc", reason="CuPy's NVRTC bindings are not installed")


@pytest.mark.parametrize("architecture", [75, 90, 120])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_operation_and_every_number_compiles(dtype: torch.dtype, architecture: int) -> None:
    kernel = Kernel(every_operation(dtype), 1, dtype, False, False, False)
    program = nvrtc.createProgram(cuda.source(kernel, 1), "kernel.cu", (), ())
    try:
        nvrtc.compileProgram(program, (f"--gpu-architecture=sm_{architecture}", *cuda.OPTIONS))
    except nvrtc.NVRTCError as error:
        pytest.fail(f"NVRTC: {error}\n{nvrtc.getProgramLog(program)}")
