"""A driver of a GPU that is not there: what the path to it asks for, and what is launched, is written down.

python tests/support/cuda_driver.py   prints how long the Python of a launch takes, without the driver
"""

from __future__ import annotations

import ctypes
import time
import weakref
from typing import Any

import pytest
import torch

from klif_sj import CLIFNode, GLIFNode, KLIFNode
from klif_sj.neuron import on_kernels
from klif_sj.runtime import cuda, nvrtc, scan
from klif_sj.runtime.launch import Pass


class FakeModule:
    def __init__(self, driver: FakeDriver, image: bytes) -> None:
        self._driver = driver
        driver.log.append("load")
        driver.images.append(image)
        driver.modules.append(weakref.ref(self))

    def get_function(self, name: str) -> FakeFunction:
        self._driver.log.append(f"find {name}")
        function = FakeFunction(self, name)
        self._driver.names[function.ptr] = name
        return function


class FakeFunction:
    def __init__(self, module: FakeModule, name: str) -> None:
        self.module, self.ptr = module, id(self)


class FakeDriver:
    """Takes the place of CuPy's driver and of what torch knows of a GPU; tensors of the CPU go to the CUDA kernels."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.images: list[bytes] = []
        self.modules: list[weakref.ref[FakeModule]] = []
        self.names: dict[int, str] = {}
        self.first_arguments: list[int] = []
        self.context = self.capturing = False
        for cached in (cuda._function, cuda._module):
            cached.cache_clear()
        replace = monkeypatch.setattr
        monkeypatch.setitem(scan.TARGETS, "cpu", cuda)
        monkeypatch.setattr(on_kernels, "_plans", weakref.WeakKeyDictionary())
        replace(cuda, "processors", lambda device: 132)
        replace(cuda, "_driver", lambda: self)
        replace(cuda, "_make_context", self._make_context)
        replace(cuda, "_loaded", lambda image: FakeModule(self, image))
        replace(torch._C, "_cuda_getDevice", lambda: None, raising=False)
        replace(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
        replace(torch.cuda, "is_current_stream_capturing", lambda: self.capturing)
        replace(torch.cuda, "get_device_capability", lambda device: (9, 0))

    def ctxGetCurrent(self) -> int:
        return int(self.context)

    def _make_context(self) -> None:
        self.context = True
        self.log.append("context")

    def launchKernel(self, function: int, *rest: Any) -> None:
        blocks, *grid, threads, height, depth, shared, stream, arguments, extra = rest
        assert (*grid, height, depth, shared, stream, extra) == (1, 1, 1, 1, 0, 77, 0)
        assert blocks > 0 < threads
        if not self.context:
            raise RuntimeError("CUDA_ERROR_INVALID_CONTEXT: invalid device context")
        address = ctypes.c_uint64.from_address(arguments).value
        self.first_arguments.append(int.from_bytes(ctypes.string_at(address, 8), "little"))
        self.log.append(f"launch {self.names[function]}")


class SilentDriver(FakeDriver):
    def launchKernel(self, *arguments: int) -> None:
        pass


def main(calls: int = 20, rounds: int = 1500) -> None:
    """The quietest round of every launch: a pass, and with its sums of gradients the second kernel."""
    with pytest.MonkeyPatch.context() as patch:
        SilentDriver(patch)
        patch.setattr(nvrtc, "image", lambda source, architecture, options: b"")
        x = torch.randn(4, 2, 8, 32, 32, requires_grad=True)
        for node in (KLIFNode(), CLIFNode(), GLIFNode(4, 8)):
            node.step_mode, node.backend = "m", "cpp"
            launches: list[tuple[Pass, list[Any]]] = []
            with patch.context() as noted:
                noted.setattr(cuda, "launch", lambda work, record, to=launches: to.append((work, record)))
                torch.autograd.grad(node(x).sum(), x)
            for work, record in launches:
                seconds = []
                for _ in range(rounds):
                    start = time.perf_counter()
                    for _ in range(calls):
                        cuda.launch(work, record.copy())
                    seconds.append((time.perf_counter() - start) / calls)
                of_pass = "backward" if work.kernel.backward else "forward"
                print(f"{type(node).__name__} {of_pass}: {min(seconds) * 1e6:.1f} us")


if __name__ == "__main__":
    main()
